"""What came out of `paper.py`: accuracies with their errors, shares of the gap, and what they say."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from paper_steps import Row, cache_path, scores_of, seeds_of
from paper_study import Study
from paper_tuning import given_up, recipes_to_try, tuned

from atcache.cache.record import CacheRecord
from atcache.pipelines.train.scores import Score
from atcache.store.reader import CacheReader

REPORT_FILE = "paper.json"
NBYTES = "nbytes_a_view"
"""The member of the report that has the bytes of each codec."""


class LeftOut(NamedTuple):
    """Something that was not made."""

    seconds: float | None
    """About how long it takes, if that is known."""
    problem: str | None = None
    """What was wrong; None if there was no time for it, or for what it needs."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Accuracy:
    """The finished students of one row."""

    row: Row
    top1_by_seed: Mapping[int, float]
    """In percent."""
    top1: float
    """The mean of `top1_by_seed`."""
    standard_error: float
    num_samples: int
    """Test images."""
    gap: float | None = None
    """The share of the gap that is closed; None if scratch or finetune is missing, or finetune is not better."""
    gap_error: float | None = None
    """The standard error of `gap`."""


def accuracies(study: Study, rows: Sequence[Row]) -> dict[Row, Accuracy]:
    """The accuracy of each row that has finished students."""
    accurate: dict[Row, Accuracy] = {}
    for row in rows:
        scores = {seed: found for seed in seeds_of(study, row) if (found := scores_of(study, row, seed))}
        if scores:
            by_seed = {seed: statistics.fmean(score.top1 for score in found) for seed, found in scores.items()}
            accurate[row] = Accuracy(
                row=row,
                top1_by_seed=by_seed,
                top1=statistics.fmean(by_seed.values()),
                standard_error=standard_error(list(scores.values())),
                num_samples=next(iter(scores.values()))[0].num_samples,
            )
    return {row: _with_gap(one, accurate) for row, one in accurate.items()}


def standard_error(scores: Sequence[Sequence[Score]]) -> float:
    """The standard error of the mean top-1, in percent: over samples (binomial), or over seeds if that is larger.

    All seeds share their test images, so more seeds do not make the first smaller. A few that happen to be alike say
    little about the second.

    Args:
        scores: for each seed one score, or several of the same images, corrupted in other ways: their errors are not
            independent, so the mean of them is as uncertain as each.
    """
    over_samples = statistics.fmean(one.top1_error for own in scores for one in own)
    if len(scores) == 1:
        return over_samples
    over_seeds = statistics.stdev(statistics.fmean(one.top1 for one in own) for own in scores) / math.sqrt(len(scores))
    return max(over_samples, over_seeds)


def gap_closed(
    own: tuple[float, float], scratch: tuple[float, float], finetune: tuple[float, float]
) -> tuple[float, float] | None:
    """(own - scratch) / (finetune - scratch) and its standard error; None if finetune is not better than scratch.

    Args:
        own: an accuracy and its standard error.
        scratch: the same of scratch.
        finetune: the same of finetune.

    The error is propagated to first order, for independent errors, so it is rough where the gap is not several times
    its own error: https://en.wikipedia.org/wiki/Propagation_of_uncertainty
    """
    width = finetune[0] - scratch[0]
    if width <= 0:
        return None
    share = (own[0] - scratch[0]) / width
    return share, math.hypot(own[1], (1 - share) * scratch[1], share * finetune[1]) / width


def _with_gap(one: Accuracy, found: Mapping[Row, Accuracy]) -> Accuracy:
    ends = {mode: _of_mode(found, mode, one.row.images) for mode in ("scratch", "finetune")}
    scratch, finetune = ends["scratch"], ends["finetune"]
    if scratch is None or finetune is None:
        return one
    closed = gap_closed(*((end.top1, end.standard_error) for end in (one, scratch, finetune)))
    if closed is None:
        return one
    # The ends of the gap are 0 and 1 by definition, without an error.
    return replace(one, gap=closed[0], gap_error=None if one in (scratch, finetune) else closed[1])


def _of_mode(found: Mapping[Row, Accuracy], label: str, images: str | None = None) -> Accuracy | None:
    """The row of a mode, on the test images or on other ones."""
    wanted = ("modes", label) if images is None else ("shift", f"{images}: {label}")
    return next((one for row, one in found.items() if (row.step, row.label) == wanted), None)


def cheapest_codec(rows: Sequence[tuple[str, float, Accuracy]], reference: str) -> str | None:
    """The codec of the fewest bytes whose top-1 is at most one standard error (the reference's) below the reference's.

    Args:
        rows: codec, bytes for each view, accuracy.
        reference: the codec that the others are compared with.

    Returns:
        Its name; None if the reference or all others are missing.
    """
    exact = next((one for codec, _, one in rows if codec == reference), None)
    if exact is None or len(rows) < 2:
        return None
    return min((nbytes, codec) for codec, nbytes, one in rows if _is_as_good(one, exact))[1]


def _is_as_good(one: Accuracy, exact: Accuracy) -> bool:
    return one.top1 >= exact.top1 - exact.standard_error


def sentences(study: Study, found: Mapping[Row, Accuracy], left_out: Mapping[str, LeftOut]) -> list[str]:
    """What the numbers say, and what is missing."""
    said: list[str] = []
    for mode in ("copy", "distill"):
        cached, live = _of_mode(found, mode), _of_mode(found, f"{mode}, live teacher")
        if cached is not None and live is not None:
            mean, error = difference(cached, live)
            judged = "the same within one standard error" if abs(mean) <= error else "more than one standard error"
            said.append(f"{mode}, cached - live teacher: {mean:+.2f} ± {error:.2f}, {judged}.")
    said += _about_codecs(study, codec_sizes(study, found))
    for name in (*study.shift, *study.corrupt):
        kept = [
            f"{mode} {on_these.top1 / usual.top1:.0%}"
            for mode in ("scratch", "copy", "distill", "finetune")
            if (usual := _of_mode(found, mode)) and (on_these := _of_mode(found, mode, name)) and usual.top1
        ]
        if kept:
            said.append(f"{name}: top-1 as a share of that on the usual test images: {', '.join(kept)}.")
    said += _about_tuning(study)
    return said + _about_left_out(left_out)


def _about_left_out(left_out: Mapping[str, LeftOut]) -> list[str]:
    late = {name: one.seconds for name, one in left_out.items() if one.problem is None}
    said = [f"Failed: {name}: {one.problem}" for name, one in left_out.items() if one.problem is not None]
    if late:
        seconds = sum(one for one in late.values() if one is not None)
        about = "about" if None not in late.values() else "more than"
        number = f"{len(late)} command{'s' * (len(late) > 1)}"
        said.append(
            f"Left out, because --minutes was too short or what they need was left out: {number}, first "
            f"{next(iter(late))}; paper.json names all. The same command needs {about} {in_minutes(seconds)} more."
        )
    return said


def in_minutes(seconds: float) -> str:
    """A time as a person says it."""
    return f"{seconds / 60:,.1f} minutes" if seconds >= 30 else f"{seconds:.1f} seconds"


def _about_codecs(study: Study, sizes: Sequence[tuple[str, float, Accuracy]]) -> list[str]:
    """Which codec could be the default, and what speaks against it."""
    reference = study.codecs[0]
    if (cheapest := cheapest_codec(sizes, reference)) is None:
        return []
    said = [f"The cheapest codec within one standard error of {reference} is {cheapest}."]
    by_codec = {codec: (nbytes, one) for codec, nbytes, one in sizes}
    exact, limit = by_codec[reference][1], by_codec[cheapest][0]
    if worse := [codec for codec, (nbytes, one) in by_codec.items() if nbytes > limit and not _is_as_good(one, exact)]:
        said.append(f"But {', '.join(worse)} is larger and not within it: more seeds are needed to tell.")
    if missing := [codec for codec in study.codecs if codec not in by_codec]:
        said.append(f"These codecs are missing: {', '.join(missing)}.")
    return said


def _about_tuning(study: Study) -> list[str]:
    """What tuning found, and which modes were not tuned."""
    said: list[str] = []
    for mode in study.tune:
        scores = tuned(study, mode)
        tries = ", ".join(f"{one}: {score.top1:.1f}" for one, score in scores.items())
        diverged = [str(one) for one in given_up(study, mode)]
        missing = len(recipes_to_try(study, mode)) - len(scores) - len(diverged)
        said.append(
            f"{mode} was tuned on {study.held_out:,} held-out training images: {tries or 'nothing is finished'}."
            + (f" The loss became NaN or infinite with {'; '.join(diverged)}." if diverged else "")
            + (f" {missing} recipes are missing." if missing else "")
        )
    if study.tune and "distill" not in study.tune:
        said.append("distill was not tuned: it takes copy's recipe.")
    if study.tune and "finetune" not in study.tune:
        said.append("finetune was not tuned.")
    return said


def difference(one: Accuracy, other: Accuracy) -> tuple[float, float]:
    """The difference of two rows and its standard error: seed by seed if both have the same several seeds."""
    if len(one.top1_by_seed) > 1 and one.top1_by_seed.keys() == other.top1_by_seed.keys():
        differences = [top1 - other.top1_by_seed[seed] for seed, top1 in one.top1_by_seed.items()]
        return statistics.fmean(differences), statistics.stdev(differences) / math.sqrt(len(differences))
    return one.top1 - other.top1, math.hypot(one.standard_error, other.standard_error)


def codec_sizes(study: Study, found: Mapping[Row, Accuracy]) -> list[tuple[str, float, Accuracy]]:
    """Codec, bytes for each view and accuracy of the finished rows that compare codecs.

    Whoever has no room deletes the caches of finished rows: their sizes stay in the report.
    """
    file = study.out / REPORT_FILE
    kept: dict[str, float] = json.loads(file.read_text()).get(NBYTES, {}) if file.exists() else {}
    sizes: list[tuple[str, float, Accuracy]] = []
    for row, one in found.items():
        if row.step == "codecs":
            path = cache_path(study, row.students[0].maps, "train")
            complete = CacheRecord.of(CacheReader(path)).complete if path.exists() else None
            nbytes = complete.nbytes / complete.num_stored if complete is not None else kept.get(row.label)
            if nbytes is not None:
                sizes.append((row.label, nbytes, one))
    return sizes
