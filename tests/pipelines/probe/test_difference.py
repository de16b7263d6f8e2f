"""The interval is Student's, and the sentence says what it says."""

from __future__ import annotations

import numpy as np
import pytest

from atcache.pipelines.probe.difference import (
    in_words,
    is_near_chance,
    paired_difference,
    seeds_needed,
    student_t,
)


@pytest.mark.parametrize(
    ("degrees", "t"), [(1, 12.7062), (2, 4.3027), (3, 3.1824), (4, 2.7764), (9, 2.2622), (30, 2.0423), (999, 1.9623)]
)
def test_t_is_that_of_the_printed_tables(degrees, t):
    assert student_t(degrees) == pytest.approx(t, rel=1e-4)


def test_the_interval_holds_the_true_mean_nineteen_times_in_twenty():
    pairs = np.random.default_rng(0).normal(3.0, 2.0, (4000, 4))
    found = [paired_difference(row, [0.0] * 4, 10**6) for row in pairs.tolist()]
    assert np.mean([one.low <= 3.0 <= one.high for one in found]) == pytest.approx(0.95, abs=0.01)


def test_the_numbers_are_those_worked_out_by_hand():
    found = paired_difference([60.0, 62.0, 64.0], [58.0, 58.0, 58.0], 10**6)
    assert (found.mean, found.num_pairs) == (4.0, 3)
    assert found.standard_error == pytest.approx(2 / 3**0.5)
    assert (found.low, found.high) == pytest.approx((4 - 4.3027 * 2 / 3**0.5, 4 + 4.3027 * 2 / 3**0.5), rel=1e-4)
    assert found.answer == "undecided"


def test_equal_pairs_on_few_images_are_no_certainty():
    found = paired_difference([50.0, 50.0], [45.0, 45.0], 20)  # one image of 20
    assert found.standard_error > 1
    assert found.answer == "undecided"
    assert paired_difference([50.0, 50.0], [45.0, 45.0], 10_000).answer == "works"


def test_the_answer_is_put_in_words():
    ahead = paired_difference([70.0, 71.0, 72.0], [60.0, 62.0, 62.0], 1000)
    assert in_words(ahead, "copy", 3) == (
        "copy is ahead of scratch by 9.7 ± 0.3 points (95% interval +8.2 to +11.1, 3 pairs): transfer works on your "
        "data."
    )
    behind = paired_difference([60.0, 62.0, 62.0], [70.0, 71.0, 72.0], 1000)
    assert in_words(behind, "distill", 3).startswith("distill is behind scratch by 9.7 ± 0.3 points")
    assert in_words(behind, "distill", 3).endswith("transfer does not work on your data with this student.")
    unsure = paired_difference([60.0, 62.0, 64.0], [58.0, 58.0, 58.0], 1000)
    assert in_words(unsure, "copy", 3).endswith(f"0 is within the interval. Give about --seeds {seeds_needed(unsure)}.")
    hopeless = paired_difference([60.0, 62.1, 58.0], [60.0, 60.0, 60.0], 1000)
    assert in_words(hopeless, "copy", 3).endswith(
        "So small a difference needs too many seeds: give another --out, and more --steps or --samples."
    )


def test_pairs_that_there_was_no_time_for_come_first():
    unsure = paired_difference([60.0, 62.0, 64.0], [58.0, 58.0, 58.0], 1000)
    assert in_words(unsure, "copy", 40).endswith("The same command again adds pairs, up to 40.")


def test_one_look_is_wrong_as_often_as_it_says_and_several_are_so_more_often():
    """What the note on looks says, where there is no difference."""
    rng = np.random.default_rng(0)
    wrong = {"at once": 0, "as advised": 0, "one by one": 0}
    for _ in range(2000):
        pairs = rng.normal(50, 2, (50, 2))
        found = paired_difference(*pairs[:3].T.tolist(), 10**6)
        wrong["at once"] += found.answer != "undecided"
        while found.answer == "undecided" and (seeds := seeds_needed(found)):
            found = paired_difference(*pairs[:seeds].T.tolist(), 10**6)
        wrong["as advised"] += found.answer != "undecided"
    for _ in range(300):
        differences = np.subtract(*rng.normal(50, 2, (2, 50)))
        number = np.arange(3, 51)
        mean = np.cumsum(differences)[2:] / number
        variance = (np.cumsum(differences**2)[2:] - number * mean**2) / (number - 1)
        reach = np.array([student_t(pairs - 1) for pairs in number.tolist()]) * np.sqrt(variance / number)
        wrong["one by one"] += bool((abs(mean) > reach).any())
    assert 80 < wrong["at once"] < 125, "5 % of 2,000 is 100"
    assert 200 < wrong["as advised"] <= 340, "15 % is 300"
    assert 75 < wrong["one by one"] <= 105, "30 % of 300 is 90"


def test_as_many_seeds_as_are_named_would_decide():
    unsure = paired_difference([60.0, 62.0, 64.0], [58.0, 58.0, 58.0], 1000)
    spread = unsure.standard_error * 3**0.5
    number = seeds_needed(unsure)
    assert student_t(number - 1) * spread / number**0.5 < unsure.mean
    assert student_t(number - 2) * spread / (number - 1) ** 0.5 >= unsure.mean


def test_students_that_guess_are_known_for_it():
    assert is_near_chance([12.0, 14.0], [10.0, 11.0], 10)
    assert not is_near_chance([30.0, 32.0], [10.0, 11.0], 10)
    assert is_near_chance([52.0, 53.0], [50.0, 51.0], 2)
