"""Does it work? Few-label students of a small masked autoencoder on CIFAR-10, in every mode, cached and live.

    python benchmarks/transfer.py --data 'cifar10/train-{000000..000009}.tar' \
        --val-data 'cifar10/test-{000000..000001}.tar' --out FOLDER

A ViT of 12 layers with patches of 4 pixels is pre-trained on all images, without labels. Students with the same
architecture learn from a few labels: from scratch; by fine-tuning; by copying or distilling the teacher's attention,
from a cache and from the running teacher; and by copying from caches with other numbers of views and other codecs. All
students get the same samples. A seed fixes a student's initial weights and the order of its samples. The script prints
tables, and writes FOLDER/transfer.json, .md and .png.

A folder of an earlier run is continued: finished teachers, caches and students are not made again. With `--report`, the
script makes nothing and shows what is finished.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from transfer_runs import (
    MAIN_CODEC,
    MODEL,
    Grid,
    Way,
    all_ways,
    build_config,
    codec_ways,
    make_all,
    mode_ways,
    run_folder,
    view_ways,
)

from atcache.cache.record import CacheRecord
from atcache.pipelines.train.summary import read_finished
from atcache.store.reader import CacheReader

CODECS = ("exact", *(f"transform:target_kl={kl}" for kl in (0.005, 0.02, 0.1, 0.5)))
_SMALLEST_PLOTTED_KL = 1e-6


@dataclass(frozen=True, kw_only=True, slots=True)
class Accuracy:
    """The finished students of one way."""

    way: Way
    top1_by_seed: Mapping[int, float]
    """Validation accuracy in percent."""
    top1: float
    """The mean of `top1_by_seed`."""
    standard_error: float | None
    """The standard error of `top1`; None for one seed."""
    gap_closed: float | None
    """(top1 - scratch) / (finetune - scratch), over the seeds that all three have; None if there is no gap."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Cache:
    """A training cache: its views, codec, fidelity and size."""

    views: int
    codec: str
    row_kl_nats: float
    """Mean KL of some of its views from the teacher's maps."""
    nbytes_per_view: float
    """The size of the whole cache, divided by its views."""


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The parsed options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="tars of training images with labels")
    parser.add_argument("--val-data", required=True, help="tars of test images with labels")
    parser.add_argument("--out", type=Path, required=True, help="folder for teacher, caches, students and results")
    parser.add_argument("--model", default=MODEL, help="teacher and students (default: a ViT of 12 layers, 64 wide)")
    parser.add_argument("--pretrain-steps", type=int, default=8000, help="steps of 64 images (default 8000)")
    parser.add_argument("--train-samples", type=int, default=1000, help="labelled images for students (default 1000)")
    parser.add_argument("--val-samples", type=int, default=2000, help="test images (default 2000)")
    parser.add_argument("--epochs", type=float, default=8, help="epochs of the students (default 8)")
    parser.add_argument("--lr", type=float, default=1e-3, help="for all students except finetune (default 1e-3)")
    parser.add_argument("--finetune-lr", type=float, default=2e-3, help="for finetune's last layer (default 2e-3)")
    parser.add_argument("--seeds", type=int, default=3, help="seeds of scratch, finetune and copy (default 3)")
    parser.add_argument("--side-seeds", type=int, default=2, help="seeds of all other students (default 2)")
    parser.add_argument("--main-views", type=int, default=4, help="views when comparing modes and codecs (default 4)")
    parser.add_argument("--views", type=int, nargs="*", default=(1, 2, 4, 8), help="for copy (default 1 2 4 8)")
    parser.add_argument("--codecs", nargs="*", default=CODECS, help=f"for copy (default {' '.join(CODECS)})")
    parser.add_argument("--processes", type=int, default=2, help="processes, of one thread each (default 2)")
    parser.add_argument("--report", action="store_true", help="make nothing, show what is finished")
    options = parser.parse_args(arguments)
    if options.report and not options.out.is_dir():
        parser.error(f"--report: {options.out} is not the folder of an earlier run.")
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    """Make what is missing, print and write the results."""
    options = parse(arguments)
    values: dict[str, Any] = {field.name: getattr(options, field.name) for field in fields(Grid)}
    grid = Grid(**{**values, "views": tuple(options.views), "codecs": tuple(options.codecs)})
    if not options.report:
        torch.set_num_threads(1)
        make_all(grid, options.processes)
    results, caches = read_results(grid), read_caches(grid)
    text = tables(grid, results, caches)
    print(text)
    report = {
        "grid": {**asdict(grid), "out": str(grid.out)},
        "students": [{**asdict(result), "way": result.way._asdict()} for result in results.values()],
        "caches": [asdict(cache) for cache in caches.values()],
    }
    (grid.out / "transfer.json").write_text(json.dumps(report, indent=1) + "\n")
    (grid.out / "transfer.md").write_text(text + "\n")
    draw(grid, results, caches, grid.out / "transfer.png")


def read_results(grid: Grid) -> dict[Way, Accuracy]:
    """The accuracy of each way that has finished students."""
    top1s: dict[Way, dict[int, float]] = {}
    for way in all_ways(grid):
        for seed in range(max(grid.seeds, grid.side_seeds)):
            summary = read_finished(run_folder(grid, way, seed))
            if summary is not None and summary.validation is not None:
                top1s.setdefault(way, {})[seed] = summary.validation.top1
    scratch, finetune = (top1s.get(Way(mode, grid.main_views), {}) for mode in ("scratch", "finetune"))
    return {
        way: Accuracy(
            way=way,
            top1_by_seed=top1_by_seed,
            top1=statistics.fmean(top1_by_seed.values()),
            standard_error=standard_error(list(top1_by_seed.values())),
            gap_closed=gap_closed(top1_by_seed, scratch, finetune),
        )
        for way, top1_by_seed in top1s.items()
    }


def read_caches(grid: Grid) -> dict[tuple[int, str], Cache]:
    """The finished training caches, by their views and codec."""
    caches: dict[tuple[int, str], Cache] = {}
    for way in all_ways(grid):
        path = build_config(grid, way.views, way.codec).out
        if path.exists() and (reader := CacheReader(path)).is_complete:
            complete = CacheRecord.of(reader).complete
            assert complete is not None, "the reader says that it is complete"
            caches[way.views, way.codec] = Cache(
                views=way.views,
                codec=way.codec,
                row_kl_nats=max(0.0, complete.quality["row_kl_nats"].mean),
                nbytes_per_view=complete.nbytes / complete.num_stored,
            )
    return caches


def gap_closed(top1s: Mapping[int, float], scratch: Mapping[int, float], finetune: Mapping[int, float]) -> float | None:
    """(top1 - scratch) / (finetune - scratch), with means over the seeds that all three have.

    None if there are no such seeds, or if finetune is not better than scratch.
    """
    seeds = [seed for seed in top1s if seed in scratch and seed in finetune]
    if not seeds:
        return None
    own, lower, upper = (statistics.fmean(by_seed[seed] for seed in seeds) for by_seed in (top1s, scratch, finetune))
    return (own - lower) / (upper - lower) if upper > lower else None


def difference(top1s: Mapping[int, float], others: Mapping[int, float]) -> tuple[float, float | None]:
    """Mean of the differences seed by seed, and its standard error (None for one seed).

    Raises:
        ValueError: no seed is in both.
    """
    differences = [top1s[seed] - others[seed] for seed in top1s if seed in others]
    if not differences:
        raise ValueError(f"seeds {sorted(top1s)} and {sorted(others)}: expected one that is in both.")
    return statistics.fmean(differences), standard_error(differences)


def standard_error(values: Sequence[float]) -> float | None:
    """The standard error of the mean; None for one value."""
    return statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None


def tables(grid: Grid, results: Mapping[Way, Accuracy], caches: Mapping[tuple[int, str], Cache]) -> str:
    """The finished students, as markdown."""
    live = {way._replace(live=False): way for way in results if way.live}
    rows = [
        [_label(way), *_numbers(results[way]), _compare(results, way, live.get(way))]
        for way in mode_ways(grid)
        if way in results
    ]
    parts = [_markdown(["student", "top-1", "each seed", "share of the gap closed", "cached - live"], rows)]
    rows = [
        [str(way.views), *_numbers(results[way]), _compare(results, way, way._replace(views=grid.views[0]))]
        for way in view_ways(grid)
        if way in results
    ]
    head = ["views in the cache", "copy, top-1", "each seed", "share of the gap closed"]
    parts.append(_markdown([*head, f"difference to {grid.views[0]}"], rows) if rows else "")
    rows = [
        [
            way.codec,
            f"{caches[way.views, way.codec].nbytes_per_view:,.0f}",
            f"{caches[way.views, way.codec].row_kl_nats:.2g}",
            *_numbers(results[way]),
            _compare(results, way, way._replace(codec=grid.codecs[0])),
        ]
        for way in codec_ways(grid)
        if way in results
    ]
    head = ["maps stored as", "bytes a view", "mean KL", "copy, top-1", "each seed", "share of the gap closed"]
    parts.append(_markdown([*head, f"difference to {grid.codecs[0]}"], rows) if rows else "")
    return "\n\n".join(
        filter(None, [*parts, "± is one standard error over seeds; differences are taken seed by seed."])
    )


def _label(way: Way) -> str:
    return f"{way.mode}, live" if way.live else f"{way.mode}, cached" if way.mode in ("copy", "distill") else way.mode


def _numbers(result: Accuracy) -> list[str]:
    """Mean, each seed, share of the gap."""
    gap = "" if result.gap_closed is None else f"{result.gap_closed:.0%}"
    seeds = ", ".join(f"{top1:.1f}" for _, top1 in sorted(result.top1_by_seed.items()))
    return [_with_error(f"{result.top1:.1f}", result.standard_error, 1), seeds, gap]


def _compare(results: Mapping[Way, Accuracy], way: Way, other: Way | None) -> str:
    """The difference to another way; empty if there is none."""
    if other is None or other == way or other not in results:
        return ""
    top1s, others = results[way].top1_by_seed, results[other].top1_by_seed
    if not top1s.keys() & others.keys():
        return ""
    mean, error = difference(top1s, others)
    return _with_error(f"{mean:+.2f}", error, 2)


def _with_error(mean: str, error: float | None, decimals: int) -> str:
    return mean if error is None else f"{mean} ± {error:.{decimals}f}"


def _markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---", *["--:"] * (len(head) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def draw(grid: Grid, results: Mapping[Way, Accuracy], caches: Mapping[tuple[int, str], Cache], path: Path) -> None:
    """Plot accuracy by mode, by views and by the maps' KL; dots are seeds, bars two standard errors."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 4.2), layout="constrained")
    modes, views, codecs = figure.subplots(1, 3, sharey=True)
    main = [results[way] for way in mode_ways(grid) if way in results]
    for number, result in enumerate(main):
        _plot(modes, number, result, "C1" if result.way.live else "C0")
    modes.set_xticks(range(len(main)), [_label(result.way).replace(", ", "\n") for result in main], fontsize=8)
    modes.set(ylabel=f"top-1 on {grid.val_samples:,} test images, percent", title="by mode")
    for way in view_ways(grid):
        if way in results:
            _plot(views, way.views, results[way], "C0")
    views.set_xscale("log", base=2)
    views.set_xticks(grid.views, [str(count) for count in grid.views])
    views.set(xlabel="views in the cache", title=f"copy, {MAIN_CODEC}")
    for way in codec_ways(grid):
        if way in results:
            kl = caches[way.views, way.codec].row_kl_nats
            _plot(codecs, max(kl, _SMALLEST_PLOTTED_KL), results[way], "C0")
    codecs.set(xscale="log", title=f"copy, {grid.main_views} views")
    codecs.set_xlabel(f"mean row KL, nats ({_SMALLEST_PLOTTED_KL:g} or less at the left)")
    for axes in (modes, views, codecs):
        for way, style in ((Way("scratch", grid.main_views), ":"), (Way("finetune", grid.main_views), "--")):
            if way in results:
                axes.axhline(results[way].top1, color="grey", linestyle=style, linewidth=1, label=way.mode)
        axes.grid(alpha=0.25)
    if views.get_legend_handles_labels()[0]:
        views.legend(fontsize=8)
    figure.suptitle(f"CIFAR-10, {grid.train_samples:,} labels, {grid.epochs:g} epochs", fontsize=10)
    figure.savefig(path, dpi=130)


def _plot(axes: Any, x: float, result: Accuracy, color: str) -> None:
    margin = None if result.standard_error is None else 2 * result.standard_error
    axes.errorbar([x], [result.top1], margin, color=color, marker="o", capsize=4)
    axes.plot([x] * len(result.top1_by_seed), list(result.top1_by_seed.values()), ".", color=color, alpha=0.4)


if __name__ == "__main__":
    main()
