"""How much fidelity copy needs: the accuracy of copying students on digits, by the KL of the maps they copy.

    python benchmarks/fidelity.py --out FOLDER [--seeds 5] [--codec exact --codec int8 ...]

Students use the demo's teacher, its 100 labels and its recipe. Only the codec differs, in the caches for training and
for validation. The other codecs are compared with the first one, seed by seed: a seed fixes a student's initial
weights, its labelled digits and their order. It prints a table, and the largest KL up to which copy is never worse by
more than two standard errors of the paired difference. It writes FOLDER/fidelity.json, .md and .png.

A folder of an earlier run is continued: finished caches and students are not made again.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import statistics
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch

import atcache
from atcache.cache.record import CacheRecord
from atcache.codecs.fidelity import row_kl
from atcache.pipelines.build.config import BuildConfig
from atcache.pipelines.build.run import build
from atcache.pipelines.demo.config import DemoConfig
from atcache.pipelines.demo.run import TEACHER, student_config, write_digits
from atcache.pipelines.evaluate.config import EvaluateConfig
from atcache.pipelines.evaluate.run import evaluate
from atcache.pipelines.train.run import train
from atcache.store.reader import CacheReader
from atcache.students.teacher_side import CachedFactors

CODECS = ("exact", *(f"transform:target_kl={kl}" for kl in (0.001, 0.005, 0.02, 0.1, 0.5)))
"""The default of `--codec`. The first is the reference."""
STANDARD_ERRORS = 2
_SMALLEST_PLOTTED_KL = 1e-6
_KL_BATCH = 64  # how many views' maps are formed at a time


@dataclass(frozen=True, kw_only=True, slots=True)
class Accuracy:
    """The accuracy of copying students with one codec."""

    codec: str
    row_kl_nats: float
    """Mean KL of the validation maps from those of the reference codec."""
    nbytes_per_view: float
    """The size of the whole training cache, divided by its views."""
    top1_per_seed: tuple[float, ...]
    """Validation accuracy in percent."""
    top1: float
    """The mean of `top1_per_seed`."""
    standard_error: float
    """The standard error of `top1`."""
    difference: float
    """`top1` minus that of the reference."""
    difference_standard_error: float
    """The standard error of the differences seed by seed."""

    @property
    def is_worse(self) -> bool:
        """Whether accuracy is lower than the reference's by more than `STANDARD_ERRORS` standard errors."""
        return self.difference < -STANDARD_ERRORS * self.difference_standard_error


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The parsed options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for caches, runs and results")
    parser.add_argument("--seeds", type=int, default=5, help="students for each codec, at least 2 (default 5)")
    parser.add_argument("--codec", action="append", help=f"may be repeated (default {', '.join(CODECS)})")
    parser.add_argument("--steps", type=int, help="optimiser steps, fewer than the demo's, for a quick try")
    options = parser.parse_args(arguments)
    if options.seeds < 2:
        parser.error("--seeds: one seed has no standard error; expected at least 2.")
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    """Build the caches, train the students, print and write the results."""
    options = parse(arguments)
    torch.set_num_threads(1)
    tars = write_digits(options.out / "digits")
    results: list[Accuracy] = []
    for codec in options.codec or CODECS:
        results.append(measure(codec, options.out, tars, options.seeds, options.steps, results[:1]))
        print(f"{codec}: {results[-1].top1:.1f} at KL {results[-1].row_kl_nats:.2g}", file=sys.stderr)
    text = table(results)
    print(text)
    report = {
        "results": [{**asdict(result), "is_worse": result.is_worse} for result in results],
        "largest_kl_not_worse": largest_kl_not_worse(results),
    }
    (options.out / "fidelity.json").write_text(json.dumps(report, indent=1) + "\n")
    (options.out / "fidelity.md").write_text(text + "\n")
    draw(results, options.out / "fidelity.png")


def measure(
    codec: str, out: Path, tars: tuple[Path, Path], seeds: int, steps: int | None, reference: Sequence[Accuracy]
) -> Accuracy:
    """Build both caches with a codec, and train its students. `reference` is empty for the first codec."""
    config = DemoConfig(out=out / _folder_name(codec), codec=codec)
    for name, tar in zip(("train", "val"), tars, strict=True):
        build(
            BuildConfig(
                teacher=TEACHER,
                data=str(tar),
                out=config.out / f"{name}.zarr",
                policy="eval",
                codec=codec,
                workers=0,
            )
        )
    top1s = tuple(_copy_top1(config, seed, steps) for seed in range(seeds))
    differences = [
        own - other for own, other in zip(top1s, reference[0].top1_per_seed if reference else top1s, strict=True)
    ]
    complete = CacheRecord.of(CacheReader(config.out / "train.zarr")).complete
    assert complete is not None, "the build has finished"
    reference_out = out / _folder_name(reference[0].codec) if reference else config.out
    return Accuracy(
        codec=codec,
        row_kl_nats=mean_kl(reference_out / "val.zarr", config.out / "val.zarr"),
        nbytes_per_view=complete.nbytes / complete.num_stored,
        top1_per_seed=top1s,
        top1=statistics.fmean(top1s),
        standard_error=_standard_error(top1s),
        difference=statistics.fmean(differences),
        difference_standard_error=_standard_error(differences),
    )


def _copy_top1(config: DemoConfig, seed: int, steps: int | None) -> float:
    training = student_config(config, "copy", seed, None)
    train(training if steps is None else replace(training, steps=steps))
    return evaluate(EvaluateConfig(runs=(training.out,), cache=config.out / "val.zarr")).score.top1


def _standard_error(values: Sequence[float]) -> float:
    return statistics.stdev(values) / math.sqrt(len(values))


def _folder_name(codec: str) -> str:
    return re.sub(r"[^\w.]+", "-", codec)


def mean_kl(reference: Path, other: Path) -> float:
    """Mean row KL, in nats, from the maps of one cache to those of another with the same views."""
    paths = (reference, other)
    readers, coders = [CacheReader(path) for path in paths], [atcache.open(path).coder for path in paths]
    num_samples, blocks = readers[0].layout.num_samples, coders[0].geometry.layers
    kl_sum = 0.0
    for start in range(0, num_samples, _KL_BATCH):
        samples = range(start, min(start + _KL_BATCH, num_samples))
        decoders = [
            CachedFactors(coder, torch.from_numpy(np.stack([reader.read_codes(0, sample) for sample in samples])))
            for reader, coder in zip(readers, coders, strict=True)
        ]
        for block in blocks:
            kl_sum += float(row_kl(*(decoder.layer(block) for decoder in decoders)).mean()) * len(samples)
    return max(0.0, kl_sum / num_samples / len(blocks))


def largest_kl_not_worse(results: Sequence[Accuracy]) -> float | None:
    """The largest KL up to which no codec is worse than the reference; None if even the smallest KL is worse."""
    ordered = sorted(results[1:], key=lambda result: result.row_kl_nats)
    first_worse = next((number for number, result in enumerate(ordered) if result.is_worse), len(ordered))
    return ordered[first_worse - 1].row_kl_nats if first_worse else None


def table(results: Sequence[Accuracy]) -> str:
    """The results, as markdown."""
    lines = [
        "| maps stored as | bytes a view | mean KL | copy, top-1 | each seed | difference, seed by seed | |",
        "|---|--:|--:|--:|---|--:|---|",
    ]
    for number, result in enumerate(results):
        seeds = ", ".join(f"{top1:.1f}" for top1 in result.top1_per_seed)
        difference = f"{result.difference:+.2f} ± {result.difference_standard_error:.2f}" if number else ""
        lines.append(
            f"| {result.codec} | {result.nbytes_per_view:,.0f} | {result.row_kl_nats:.2g} "
            f"| {result.top1:.1f} ± {result.standard_error:.1f} | {seeds} | {difference} "
            f"| {'worse' if result.is_worse else ''} |"
        )
    largest = largest_kl_not_worse(results)
    lines += ["", "± is one standard error of the mean over seeds."]
    if largest is None:
        lines.append(f"Every codec is worse than {results[0].codec} by more than {STANDARD_ERRORS} standard errors.")
    else:
        lines.append(
            f"Up to a KL of {largest:.2g}, copy is not worse than with {results[0].codec} by more than "
            f"{STANDARD_ERRORS} standard errors."
        )
    return "\n".join(lines)


def draw(results: Sequence[Accuracy], path: Path) -> None:
    """Plot accuracy against KL: each seed is a dot, the reference a band of two standard errors."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    reference, others = results[0], sorted(results[1:], key=lambda result: result.row_kl_nats)
    margin = STANDARD_ERRORS * reference.standard_error
    axes.axhline(reference.top1, color="C0", label=f"{reference.codec}, ± {STANDARD_ERRORS} standard errors")
    axes.axhspan(reference.top1 - margin, reference.top1 + margin, color="C0", alpha=0.15)
    kls = [max(result.row_kl_nats, _SMALLEST_PLOTTED_KL) for result in others]
    errors = [STANDARD_ERRORS * result.standard_error for result in others]
    axes.errorbar(kls, [result.top1 for result in others], errors, color="C1", marker="o", capsize=4, label="copy")
    for kl, result in zip(kls, others, strict=True):
        axes.plot([kl] * len(result.top1_per_seed), result.top1_per_seed, ".", color="C1", alpha=0.4)
        name = result.codec.rpartition("target_kl=")[2]
        axes.annotate(name, (kl, result.top1), (5, 6), textcoords="offset points", fontsize=8)
    axes.set(xscale="log", ylabel="top-1 on 500 digits, percent")
    axes.set_xlabel(f"mean row KL of the copied maps, nats ({_SMALLEST_PLOTTED_KL:g} or less at the left)")
    axes.set_title(f"Copy on digits, 100 labels, {len(reference.top1_per_seed)} seeds", fontsize=10)
    axes.grid(alpha=0.25)
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=130)


if __name__ == "__main__":
    main()
