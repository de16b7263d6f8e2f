"""The files of `paper.py`: the table as Markdown, the numbers as JSON, the plot."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from paper_results import NBYTES, REPORT_FILE, Accuracy, LeftOut, accuracies, codec_sizes, sentences
from paper_steps import STEPS, Recipe, Row
from paper_study import Study

from atcache.choices import Mode
from atcache.files.durable import encode_json, write_file

_FOOT = (
    "± is one standard error: that of a share of so many test images (binomial), or over seeds if that is larger. The "
    "share of the gap is (top-1 - scratch) / (finetune - scratch) on the same images. Its error is propagated from "
    "those of all three, as if they were independent."
)


def write_report(
    study: Study, rows: Sequence[Row], recipes: Mapping[Mode, Recipe] | None, left_out: Mapping[str, LeftOut]
) -> str:
    """Write paper.md, paper.json and, if any row is finished, paper.png; returns the Markdown."""
    found = accuracies(study, rows)
    said = sentences(study, found, left_out)
    head = (
        f"{study.teacher}: {study.labels:,} labels, {study.views} views of each image ({_policy(study)}), "
        f"{study.val_samples:,} test images. All students see the same views for {study.epochs:g} epochs: batches of "
        f"{study.batch_size}, drop path {study.drop_path:g}, label smoothing {study.label_smoothing:g}. finetune has a "
        f"layer decay of {study.layer_decay:g}."
    )
    text = "\n\n".join([head, table(study, rows, found, recipes), _FOOT, "\n".join(f"- {one}" for one in said)])
    report: dict[str, Any] = {
        "study": {**asdict(study), "out": str(study.out), "weights": study.weights and str(study.weights)},
        "recipes": {mode: recipe._asdict() for mode, recipe in (recipes or {}).items()},
        "rows": [{**asdict(one), "row": _as_json(one.row)} for one in found.values()],
        NBYTES: {codec: nbytes for codec, nbytes, _ in codec_sizes(study, found)},
        "missing": [_as_json(row) for row in rows if row not in found],
        "said": said,
        "left_out": [{"name": name, **one._asdict()} for name, one in left_out.items()],
    }
    write_file(study.out / REPORT_FILE, encode_json(report))
    write_file(study.out / "paper.md", f"{text.strip()}\n".encode())
    if found:
        draw(study, found, study.out / "paper.png")
    return text


def _policy(study: Study) -> str:
    mixed = {"mixup": study.mixup, "cutmix": study.cutmix}
    return ", ".join([study.policy, *(f"{name} {alpha:g}" for name, alpha in mixed.items() if alpha)])


def _as_json(row: Row) -> dict[str, Any]:
    students = [{**one._asdict(), "maps": one.maps._asdict()} for one in row.students]
    return {**row._asdict(), "students": students}


def table(
    study: Study, rows: Sequence[Row], found: Mapping[Row, Accuracy], recipes: Mapping[Mode, Recipe] | None
) -> str:
    """All rows as Markdown; a row without a finished student says so."""
    nbytes_by_codec = {codec: nbytes for codec, nbytes, _ in codec_sizes(study, found)}
    lines = [["what", "student", "top-1", "each seed", "share of the gap", "recipe"]]
    lines.append(["---", "---", "--:", "--:", "--:", "---"])
    step = ""
    for row in rows:
        title, step = "" if row.step == step else STEPS[row.step], row.step
        label, numbers = row.label, ["not run", "", ""]
        if row.step == "codecs" and label in nbytes_by_codec:
            label = f"{label} ({nbytes_by_codec[label]:,.0f} bytes a view)"
        if (one := found.get(row)) is not None:
            seeds = ", ".join(f"{top1:.1f}" for _, top1 in sorted(one.top1_by_seed.items()))
            share = "" if one.gap is None else f"{one.gap:.0%}"
            error = "" if one.gap_error is None else f" ± {one.gap_error:.0%}"
            numbers = [f"{one.top1:.1f} ± {one.standard_error:.1f}", seeds, share + error]
        modes = dict.fromkeys(student.mode for student in row.students)
        recipe = "" if recipes is None else "; ".join(dict.fromkeys(str(recipes[mode]) for mode in modes))
        lines.append([title, label, *numbers, recipe])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def draw(study: Study, found: Mapping[Row, Accuracy], path: Path) -> None:
    """Plot the finished rows, a panel for each step. Bars are two standard errors; lines are scratch and finetune."""
    from matplotlib.figure import Figure

    steps = [step for step in STEPS if any(row.step == step for row in found)]
    num_columns = min(3, len(steps))
    num_rows = -(-len(steps) // num_columns)
    figure = Figure(figsize=(1.5 + 4 * num_columns, 0.8 + 3.4 * num_rows), layout="constrained")
    panels = figure.subplots(num_rows, num_columns, sharey=True, squeeze=False).ravel()
    lines = {
        label: one.top1
        for row, one in found.items()
        if row.step == "modes" and (label := row.label) in ("scratch", "finetune")
    }
    for panel, step in zip(panels, steps, strict=False):
        shown = [one for row, one in found.items() if row.step == step]
        for place, one in enumerate(shown):
            panel.errorbar([place], [one.top1], 2 * one.standard_error, color="C0", marker="o", capsize=4)
            panel.plot([place] * len(one.top1_by_seed), list(one.top1_by_seed.values()), ".", color="C1", alpha=0.6)
        if step != "shift":  # other images, other lines
            for (label, top1), style in zip(lines.items(), (":", "--"), strict=False):
                panel.axhline(top1, color="grey", linestyle=style, linewidth=1, label=label)
        panel.set_xticks(
            range(len(shown)),
            [one.row.label for one in shown],
            rotation=35,
            ha="right",
            rotation_mode="anchor",
            fontsize=8,
        )
        panel.set_title(STEPS[step], fontsize=10)
        panel.set_xlim(-0.5, len(shown) - 0.5)
        panel.grid(alpha=0.25)
    for panel in panels[len(steps) :]:
        panel.set_visible(False)
    for panel in panels[::num_columns]:
        panel.set_ylabel("top-1, percent")
    if lines:
        panels[0].legend(fontsize=8)
    figure.suptitle(f"{study.teacher}, {study.labels:,} labels, {study.epochs:g} epochs", fontsize=10)
    png = io.BytesIO()
    figure.savefig(png, dpi=130)
    write_file(path, png.getvalue())
