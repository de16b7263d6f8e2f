"""Work with stages: lines in a log now and then, a bar on a terminal that is taken away, nothing on stdout."""

from __future__ import annotations

import re

import pytest
from processes import run_on_a_terminal

from atcache.pipelines.running.stages import StageProgress


def test_a_log_gets_the_stage_its_share_and_the_time_to_go(capfd):
    with StageProgress("calibrate", seconds_between_lines=0) as progress:
        for stage, share in (("teacher", 0.0), ("teacher", 0.25), ("basis", 0.5), ("basis", 1.0)):
            progress.show(stage, share)
    out, err = capfd.readouterr()
    assert out == ""
    first, second, third, fourth = err.splitlines()
    assert (first, third, fourth) == ("calibrate: teacher, 0%", "calibrate: basis, 50%", "calibrate: basis, 100%")
    assert re.fullmatch(r"calibrate: teacher, 25%, \d+ s to go", second)


def test_a_share_that_falls_begins_anew(capfd):
    with StageProgress("calibrate", seconds_between_lines=0) as progress:
        for share in (0.9, 0.1, 0.2):
            progress.show("step", share)
    lines = capfd.readouterr().err.splitlines()
    assert lines[:2] == ["calibrate: step, 90%", "calibrate: step, 10%"]
    assert re.fullmatch(r"calibrate: step, 20%, \d+ s to go", lines[2])


def test_work_that_is_soon_done_says_nothing(capfd):
    with StageProgress("calibrate") as progress:
        progress.show("teacher", 1.0)
    with pytest.raises(ZeroDivisionError), StageProgress("calibrate") as progress:
        progress.show("teacher", 1 / 0)
    assert capfd.readouterr() == ("", "")


ON_A_TERMINAL = """
from atcache.pipelines.running.stages import StageProgress
with StageProgress("calibrate") as progress:
    progress.show("step [of] 2", 0.5)
print("after")
"""


def test_a_terminal_gets_a_bar_that_is_taken_away():
    done, shown = run_on_a_terminal(ON_A_TERMINAL)
    assert (done.returncode, done.stdout) == (0, b"after\n")
    assert b"calibrate: step [of] 2" in shown
    assert b"50%" in shown
    assert shown.rstrip().endswith(b"\x1b[2K"), "the line is erased"
