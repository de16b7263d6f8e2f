"""A checkpoint is whole or absent, holds data and no code, and a folder belongs to one run."""

from __future__ import annotations

import json
import pickle

import pytest
import torch

from atcache.errors import CacheMismatchError, ConfigError, CorruptCacheError
from atcache.pipelines.checkpoint import check_same_run, load_checkpoint, save_checkpoint, settle_precision
from atcache.precision import resolve_precision
from atcache.store.durable import partial_path

CPU = torch.device("cpu")


def test_what_was_saved_is_loaded(tmp_path):
    path = tmp_path / "checkpoint.pt"
    contents = {"step": 7, "model": {"w": torch.arange(6.0).view(2, 3)}, "ema": None, "groups": [{"lr": 0.5}]}
    save_checkpoint(path, contents)
    loaded = load_checkpoint(path, CPU)
    assert torch.equal(loaded["model"].pop("w"), contents["model"].pop("w"))
    assert loaded == contents
    assert [file.name for file in tmp_path.iterdir()] == ["checkpoint.pt"]


class Payload:
    """What a hostile file would hold."""

    def __reduce__(self):
        return print, ("this must never run",)


def test_a_pickled_object_is_refused_unrun(tmp_path, capsys):
    path = tmp_path / "checkpoint.pt"
    for write in (
        lambda: torch.save({"step": 1, "model": Payload()}, path),
        lambda: path.write_bytes(pickle.dumps(Payload())),
    ):
        write()
        with pytest.raises(CorruptCacheError, match=r"checkpoint\.pt cannot be read \(.*\)\. Delete it to start this"):
            load_checkpoint(path, CPU)
    assert "never run" not in capsys.readouterr().out


@pytest.mark.parametrize("length", [0, 1, 500, -1])
def test_a_cut_file_is_refused(length, tmp_path):
    path = tmp_path / "checkpoint.pt"
    save_checkpoint(path, {"step": 7, "w": torch.zeros(100)})
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(CorruptCacheError, match="cannot be read"):
        load_checkpoint(path, CPU)


def test_a_write_that_failed_leaves_the_old_checkpoint_and_nothing_else(tmp_path):
    path = tmp_path / "checkpoint.pt"
    save_checkpoint(path, {"step": 7})
    with pytest.raises(AttributeError, match="local object"):
        save_checkpoint(path, {"step": 8, "late": lambda: None})  # cannot be pickled: fails after the file was begun
    assert load_checkpoint(path, CPU) == {"step": 7}
    assert [file.name for file in tmp_path.iterdir()] == ["checkpoint.pt"]


def test_half_a_temp_file_of_a_killed_writer_does_not_hurt(tmp_path):
    path = tmp_path / "checkpoint.pt"
    save_checkpoint(path, {"step": 7})
    partial_path(path).write_bytes(path.read_bytes()[:40])
    assert load_checkpoint(path, CPU) == {"step": 7}
    save_checkpoint(path, {"step": 8})
    assert load_checkpoint(path, CPU) == {"step": 8}


def test_a_folder_belongs_to_one_run_and_every_difference_is_named(tmp_path):
    file = tmp_path / "deep" / "run" / "run.json"
    record = {"settings": {"seed": 0, "layers": (0, 1)}, "data": {"validation": None}}
    check_same_run(file, record)
    assert json.loads(file.read_text()) == {"settings": {"seed": 0, "layers": [0, 1]}, "data": {"validation": None}}
    check_same_run(file, record)
    other = {"settings": {"seed": 1, "layers": (0, 1)}, "data": {"validation": {"source": "abc"}}}
    expected = (
        r"run holds another run: data\.validation\.source is None there and 'abc' here; settings\.seed is 0 there and "
        r"1 here\. Give another --out"
    )
    with pytest.raises(CacheMismatchError, match=expected):
        check_same_run(file, other)


def test_auto_is_the_precision_a_run_was_begun_in():
    assert settle_precision("auto", {"precision": "fp32"}, CPU) == "fp32"
    assert settle_precision("auto", {"precision": "bf16"}, CPU) == "bf16"
    assert settle_precision("bf16", {"precision": "fp32"}, CPU) == "bf16"
    here = {torch.float32: "fp32", torch.bfloat16: "bf16"}[resolve_precision("auto", CPU)]
    for nothing_said in (None, {"precision": "auto"}, {}, []):
        assert settle_precision("auto", nothing_said, CPU) == here


def test_what_is_no_run_folder_is_refused(tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ConfigError, match="file: a file is in the way of the output folder"):
        check_same_run(tmp_path / "file" / "run.json", {})
    (tmp_path / "run.json").write_text('{"settings": ')
    with pytest.raises(CorruptCacheError, match=r"run\.json is damaged \(.*\)\. Delete .* to start anew"):
        check_same_run(tmp_path / "run.json", {})
    (tmp_path / "run.json").write_text("[1]")
    with pytest.raises(CorruptCacheError, match=r"run\.json holds no record of a run\. Delete .* to start anew"):
        check_same_run(tmp_path / "run.json", {})
