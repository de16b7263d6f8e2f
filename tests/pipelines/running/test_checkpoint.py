"""A checkpoint is whole or absent, and holds data and no code."""

from __future__ import annotations

import pickle

import pytest
import torch

from atcache.errors import CorruptCacheError
from atcache.files.durable import partial_path
from atcache.pipelines.running.checkpoint import load_checkpoint, save_checkpoint


def test_what_was_saved_is_loaded(tmp_path):
    path = tmp_path / "checkpoint.pt"
    contents = {"step": 7, "model": {"w": torch.arange(6.0).view(2, 3)}, "ema": None, "groups": [{"lr": 0.5}]}
    save_checkpoint(path, contents)
    loaded = load_checkpoint(path)
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
            load_checkpoint(path)
    assert "never run" not in capsys.readouterr().out


@pytest.mark.parametrize("length", [0, 1, 500, -1])
def test_a_cut_file_is_refused(length, tmp_path):
    path = tmp_path / "checkpoint.pt"
    save_checkpoint(path, {"step": 7, "w": torch.zeros(100)})
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(CorruptCacheError, match="cannot be read"):
        load_checkpoint(path)


def test_a_file_that_is_not_given_is_not_called_damaged(tmp_path):
    (tmp_path / "folder.pt").mkdir()
    with pytest.raises(IsADirectoryError):
        load_checkpoint(tmp_path / "folder.pt")


def test_a_write_that_failed_leaves_the_old_checkpoint_and_nothing_else(tmp_path):
    path = tmp_path / "checkpoint.pt"
    save_checkpoint(path, {"step": 7})
    with pytest.raises(AttributeError, match="local object"):
        save_checkpoint(path, {"step": 8, "late": lambda: None})  # cannot be pickled: fails after the file was begun
    assert load_checkpoint(path) == {"step": 7}
    assert [file.name for file in tmp_path.iterdir()] == ["checkpoint.pt"]


def test_half_a_temp_file_of_a_killed_writer_does_not_hurt(tmp_path):
    path = tmp_path / "checkpoint.pt"
    save_checkpoint(path, {"step": 7})
    partial_path(path).write_bytes(path.read_bytes()[:40])
    assert load_checkpoint(path) == {"step": 7}
    save_checkpoint(path, {"step": 8})
    assert load_checkpoint(path) == {"step": 8}
