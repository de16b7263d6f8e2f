"""The paper's whole table, on your teacher and images: modes, ensembles, codecs, views, layers, heads, q and k, shift.

    python benchmarks/paper.py --out FOLDER --teacher vit_small_patch14_dinov2:img_size=112 --weights FILE \\
        --data 'cifar10/train-{000000..000009}.tar' --val-data 'cifar10/test-{000000..000001}.tar' --minutes 600

It runs the commands of atcache, the most important first, and continues what an earlier call left unfinished. It begins
nothing that would not be finished within `--minutes`, except the first command. Every number in its table is what a
command wrote: the summary of a run, or an evaluation.

All students see the same views of the same labelled images, in the same number of steps. `--tune` chooses learning
rates (and with several `--init-values`, the start of LayerScale) for scratch and copy alike, on training images that no
student gets.

A folder of an earlier call is continued. `--out FOLDER --report` makes nothing, and shows what is finished of that.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from paper_report import write_report
from paper_results import LeftOut, in_minutes
from paper_steps import (
    STEPS,
    Job,
    Maps,
    Recipe,
    Row,
    cache_jobs,
    cache_path,
    jobs_of,
    num_labelled,
    rows_of,
    seeds_of,
    timing_job,
)
from paper_study import Study, keep_study, read_study
from paper_tuning import choose_recipes, tuning_jobs
from rich.console import Console

from atcache.cache.record import CacheRecord
from atcache.choices import MODES, PRECISIONS, Mode
from atcache.errors import AtcacheError
from atcache.files.durable import encode_json, write_file
from atcache.store.reader import CacheReader
from atcache.views.corrupt import GROUPS, NAMES, parse_corruptions

CODECS = ("exact", *(f"transform:target_kl={kl}" for kl in (0.005, 0.02, 0.1, 0.5)))
_BASE_LR = 2e-3
_LRS_TO_TRY = (1e-3, 2e-3, 4e-3)
_LIVE_COST = 1.5
"""About how much longer a step with a live teacher takes, until one is timed."""
_MARGIN = 1.2
"""Estimates are taken so much longer: a job that is late would break the limit."""
_FIXED = 0.5
"""The share of a job's time that a smaller one is assumed to need, too: models are loaded, codecs are measured."""


@dataclass(kw_only=True, slots=True)
class Clock:
    """The time that is left, and how long jobs take: measured in this call, or in earlier ones of the same study."""

    file: Path
    """Keeps images and seconds of the last job of each kind."""
    limit_s: float
    start_s: float = field(default_factory=time.monotonic)
    has_begun: bool = False
    """Whether a job was begun in this call."""

    def knows(self, kind: str) -> bool:
        """Whether a job of this kind was timed."""
        return kind in self._read()

    def seconds_of(self, job: Job) -> float | None:
        """An estimate, from jobs of the same kind or of others that take longer; None if none of them was timed."""
        known = self._read()
        kinds = [job.kind] if job.kind in known else self._similar(job.kind, known)
        factor = _LIVE_COST if job.kind not in known and job.kind.endswith("live") else 1
        estimates = [known[kind][1] * max(_FIXED, job.num_images / known[kind][0]) for kind in kinds]
        return factor * max(estimates) if estimates else None

    @staticmethod
    def _similar(kind: str, known: Mapping[str, tuple[float, float]]) -> list[str]:
        first = kind.split()[0]
        for start in ("train", "build") if first == "eval" else (first,):
            if found := [other for other in known if other.startswith(start)]:
                return found
        return []

    def left_s(self) -> float:
        """Seconds until the limit."""
        return max(0.0, self.start_s + self.limit_s - time.monotonic())

    def allows(self, seconds: float | None) -> bool:
        """Whether a job of about so many seconds can be begun. The first one always can."""
        return not self.has_begun or (seconds is not None and _MARGIN * seconds <= self.left_s())

    def keep(self, kind: str, num_images: float, seconds: float) -> None:
        """Remember how long a job took."""
        write_file(self.file, encode_json({**self._read(), kind: (num_images, seconds)}))

    def _read(self) -> dict[str, tuple[float, float]]:
        return json.loads(self.file.read_text()) if self.file.exists() else {}


@dataclass(kw_only=True, slots=True)
class Runner:
    """Runs jobs while there is time."""

    study: Study
    clock: Clock
    console: Console
    left_out: dict[str, LeftOut] = field(default_factory=dict[str, LeftOut])
    """What was not run, by its name."""

    def run(self, jobs: Sequence[Job]) -> bool:
        """Run what is not finished, in this order; whether all is finished now."""
        for job in jobs:
            if job.is_done:
                continue
            name = self._name(job.path)
            if not job.missing and (timing := self._timing_for(job)) is not None:
                self._run_one(timing, self._name(timing.path), None)
            seconds = self.clock.seconds_of(job)
            if job.missing or not self.clock.allows(seconds):
                self.left_out[name] = LeftOut(seconds)
            else:
                self._run_one(job, name, seconds)
        return all(job.is_done for job in jobs)

    def _timing_for(self, job: Job) -> Job | None:
        """A few steps that say how long a training takes; None if this is known, or there is no time left for them."""
        if not self.clock.has_begun or not self.clock.left_s() or self.clock.knows(job.kind):
            return None
        timing = timing_job(self.study, job)
        seconds = None if timing is None else self.clock.seconds_of(timing)
        return timing if seconds is None or self.clock.allows(seconds) else None

    def _run_one(self, job: Job, name: str, seconds: float | None) -> None:
        about = "" if seconds is None else f", about {in_minutes(seconds)}"
        left = in_minutes(self.clock.left_s())
        self.console.print(f"{job.kind}: {name}{about}; {left} left", highlight=False, soft_wrap=True)
        self.clock.has_begun = True
        try:
            took = job.run()
        except AtcacheError as error:
            self.left_out[name] = LeftOut(seconds, str(error))
            self.console.print(f"{name}: {error}", style="red", highlight=False, markup=False, soft_wrap=True)
            return
        self.left_out.pop(name, None)
        if took is not None:
            self.clock.keep(job.kind, *took)

    def _name(self, path: Path) -> str:
        return str(path.relative_to(self.study.out))


def main(arguments: Sequence[str] | None = None) -> None:
    """Make what is missing while there is time; write and print the table."""
    console = Console(stderr=True)
    try:
        study, limit_s = parse(arguments)
        text = make(study, limit_s, console)
    except AtcacheError as error:
        sys.exit(f"paper.py: {error}")
    print(text)


def make(study: Study, limit_s: float | None, console: Console) -> str:
    """Make what is missing in at most `limit_s` seconds, nothing if it is None; returns the report."""
    if limit_s is not None:
        for data in (study.val_data, *study.shift.values()):
            num_labelled(data)  # tars that are not there are named now, not after hours
        for text in study.corrupt:
            parse_corruptions(text)
        keep_study(study)
    runner = Runner(study=study, clock=Clock(file=study.out / "times.json", limit_s=limit_s or 0), console=console)
    runner.clock.has_begun = limit_s is None
    maps = Maps(study.views, study.codec)
    if not runner.run(cache_jobs(study, maps)):
        return write_report(study, [], None, runner.left_out)
    if study.tune:
        runner.run(tuning_jobs(study))
    recipes = choose_recipes(study)
    rows = _rows(study)
    if recipes is None:
        runner.left_out["all rows"] = LeftOut(None, "the recipes are not tuned yet.")
    else:
        _make_rows(runner, rows, recipes)
    return write_report(study, rows, recipes, runner.left_out)


def _rows(study: Study) -> list[Row]:
    geometry = CacheRecord.of(CacheReader(cache_path(study, Maps(study.views, study.codec), "train"))).geometry
    return rows_of(study, len(geometry.layers), len(geometry.heads))


def _make_rows(runner: Runner, rows: Sequence[Row], recipes: Mapping[Mode, Recipe]) -> None:
    """Step by step, and within a step seed by seed, so that rows have as many seeds if time ends."""
    study = runner.study
    for step in dict.fromkeys(row.step for row in rows):
        runner.console.rule(STEPS[step])
        of_step = [row for row in rows if row.step == step]
        for seed in range(max(study.seeds, study.side_seeds)):
            for row in of_step:
                if seed in seeds_of(study, row):
                    runner.run(list(jobs_of(study, row, seed, recipes)))
        write_report(study, rows, recipes, runner.left_out)  # for those who look, and if it is killed


def parse(arguments: Sequence[str] | None) -> tuple[Study, float | None]:
    """The study, and its limit in seconds; None if only a report is wanted."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add, lrs = parser.add_argument, " ".join(f"{lr:g}" for lr in _LRS_TO_TRY)
    add("--out", type=Path, required=True, help="folder for caches, runs and results")
    add("--report", action="store_true", help="make nothing, show what is finished in --out; takes no other option")
    add("--teacher", help="as in `atcache build` (needed)")
    add("--weights", type=Path, help="the teacher's weights")
    add("--data", help="tars of training images with labels (needed)")
    add("--val-data", help="tars of test images with labels (needed)")
    add("--minutes", type=float, help="begin nothing that would end later (needed)")
    add("--labels", type=int, default=1000, help="labelled images for students (default 1000)")
    add("--val-samples", type=int, default=1000, help="test images (default 1000)")
    add("--held-out", type=int, default=1000, help="training images that --tune compares on (default 1000)")
    add("--views", type=int, default=8, help="views where they are not compared (default 8)")
    add("--policy", choices=("crop-flip", "randaug"), default="crop-flip", help="how views are drawn")
    add("--mixup", type=float, default=0.0, help="as in `atcache build`; fine-tuning of MAE has 0.8 (default 0)")
    add("--cutmix", type=float, default=0.0, help="as in `atcache build`; fine-tuning of MAE has 1 (default 0)")
    add("--codec", default=CODECS[1], help=f"where codecs are not compared (default {CODECS[1]})")
    add("--codecs", nargs="+", default=CODECS, help=f"to compare with the first (default {' '.join(CODECS)})")
    add("--view-counts", type=int, nargs="*", default=[1, 2, 4, 8], help="to compare (default 1 2 4 8)")
    add("--shift", nargs="*", default=[], metavar="NAME=TARS", help="other test images of the same classes")
    add("--corrupt", nargs="*", default=[], metavar="NAME[:SEVERITY]", help="corrupted test images, such as noise:3")
    add("--epochs", type=float, default=30, help="of all students (default 30)")
    add("--batch-size", type=int, default=64)
    add(
        "--base-lr",
        type=float,
        nargs="+",
        help=f"for 256 images in a step (default {_BASE_LR:g}; --tune tries several, by default {lrs})",
    )
    add("--finetune-lr", type=float, nargs="+", help="the same for finetune")
    add("--init-values", type=float, nargs="+", default=[None], help="start of LayerScale; several are tried by --tune")
    add("--layer-decay", type=float, default=0.75, help="for finetune (default 0.75)")
    add("--drop-path", type=float, default=0.05)
    add("--label-smoothing", type=float, default=0.1)
    add("--tune", nargs="*", choices=MODES, metavar="MODE", help="choose recipes of these (default scratch copy)")
    add("--seeds", type=int, default=1, help="students of each mode, ensemble and shift (default 1)")
    add("--side-seeds", type=int, default=1, help="students of each other row (default 1)")
    add("--workers", type=int, default=0)
    add("--keep-mib", type=int, default=1024, help="as in `atcache train` (default 1024)")
    add("--device", default="auto")
    add("--precision", choices=PRECISIONS, default="auto")
    options = parser.parse_args(arguments)
    given = [name for name, value in vars(options).items() if value != parser.get_default(name)]
    if options.report:
        if len(given) > len(("out", "report")):
            parser.error("--report shows the study in --out as it was asked for: give no other option.")
        return read_study(options.out), None
    if missing := [name for name in ("teacher", "data", "val_data", "minutes") if name not in given]:
        parser.error(f"--{missing[0].replace('_', '-')} is missing. Give it, or only --out and --report.")
    tune = () if options.tune is None else tuple(dict.fromkeys(options.tune or ("scratch", "copy")))
    base_lrs = tuple(options.base_lr or (_LRS_TO_TRY if tune else (_BASE_LR,)))
    finetune_lrs = tuple(options.finetune_lr or (base_lrs if "finetune" in tune else (_BASE_LR,)))
    if max(len(base_lrs), len(options.init_values)) > 1 and not {"scratch", "copy"} <= set(tune):
        parser.error("several --base-lr or --init-values are for --tune, of scratch and copy alike. Give one of each.")
    if len(finetune_lrs) > 1 and "finetune" not in tune:
        parser.error("several --finetune-lr are for --tune. Give one, or --tune scratch copy finetune.")
    values: dict[str, Any] = {
        **vars(options),
        "tune": tune,
        "held_out": options.held_out if tune else 0,
        "base_lrs": base_lrs,
        "finetune_lrs": finetune_lrs,
        "init_values": tuple(options.init_values),
        "codecs": tuple(options.codecs),
        "view_counts": tuple(options.view_counts),
        "shift": _named_tars(parser, options.shift),
        "corrupt": tuple(options.corrupt),
    }
    study = Study(**{one.name: values[one.name] for one in fields(Study)})
    return study, 60 * options.minutes


def _named_tars(parser: argparse.ArgumentParser, given: Sequence[str]) -> dict[str, str]:
    named: dict[str, str] = {}
    for text in given:
        name, _, tars = text.partition("=")
        # Files have it in their names, beside those of the other images.
        is_taken = re.match(r"(train|test|held-out)\b", name) or name.partition("-")[0] in (*NAMES, *GROUPS, "all")
        if not (tars and re.fullmatch(r"\w[\w.-]*", name)) or is_taken or name in named:
            parser.error(
                f"--shift {text}: expected NAME=TARS. A name has letters, digits, dots, - and _ only, comes once, and "
                "does not begin with train, test, held-out or the name of a corruption."
            )
        named[name] = tars
    return named


if __name__ == "__main__":
    main()
