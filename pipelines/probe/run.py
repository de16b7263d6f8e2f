"""Probe: train pairs of students, one with the teacher's attention and one without, and compare them.

caches -> time a few steps -> what fits into the time -> pairs -> the difference. Everything is kept in the folder:
the same command continues, and more seeds add pairs.
"""

from __future__ import annotations

import json
import shutil
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from atcache.cache.differences import find_differences, name_differences
from atcache.choices import Mode
from atcache.errors import CacheMismatchError, ConfigError
from atcache.fields import JsonFields
from atcache.files.durable import encode_json, write_file
from atcache.teachers.verdict import TeacherVerdict

from ..running.metrics import read_metrics
from ..running.run_files import WEIGHTS_FILE
from ..running.run_folder import read_record, run_folder
from ..running.run_record import read_run
from ..train.run import train
from ..train.student_run import LOG_EVERY
from ..train.summary import TrainSummary
from .caches import ProbeCaches, open_probe_caches, remove_built_caches
from .config import CACHE_OPTIONS, ProbeConfig
from .difference import Answer, Difference, in_words, is_near_chance, paired_difference
from .schedule import PairSpeed, Schedule, fit_schedule, fit_seeds

PROBE_FILE = "probe.json"
"""What the probe in a folder is: its options, its schedule, and the speed that was measured."""
RESULT_FILE = "result.json"
_TIMED_STEPS = LOG_EVERY, 2 * LOG_EVERY
"""Time is measured between these two: the first steps also start workers and fill caches."""
_TIMING = "timing"
_RUNS = "runs"
"""The folder of all students. Before it is there, other options may replace those of the probe."""

Say = Callable[[str], None]


@dataclass(frozen=True, kw_only=True, slots=True)
class Pair(JsonFields):
    """Two students of one seed: top-1 in percent on the validation images."""

    seed: int
    transfer: float
    """Of the student with the teacher's attention."""
    scratch: float
    """Of the student without."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ProbeResult(JsonFields):
    """What a probe found."""

    out: str
    mode: str
    answer: Answer
    """"works", "fails" or "undecided"."""
    sentence: str
    """The answer in words, with its uncertainty."""
    difference: Difference
    """In percentage points of top-1."""
    pairs: tuple[Pair, ...]
    verdict: TeacherVerdict
    """What was known of the teacher before."""
    steps: int
    """Of each run."""
    num_samples: int
    """That each student was trained on."""
    num_val_images: int
    num_classes: int
    """Classes that its samples are of."""
    notes: tuple[str, ...]
    """What the user should know about how the numbers came about."""
    seconds: float
    """Time of this call."""


def probe(config: ProbeConfig, say: Say = lambda _: None) -> ProbeResult:
    """Train pairs of students and compare them; the same call continues a probe that was stopped.

    Args:
        config: what to compare.
        say: called with a line on what is being done.

    Raises:
        CacheMismatchError: the folder holds a probe with other options.
        ConfigError: the folder holds something else, there are too few images, or there is not time enough.
        AtcacheError: what building and training raise.
    """
    start_s = time.monotonic()
    _check_folder(config)
    with run_folder(config.out):
        stored = _keep_settings(config)
        caches = open_probe_caches(config)
        for line in filter(None, (caches.verdict.line, caches.verdict.warning)):
            say(line)
        schedule, notes = _schedule(config, caches, stored, say)
        summaries = [_train_pair(config, caches, seed, schedule, say) for seed in range(schedule.seeds)]
        notes += _note_on_looks(config, schedule.seeds)
        result = _result(config, caches, schedule, summaries, notes, start_s)
        write_file(config.out / RESULT_FILE, encode_json(result.to_json()))
    return result


def _check_folder(config: ProbeConfig) -> None:
    """Refuse a folder that holds something else."""
    out = config.out
    is_used = out.is_dir() and any(path.name[0] != "." for path in out.iterdir())
    if is_used and not (out / PROBE_FILE).exists():
        raise ConfigError(f"{out} holds something else than a probe: there is no {PROBE_FILE}. Give another --out.")


def _keep_settings(config: ProbeConfig) -> dict[str, Any]:
    """The record of the probe in the folder; a new one if there is none, or if it has trained no pair yet."""
    file = config.out / PROBE_FILE
    asked = json.loads(encode_json(config.settings()))
    stored = read_record(file)
    if stored is not None:
        before: dict[str, Any] = stored.get("settings") or {}
        changed = find_differences(before, asked)
        if not changed:
            return stored
        if (config.out / _RUNS).exists():
            raise CacheMismatchError(
                f"{config.out} holds another probe: {'; '.join(name_differences(before, asked))}. Give another --out, "
                "or the same options."
            )
        if set(changed) & set(CACHE_OPTIONS):
            remove_built_caches(config.out)
    stored = {"settings": asked}
    write_file(file, encode_json(stored))
    return stored


def _schedule(
    config: ProbeConfig, caches: ProbeCaches, stored: dict[str, Any], say: Say
) -> tuple[Schedule, tuple[str, ...]]:
    """What is trained in the time there is, and notes if that is less than was asked for."""
    if "speed" in stored:
        speed, steps = PairSpeed.from_json(stored["speed"]), int(stored["steps"])
        num_done = sum(_is_finished(config, seed) for seed in range(config.seeds))
        seeds = fit_seeds(speed, steps=steps, seeds=config.seeds, num_done=num_done, minutes=config.minutes)
        schedule = Schedule(steps=steps, seeds=max(seeds, num_done))
    else:
        say(f"timing {_TIMED_STEPS[1]} steps of {config.mode} and of scratch")
        speed = _measure(config, caches)
        schedule = fit_schedule(speed, steps=config.steps, seeds=config.seeds, minutes=config.minutes)
        record = {**stored, "speed": speed.to_json(), "steps": schedule.steps}
        write_file(config.out / PROBE_FILE, encode_json(record))
    minutes = schedule.seeds * speed.seconds(schedule.steps) / 60
    say(f"{schedule.seeds} pairs of {schedule.steps} steps: about {minutes:.2g} minutes in all")
    notes: list[str] = []
    if schedule.seeds < config.seeds:
        notes.append(
            f"{schedule.seeds} of {config.seeds} pairs fit into --minutes {config.minutes:g}. The same command again "
            "adds more."
        )
    if schedule.steps < config.steps:
        notes.append(
            f"The runs have {schedule.steps} instead of {config.steps} steps, to fit into the minutes that the first "
            "call had. For longer runs, give another --out and more --minutes."
        )
    return schedule, tuple(notes)


def _note_on_looks(config: ProbeConfig, num_pairs: int) -> tuple[str, ...]:
    """A note if pairs were added to a probe that had an answer; remembers that there is one for so many pairs."""
    stored: dict[str, Any] = read_record(config.out / PROBE_FILE) or {}
    looks = sorted({*stored.get("looks", []), num_pairs})
    write_file(config.out / PROBE_FILE, encode_json({**stored, "looks": looks}))
    if looks[0] >= num_pairs:
        return ()
    before = ", ".join(map(str, looks[: looks.index(num_pairs)]))
    return (
        f"There was an answer after {before} pairs already. Whoever adds pairs until there is another one finds a "
        "difference more often than the interval says: where there is none, in 15% to 30% of probes instead of 5%.",
    )


def _measure(config: ProbeConfig, caches: ProbeCaches) -> PairSpeed:
    """Time a few steps of both kinds of student; what they learn is thrown away."""
    step_s = rest_s = 0.0
    folder = config.out / _TIMING
    shutil.rmtree(folder, ignore_errors=True)
    modes: tuple[Mode, Mode] = (config.mode, "scratch")
    first, last = _TIMED_STEPS
    for mode in modes:
        start_s = time.monotonic()
        train(_training(config, caches, mode, 0, folder / mode, last))
        took_s = time.monotonic() - start_s
        rows = read_metrics(folder / mode, "train")
        seconds = {int(row["step"]): row["step"] * config.batch_size / row["img_per_s"] for row in rows}
        one_s = (seconds[last] - seconds[first]) / (last - first)
        step_s, rest_s = step_s + one_s, rest_s + max(0.0, took_s - last * one_s)
    shutil.rmtree(folder)
    return PairSpeed(step_s=step_s, rest_s=rest_s)


def _training(config: ProbeConfig, caches: ProbeCaches, mode: Mode, seed: int, out: Path, steps: int) -> Any:  # noqa: ANN401 - TrainConfig
    return config.training(mode, seed, out, steps=steps, subset=caches.subset, caches=(caches.train, caches.val))


def _run_of(config: ProbeConfig, mode: str, seed: int) -> Path:
    return config.out / _RUNS / f"{mode}-{seed}"


def _is_finished(config: ProbeConfig, seed: int) -> bool:
    return all((_run_of(config, mode, seed) / WEIGHTS_FILE).exists() for mode in (config.mode, "scratch"))


def _train_pair(
    config: ProbeConfig, caches: ProbeCaches, seed: int, schedule: Schedule, say: Say
) -> tuple[TrainSummary, TrainSummary]:
    """Train both students of a seed, or read what they were."""
    was_there = _is_finished(config, seed)
    ours, theirs = (
        train(_training(config, caches, mode, seed, _run_of(config, mode, seed), schedule.steps))
        for mode in (config.mode, "scratch")
    )
    say(
        f"seed {seed}: {config.mode} {_top1(ours):.2f}%, scratch {_top1(theirs):.2f}%"
        f"{' (trained before)' if was_there else ''}"
    )
    return ours, theirs


def _top1(summary: TrainSummary) -> float:
    assert summary.validation is not None, "all runs are validated"
    return summary.validation.top1


def _result(
    config: ProbeConfig,
    caches: ProbeCaches,
    schedule: Schedule,
    summaries: list[tuple[TrainSummary, TrainSummary]],
    notes: tuple[str, ...],
    start_s: float,
) -> ProbeResult:
    pairs = tuple(
        Pair(seed=seed, transfer=_top1(ours), scratch=_top1(theirs)) for seed, (ours, theirs) in enumerate(summaries)
    )
    validation = summaries[0][0].validation
    assert validation is not None, "all runs are validated"
    ours, theirs = [pair.transfer for pair in pairs], [pair.scratch for pair in pairs]
    found = paired_difference(ours, theirs, validation.num_samples)
    num_classes = caches.num_classes
    num_outputs = read_run(_run_of(config, "scratch", 0)).record.num_classes
    if config.cache is None and num_classes < num_outputs:  # of small caches that were built
        notes += (
            f"The samples are of {num_classes:,} of the {num_outputs:,} classes, so that each has several. More "
            "--samples take more classes.",
        )
    if is_near_chance(ours, theirs, num_classes):
        notes += (
            f"Both kinds of student are near chance ({100 / num_classes:.3g}%; {config.mode} "
            f"{statistics.fmean(ours):.3g}%, scratch {statistics.fmean(theirs):.3g}%), so the difference says little. "
            "Give another --out, and more --steps, more --samples or another --base-lr.",
        )
    return ProbeResult(
        out=str(config.out),
        mode=config.mode,
        answer=found.answer,
        sentence=in_words(found, config.mode, config.seeds),
        difference=found,
        pairs=pairs,
        verdict=caches.verdict,
        steps=schedule.steps,
        num_samples=caches.num_samples,
        num_val_images=validation.num_samples,
        num_classes=num_classes,
        notes=notes,
        seconds=time.monotonic() - start_s,
    )
