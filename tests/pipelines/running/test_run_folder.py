"""A run's folder belongs to one run and one process at a time; what was saved is never lost to another."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from atcache.errors import CacheMismatchError, ConfigError, CorruptCacheError
from atcache.pipelines.running.run_folder import keep_record, read_saved_record, run_folder, settle_precision
from atcache.teachers.devices import resolve_precision

CPU = torch.device("cpu")
RECORD = {
    "settings": {"seed": 0, "layers": (0, 1)},
    "record": {"student": "a", "teacher": {"name": "b"}},
    "data": {"validation": None, "views": {"source": "abc", "num_views": 1}},
}
OTHER = {
    "settings": {"seed": 1, "layers": (0, 1)},
    "record": {"student": "c", "teacher": {"name": "d"}},
    "data": {"validation": {"source": "abc"}, "views": {"source": "abd", "num_views": 2}},
}


def test_a_folder_belongs_to_one_run_and_every_difference_is_named(tmp_path):
    file = tmp_path / "run.json"
    keep_record(file, RECORD)
    stored = json.loads(file.read_text())
    assert stored["settings"] == {"seed": 0, "layers": [0, 1]}
    (tmp_path / "checkpoint.pt").touch()
    keep_record(file, RECORD)
    with pytest.raises(CacheMismatchError) as refused:
        keep_record(file, OTHER)
    assert str(refused.value) == (
        f"{tmp_path} holds another run: its validation images or cache are different; num_views is 1 there and 2 here; "
        "its training images are different; student is 'a' there and 'c' here; its teacher is different; --seed is 0 "
        "there and 1 here. Give another --out, or the same options."
    )
    assert json.loads(file.read_text()) == stored


def test_what_may_change_is_written_down(tmp_path):
    file = tmp_path / "run.json"
    keep_record(file, RECORD)
    (tmp_path / "checkpoint.pt").touch()
    changed = {**RECORD, "data": {**RECORD["data"], "validation": {"source": "new"}}}
    with pytest.raises(CacheMismatchError, match="its validation images or cache are different"):
        keep_record(file, changed)
    keep_record(file, changed, may_change=["data.validation"])
    assert json.loads(file.read_text())["data"]["validation"] == {"source": "new"}
    with pytest.raises(CacheMismatchError, match="--seed is 0 there and 1 here"):
        keep_record(file, {**changed, "settings": OTHER["settings"]}, may_change=["data.validation"])


@pytest.mark.parametrize("saved", ["checkpoint.pt", "model.safetensors", "given-up.txt"])
def test_a_run_that_saved_nothing_gives_way_to_another(saved, tmp_path):
    file = tmp_path / "run.json"
    keep_record(file, RECORD)
    (tmp_path / "metrics.jsonl").touch()
    keep_record(file, OTHER)
    assert json.loads(file.read_text())["settings"]["seed"] == 1
    (tmp_path / saved).touch()
    with pytest.raises(CacheMismatchError, match="holds another run"):
        keep_record(file, RECORD)


def test_only_a_run_that_saved_something_is_continued(tmp_path):
    assert read_saved_record(tmp_path / "run.json") is None
    keep_record(tmp_path / "run.json", RECORD)
    assert read_saved_record(tmp_path / "run.json") is None
    (tmp_path / "checkpoint.pt").touch()
    assert read_saved_record(tmp_path / "run.json") == json.loads((tmp_path / "run.json").read_text())


def test_auto_is_the_precision_a_run_was_begun_in():
    assert settle_precision("auto", {"precision": "fp32"}, CPU) == "fp32"
    assert settle_precision("auto", {"precision": "bf16"}, CPU) == "bf16"
    assert settle_precision("bf16", {"precision": "fp32"}, CPU) == "bf16"
    here = {torch.float32: "fp32", torch.bfloat16: "bf16"}[resolve_precision("auto", CPU)]
    for nothing_said in (None, {"precision": "auto"}, {}, []):
        assert settle_precision("auto", nothing_said, CPU) == here


def test_what_is_no_run_folder_is_refused(tmp_path):
    (tmp_path / "file").write_text("mine")
    with (
        pytest.raises(ConfigError, match="file: a file is in the way of the output folder"),
        run_folder(tmp_path / "file"),
    ):
        pass
    (tmp_path / "run.json").write_text('{"settings": ')
    with pytest.raises(CorruptCacheError, match=r"run\.json is damaged \(.*\)\. Delete .* to start again"):
        keep_record(tmp_path / "run.json", {})
    (tmp_path / "run.json").write_text("[1]")
    with pytest.raises(CorruptCacheError, match=r"run\.json holds no record of a run\. Delete .* to start again"):
        keep_record(tmp_path / "run.json", {})


def test_where_no_folder_can_be_is_refused():
    with pytest.raises(ConfigError, match="no folder can be made there"), run_folder(Path("/proc/run")):
        pass


HOLDS_FOLDER = """
import sys
from pathlib import Path
from atcache.pipelines.running.run_folder import run_folder

with run_folder(Path(sys.argv[1])):
    print("mine", flush=True)
    sys.stdin.read()
"""


def test_only_one_process_works_in_a_folder(tmp_path, monkeypatch):
    monkeypatch.setattr("atcache.files.writers._SECONDS_TO_WAIT", 0.2)
    folder = tmp_path / "deep" / "run"
    other = subprocess.Popen(
        [sys.executable, "-c", HOLDS_FOLDER, folder], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert other.stdout.readline() == "mine\n"
    with pytest.raises(ConfigError, match=r"another process is writing .*run\."), run_folder(folder):
        pass
    other.communicate("done")
    with run_folder(folder):
        assert folder.is_dir()
