"""A report of an evaluation, as Markdown."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from importlib.metadata import version

import torch

from atcache import __version__

from ..running.commands import as_command
from ..train.scores import Score
from .config import EvaluateConfig
from .corrupted import corruption_rows
from .summary import EvaluateSummary, SetScores


def report_text(config: EvaluateConfig, summary: EvaluateSummary) -> str:
    """The report: accuracy and calibration by set and run, robustness, pairs, classes if they were scored by
    themselves, and the command that repeats it."""
    names = run_names(summary)
    lines = ["# Evaluation", ""]
    versions = f"atcache {__version__}, torch {torch.__version__} and timm {version('timm')}"
    lines += [f"Made by `{as_command('eval', config)}` with {versions}.", ""]
    lines += _runs(summary, names)
    lines += _accuracy(summary, names)
    if any(each.corrupt is None for each in summary.sets[1:]):
        lines += _robustness(config, summary, names)
    lines += _corruptions(summary, names)
    if len(names) > 1:
        lines += _pairs(summary, names)
    lines += _scores(summary, names)
    if config.by_class:
        lines += _classes(summary, names)
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


def _accuracy(summary: EvaluateSummary, names: Sequence[str]) -> Iterator[str]:
    yield from _opening(
        "Accuracy and calibration",
        "Each cell has the top-1 in percent with its standard error over samples and, in brackets, the expected "
        "calibration error (ECE) in percentage points, in 15 bins of confidence (Guo et al. 2017).",
    )
    rows = [
        (
            each.name,
            f"{each.runs[0].num_samples:,}",
            *(f"{_top1(score)} ({score.ece:.2f})" for _, score in predictors(each, names)),
        )
        for each in summary.sets
    ]
    yield from _table(("set", "samples", *_titles(summary, names)), rows)
    for each in summary.sets:
        if each.num_left_out:
            yield f"{each.name}: {each.num_left_out:,} samples of other classes than those asked for are left out."
            yield ""


def _scores(summary: EvaluateSummary, names: Sequence[str]) -> Iterator[str]:
    yield from _opening(
        "All scores", "Top-1, top-5 and ECE are in percent. The loss is the mean cross-entropy, in nats."
    )
    rows = [
        (each.name, name, _top1(score), f"{score.top5:.2f}", f"{score.loss:.4g}", f"{score.ece:.2f}")
        for each in summary.sets
        for name, score in predictors(each, names)
    ]
    yield from _table(("set", "prediction", "top-1", "top-5", "loss", "ECE"), rows)


def _titles(summary: EvaluateSummary, names: Sequence[str]) -> tuple[str, ...]:
    """The heads of the columns of predictions: each run with its mode, where its name does not say it."""
    runs = {name: name if name == mode else f"{name} ({mode})" for name, mode in zip(names, summary.modes, strict=True)}
    return tuple(runs.get(name, name) for name, _ in predictors(summary.sets[0], names))


def _top1(score: Score) -> str:
    return f"{score.top1:.2f} ± {score.top1_error:.2f}"


def predictors(each: SetScores, names: Sequence[str]) -> Iterator[tuple[str, Score]]:
    """The name and score of each run, and of their averages."""
    yield from zip(names, each.runs, strict=True)
    if each.mean_probabilities is not None:
        yield "mean of probabilities", each.mean_probabilities
    if each.mean_logits is not None:
        yield "mean of logits", each.mean_logits


def class_rows(each: SetScores, names: Sequence[str]) -> list[tuple[str, ...]]:
    """Of each class: label, name, samples, and the top-1 of each prediction in percent; the worst class first.

    The worst is that of `each.score`: of the run, or of the mean of the probabilities if there are several.
    """
    worst = each.score.classes
    assert worst is not None, "scored by class"
    columns = [score.classes or () for _, score in predictors(each, names)]
    order = sorted(range(len(worst)), key=lambda row: worst[row].top1)
    return [
        (
            str(columns[0][row].label),
            columns[0][row].name,
            f"{columns[0][row].num_samples:,}",
            *(f"{column[row].top1:.2f}" for column in columns),
        )
        for row in order
    ]


def _classes(summary: EvaluateSummary, names: Sequence[str]) -> Iterator[str]:
    worst = "the mean of probabilities" if len(names) > 1 else "the run"
    yield from _opening("Classes", f"Top-1 of each class in percent, the worst of {worst} first.")
    for each in summary.sets:
        if len(summary.sets) > 1:
            yield f"### {each.name}"
            yield ""
        yield from _table(("label", "class", "samples", *_titles(summary, names)), class_rows(each, names))


def _robustness(config: EvaluateConfig, summary: EvaluateSummary, names: Sequence[str]) -> Iterator[str]:
    first = summary.sets[0]
    yield from _opening(
        "Relative robustness",
        f"Top-1 on a set as a share of the same prediction's top-1 on {first.name}, in percent, with its standard "
        "error. The error takes the samples of the two sets as independent: for the same images in two forms, it is "
        "too large.",
    )
    base = [score for _, score in predictors(first, names)]
    rows = [
        (each.name, *(_share(score, of) for (_, score), of in zip(predictors(each, names), base, strict=True)))
        for each in summary.sets[1:]
        if each.corrupt is None
    ]
    yield from _table(("set", *_titles(summary, names)), rows)
    if others := [each.name for each in config.sets[1:] if each.classes != config.sets[0].classes]:
        yield (
            f"{', '.join(others)}: restricted to other classes than {first.name}, which changes the share by itself. "
            f"For a fair comparison restrict {first.name} to the same classes."
        )
        yield ""


def _corruptions(summary: EvaluateSummary, names: Sequence[str]) -> Iterator[str]:
    first = summary.sets[0]
    means = [*corruption_rows(summary)]
    if not means:
        return
    yield from _opening(
        "Corruptions",
        "Top-1 in percent, the mean over the severities of each corruption (Hendrycks & Dietterich 2019). "
        + ("The last row is the mean over the corruptions. " if len(means) > 1 else "")
        + (
            f"In parentheses: as a share of the same prediction's top-1 on {first.name}, in percent."
            if first.corrupt is None
            else f"There is no clean set to compare with: {first.name} is corrupted too."
        ),
    )
    base = [score.top1 for _, score in predictors(first, names)]
    rows: list[tuple[str, ...]] = []
    for name, severities, top1s in means:
        cells = [f"{top1:.2f}" for top1 in top1s]
        if first.corrupt is None:
            ratios = [f"{100 * top1 / of:.1f}" if of else "-" for top1, of in zip(top1s, base, strict=True)]
            cells = [f"{cell} ({ratio})" for cell, ratio in zip(cells, ratios, strict=True)]
        rows.append((name, severities, *cells))
    yield from _table(("corruption", "severities", *_titles(summary, names)), rows)


def _share(score: Score, base: Score) -> str:
    """The ratio of two scores and its standard error, to first order in the errors of both."""
    if not base.top1:
        return "-"
    ratio = score.top1 / base.top1
    error = math.hypot(score.top1_error, ratio * base.top1_error) / base.top1
    return f"{100 * ratio:.1f} ± {100 * error:.1f}"


def _pairs(summary: EvaluateSummary, names: Sequence[str]) -> Iterator[str]:
    yield from _opening(
        "Pairs of runs",
        "Agreement is the share of samples with the same first prediction. Shared errors are the samples that both "
        "predict wrongly, as a share of those that one or both do. Both are in percent.",
    )
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


def _opening(title: str, words: str) -> Iterator[str]:
    yield from (f"## {title}", "", words, "")


def _table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> Iterator[str]:
    yield _row(columns)
    yield _row(["---"] * len(columns))
    yield from map(_row, rows)
    yield ""


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"
