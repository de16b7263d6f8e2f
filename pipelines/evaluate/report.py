"""A report of an evaluation, as Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch

from atcache import __version__

from ..running.commands import as_command
from ..train.scores import Score
from .config import EvaluateConfig
from .summary import EvaluateSummary, SetScores


def report_text(config: EvaluateConfig, summary: EvaluateSummary) -> str:
    """The report: accuracy and calibration by set and run, pairs, robustness, and the command that repeats it."""
    names = run_names(summary)
    lines = ["# Evaluation", ""]
    lines += [f"Made by `{as_command('eval', config)}` with atcache {__version__} and torch {torch.__version__}.", ""]
    lines += _runs(summary, names)
    lines += _scores(summary, names)
    if len(summary.sets) > 1:
        lines += _robustness(summary, names)
    if len(names) > 1:
        lines += _pairs(summary, names)
    return "\n".join(lines)


def run_names(summary: EvaluateSummary) -> tuple[str, ...]:
    """A short name for each run: the last part of its folder, with as many parts before it as tell it from others."""
    parts = [run.rstrip("/").split("/") for run in summary.runs]
    longest = max(map(len, parts))
    for count in range(1, longest + 1):
        names = tuple("/".join(each[-count:]) for each in parts)
        if len(set(names)) == len(names):
            return names
    return summary.runs


def _runs(summary: EvaluateSummary, names: Sequence[str]) -> Iterator[str]:
    rows = zip(names, summary.modes, summary.runs, strict=True)
    yield from _table(("run", "mode", "folder"), rows)


def _scores(summary: EvaluateSummary, names: Sequence[str]) -> Iterator[str]:
    yield "## Scores"
    yield ""
    yield (
        "Top-1 and top-5 are percent of the samples, with the standard error over samples. ECE is the expected "
        "calibration error in percentage points, in 15 bins of confidence (Guo et al. 2017). The loss is in nats."
    )
    yield ""
    rows: list[tuple[str, ...]] = []
    for each in summary.sets:
        for name, score in predictors(each, names):
            counted = f"{score.num_samples:,}"
            top1 = f"{score.top1:.2f} ± {score.top1_error:.2f}"
            rows.append((each.name, name, counted, top1, f"{score.top5:.2f}", f"{score.loss:.4g}", f"{score.ece:.2f}"))
    yield from _table(("set", "prediction", "samples", "top-1", "top-5", "loss", "ECE"), rows)
    for each in summary.sets:
        if each.num_left_out:
            yield f"{each.name}: {each.num_left_out:,} samples of other classes than those asked for are left out."
            yield ""


def predictors(each: SetScores, names: Sequence[str]) -> Iterator[tuple[str, Score]]:
    """The name and score of each run, and of their averages."""
    yield from zip(names, each.runs, strict=True)
    if each.mean_probabilities is not None:
        yield "mean of probabilities", each.mean_probabilities
    if each.mean_logits is not None:
        yield "mean of logits", each.mean_logits


def _robustness(summary: EvaluateSummary, names: Sequence[str]) -> Iterator[str]:
    first = summary.sets[0]
    yield "## Robustness"
    yield ""
    yield f"Top-1 on a set as a share of the same prediction's top-1 on {first.name}, in percent."
    yield ""
    base = dict(predictors(first, names))
    rows = [
        (each.name, *(_share(score.top1, base[name].top1) for name, score in predictors(each, names)))
        for each in summary.sets[1:]
    ]
    yield from _table(("set", *base), rows)


def _share(top1: float, base: float) -> str:
    return f"{100 * top1 / base:.1f}" if base else "-"


def _pairs(summary: EvaluateSummary, names: Sequence[str]) -> Iterator[str]:
    yield "## Pairs of runs"
    yield ""
    yield (
        "Agreement is the share of samples with the same first prediction. Shared errors are the samples that both "
        "predict wrongly, as a share of those that one or both do. Both are in percent."
    )
    yield ""
    rows = [
        (
            each.name,
            " and ".join(names[run] for run in pair.runs),
            f"{pair.agreement:.1f}",
            "-" if pair.shared_errors is None else f"{pair.shared_errors:.1f}",
        )
        for each in summary.sets
        for pair in each.pairs
    ]
    yield from _table(("set", "runs", "agreement", "shared errors"), rows)


def _table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> Iterator[str]:
    yield _row(columns)
    yield _row(["---"] * len(columns))
    yield from map(_row, rows)
    yield ""


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"
