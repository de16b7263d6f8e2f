"""Every step stands in the metrics once, as JSON and for TensorBoard, also after a crash."""

from __future__ import annotations

import subprocess
import sys

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from atcache.errors import CorruptCacheError
from atcache.pipelines.running.metrics import MetricsLog, read_metrics


def write_steps(folder, first, stop, offset=0.0):
    with MetricsLog(folder, first_step=first) as log:
        for step in range(first + 1, stop + 1):
            log.write("train", step, {"loss": step + offset, "lr": 0.5})
        log.write("validation", stop, {"top1": 10.0 * stop})


def test_what_was_written_is_read_by_kind(tmp_path):
    write_steps(tmp_path, 0, 3)
    assert read_metrics(tmp_path, "train") == [
        {"kind": "train", "step": step, "loss": float(step), "lr": 0.5} for step in (1, 2, 3)
    ]
    assert read_metrics(tmp_path, "validation") == [{"kind": "validation", "step": 3, "top1": 30.0}]
    assert len(read_metrics(tmp_path)) == 4
    assert read_metrics(tmp_path / "nothing") == []


def test_a_continued_run_drops_what_came_after_its_checkpoint(tmp_path):
    write_steps(tmp_path, 0, 5)
    write_steps(tmp_path, 3, 4, offset=0.5)
    assert [(row["step"], row["loss"]) for row in read_metrics(tmp_path, "train")] == [(1, 1), (2, 2), (3, 3), (4, 4.5)]
    assert [row["step"] for row in read_metrics(tmp_path, "validation")] == [4]


def test_without_tensorboard_metrics_are_written_and_that_is_said_once(tmp_path):
    code = """if True:
        import logging, sys
        from importlib.machinery import PathFinder
        from pathlib import Path

        class Hidden(PathFinder):
            @classmethod
            def find_spec(cls, name, path=None, target=None):
                return None if name.partition(".")[0] == "tensorboard" else PathFinder.find_spec(name, path, target)

        sys.meta_path[sys.meta_path.index(PathFinder)] = Hidden
        from atcache.pipelines.running.metrics import MetricsLog
        logging.basicConfig(format="%(message)s", level=logging.INFO)
        for folder in ("a", "b"):
            Path(folder).mkdir()
            with MetricsLog(Path(folder), first_step=0) as log:
                log.write("train", 1, {"loss": 0.5})
    """
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr == (
        "NOTE: TensorBoard is not installed, so metrics are written to metrics.jsonl only. To have them in TensorBoard "
        "too, pip install 'atcache[tensorboard]'.\n"
    )
    for folder in ("a", "b"):
        assert read_metrics(tmp_path / folder) == [{"kind": "train", "step": 1, "loss": 0.5}]
        assert [path.name for path in (tmp_path / folder).iterdir()] == ["metrics.jsonl"]


@pytest.mark.parametrize("line", ["no JSON", "[1]", '{"kind": "train"}'])
def test_a_damaged_line_is_an_error_that_names_the_file(line, tmp_path):
    (tmp_path / "metrics.jsonl").write_text(line + "\n")
    with pytest.raises(
        CorruptCacheError, match=r"metrics\.jsonl is damaged \(.*\)\. Delete .* to start this run again"
    ):
        read_metrics(tmp_path)


@pytest.mark.parametrize("half", ["{", '{"kind": "train", "step": 4, "loss": 4.0}'])
def test_half_a_line_at_the_end_is_dropped(half, tmp_path):
    write_steps(tmp_path, 0, 3)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write(half)
    write_steps(tmp_path, 3, 4)
    assert [row["step"] for row in read_metrics(tmp_path, "train")] == [1, 2, 3, 4]


def test_tensorboard_reads_every_step_once_also_of_a_continued_run(tmp_path):
    write_steps(tmp_path, 0, 5)
    write_steps(tmp_path, 3, 6, offset=0.5)
    board = EventAccumulator(str(tmp_path)).Reload()
    assert set(board.Tags()["scalars"]) == {"train/loss", "train/lr", "validation/top1"}
    assert [(e.step, e.value) for e in board.Scalars("train/loss")] == [
        (1, 1),
        (2, 2),
        (3, 3),
        (4, 4.5),
        (5, 5.5),
        (6, 6.5),
    ]
    assert [(e.step, e.value) for e in board.Scalars("validation/top1")] == [(6, 60)]
