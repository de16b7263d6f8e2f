"""What does not fit into the time is left out in order: pairs down to three, then steps, then the third pair."""

from __future__ import annotations

import pytest

from atcache.errors import ConfigError
from atcache.pipelines.probe.schedule import PairSpeed, Schedule, fit_schedule, fit_seeds

SPEED = PairSpeed(step_s=0.5, rest_s=10)  # 400 steps: 210 s a pair


@pytest.mark.parametrize(
    ("minutes", "expected"),
    [
        (100, Schedule(steps=400, seeds=5)),
        (17.5, Schedule(steps=400, seeds=5)),
        (15, Schedule(steps=400, seeds=4)),
        (10.5, Schedule(steps=400, seeds=3)),
        (6, Schedule(steps=220, seeds=3)),
        (1.75, Schedule(steps=50, seeds=3)),
        (1.5, Schedule(steps=70, seeds=2)),
    ],
)
def test_what_fits_is_done(minutes, expected):
    schedule = fit_schedule(SPEED, steps=400, seeds=5, minutes=minutes)
    assert schedule == expected
    assert schedule.seeds * SPEED.seconds(schedule.steps) <= 60 * minutes


def test_too_little_time_is_refused_with_the_time_it_takes():
    with pytest.raises(ConfigError, match=r"two pairs of 50 steps take about 1\.2 minutes here\. Give --minutes 1\.3"):
        fit_schedule(SPEED, steps=400, seeds=5, minutes=1)
    assert fit_schedule(SPEED, steps=400, seeds=5, minutes=1.3) == Schedule(steps=58, seeds=2)


def test_later_calls_add_pairs():
    def seeds(num_done, minutes):
        return fit_seeds(SPEED, steps=400, seeds=8, num_done=num_done, minutes=minutes)

    assert [seeds(3, 1), seeds(3, 7), seeds(3, 60), seeds(8, 60), seeds(0, 1)] == [4, 5, 8, 8, 2]
