"""Progress: plain lines in a log, a bar on a terminal, nothing on stdout."""

from __future__ import annotations

import re

import pytest
from processes import run_on_a_terminal

from atcache.pipelines.running.progress import Progress


def test_a_log_gets_one_line_at_the_end_with_speed_and_note(capfd):
    with Progress("build", total=8, unit="views") as progress:
        for _ in range(8):
            progress.advance(1, "12 MB")
    out, err = capfd.readouterr()
    assert out == ""
    assert re.fullmatch(r"build: 8/8 views, [\d.e+]+/s, 12 MB\n", err)


def test_units_done_before_count_but_not_in_the_speed(capfd):
    with Progress("build", total=10**9 + 10, unit="views", done=10**9) as progress:
        progress.advance(5)
        assert progress.done == 10**9 + 5
    speed = re.fullmatch(r"build: 1000000005/1000000010 views, ([\d.e+]+)/s, \d+ s to go\n", capfd.readouterr().err)
    assert speed is not None
    assert float(speed[1]) < 10**7


def test_a_run_that_did_nothing_says_nothing(capfd):
    with Progress("build", total=8, unit="views", done=8):
        pass
    assert capfd.readouterr() == ("", "")


def test_an_error_still_shows_how_far_it_came(capfd):
    with pytest.raises(ZeroDivisionError), Progress("build", total=8, unit="views") as progress:  # noqa: PT012
        progress.advance(3)
        raise ZeroDivisionError
    assert capfd.readouterr().err.startswith("build: 3/8 views")


def test_lines_said_reach_a_log_as_they_are(capfd):
    with Progress("train", total=2, unit="steps") as progress:
        progress.say("epoch 1: accuracy [0.5]")
    assert capfd.readouterr().err == "epoch 1: accuracy [0.5]\n"


ON_A_TERMINAL = """
from atcache.pipelines.running.progress import Progress
with Progress("build", total=4, unit="views") as progress:
    progress.advance(4, "[note]")
    progress.say("said [so]")
"""


def test_a_terminal_gets_a_bar_that_takes_brackets_as_text():
    done, shown = run_on_a_terminal(ON_A_TERMINAL)
    assert done.returncode == 0
    assert b"4/4" in shown
    assert b"views/s  [note]" in shown
    assert b"said [so]" in shown
