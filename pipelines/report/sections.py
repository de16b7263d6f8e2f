"""The parts of a report, as HTML."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from atcache.images.class_names import ClassNames
from atcache.pictures import CAVEAT, overlay, top_of_scale

from ..pages.charts import by_layer_and_head, curves
from ..pages.frame import commands as command_boxes, folded, page, paragraph, section, table, text
from ..pages.images import image
from .finished import FinishedRun
from .looking import Agreement, Maps, Pictured, Predictions

_MOST_CLASSES = 10
_DOES = {
    "copy": "A student that copies its teacher's attention",
    "distill": "A student whose attention was distilled from its teacher's",
    "scratch": "A student trained from random weights, without a teacher",
    "finetune": "A student that began with the teacher's weights",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Seen:
    """What was seen of a student on validation samples."""

    predictions: Predictions | None
    maps: Maps | None
    classes: ClassNames


def write_page(
    run: FinishedRun,
    seen: Seen,
    *,
    notes: Sequence[str],
    commands: Sequence[str],
    environment: Sequence[tuple[str, str]],
) -> str:
    """The whole page, as HTML.

    Args:
        run: what its folder says.
        seen: what its student does.
        notes: what is not on the page, and why.
        commands: those that make the run again.
        environment: names and values.
    """
    parts = [
        f'<p class="lead">{text(_result(run, seen.predictions))}</p>',
        *(paragraph(note, "faint") for note in notes),
        section("Curves", _curves(run)),
        section("Accuracy", _accuracy(run, seen.predictions)),
        section("Agreement with the teacher", _agreement(run, seen.maps)),
        section("Worst classes", _worst_classes(seen)),
        section("Pictures", _maps(run, seen), _wrong(seen)),
        section("Make it again", *_again(run, commands), _environment(environment)),
    ]
    return page(f"Run {run.folder.absolute().name}", "\n".join(parts))


def _result(run: FinishedRun, predictions: Predictions | None) -> str:
    summary = run.summary
    does = _DOES[run.record.mode]
    trained = f"{summary.steps:,} steps on {_count(summary.num_samples, 'image')}"
    if summary.validation is not None:
        score = summary.validation
        right = f"{score.top1:.1f} % of {_count(score.num_samples, 'validation image')}"
    elif predictions is not None:
        right = f"{100 * predictions.correct_N.mean():.1f} % of {_count(len(predictions.label_N), 'validation image')}"
    else:
        return f"{does} ended with a loss of {summary.loss:.4g} after {trained}."
    return f"{does} names the class of {right} correctly, after {trained}."


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def _curves(run: FinishedRun) -> str:
    rows, validations = run.training, run.validations
    if not rows:
        return paragraph("The run wrote no metrics.")
    steps = [row["step"] for row in rows]
    names = {"label_loss": "labels", "attention_loss": "attention"}
    names = names if "attention_loss" in rows[0] and "label_loss" in rows[0] else {"loss": "training"}
    losses = {shown: (steps, [row[name] for row in rows]) for name, shown in names.items()}
    at = [row["step"] for row in validations]
    if validations:
        losses["validation, labels" if len(names) > 1 else "validation"] = at, [row["loss"] for row in validations]
    # A line of one point would not be seen.
    points = tuple(name for name, (x, _) in losses.items() if name.startswith("validation") or len(x) == 1)
    first, last = ({name: values[place] for name, (_, values) in losses.items()} for place in (0, -1))
    changes = "; ".join(f"{name} from {first[name]:.3g} to {last[name]:.3g}" for name in losses)
    drawn = [curves(losses, title="Loss", says=f"Loss: {changes}.", unit="nats", points=points)]
    if validations:
        top1 = [row["top1"] for row in validations]
        shown = {"top-1": (at, top1), "top-5": (at, [row["top5"] for row in validations])}
        says = f"Validation accuracy: top-1 ends at {top1[-1]:.1f} %, its best is {max(top1):.1f} %."
        drawn.append(curves(shown, title="Accuracy", says=says, unit="%", points=tuple(shown)))
    rates = [row["lr"] for row in rows]
    says = f"Learning rate: at most {max(rates):.3g}, at the end {rates[-1]:.3g}."
    drawn.append(curves({"rate": (steps, rates)}, title="Learning rate", says=says, unit="learning rate"))
    without = "" if validations else paragraph("The run was not validated while it trained: no curve of accuracy.")
    return f'<div class="charts">{"".join(drawn)}</div>{without}'


def _accuracy(run: FinishedRun, predictions: Predictions | None) -> str:
    rows: list[tuple[str, ...]] = []
    score = run.summary.validation
    if score is not None:
        what = ("at the end of the training", f"{score.num_samples:,}")
        rows.append((*what, f"{score.top1:.2f}", f"{score.top5:.2f}", f"{score.loss:.4g}", f"{score.ece:.2f}"))
    if predictions is not None:
        values = 100 * predictions.correct_N.mean(), 100 * predictions.in_top5_N.mean(), predictions.loss_N.mean()
        what = ("for this page", f"{len(predictions.label_N):,} of {predictions.num_all:,}")
        rows.append((*what, f"{values[0]:.2f}", f"{values[1]:.2f}", f"{values[2]:.4g}", f"{predictions.ece:.2f}"))
    if not rows:
        return paragraph("No accuracy was measured.")
    headings = ("measured", "images", "top-1 %", "top-5 %", "loss, nats", "ECE %")
    shown = table(headings, rows, caption="Accuracy, loss and calibration error on validation images", numbers=5)
    return shown + ("" if predictions is None else paragraph(_confidence(predictions)))


def _confidence(predictions: Predictions) -> str:
    sure, right = 100 * predictions.confidence_N.mean(), 100 * predictions.correct_N.mean()
    # Of the difference, if the student were as sure as it is right: each prediction is right with its own confidence.
    confidence_N = predictions.confidence_N
    error = 100 * np.sqrt((confidence_N * (1 - confidence_N)).sum()) / len(confidence_N)
    if abs(sure - right) <= 2 * error:
        verdict = "within two standard errors of each other"
    else:
        verdict = "it is too sure of itself" if sure > right else "it is not sure enough"
    return (
        f"On these images its mean confidence is {sure:.1f} %, and {right:.1f} % are right: {verdict}. A difference of "
        f"{2 * error:.1f} points would be two standard errors."
    )


def _agreement(run: FinishedRun, maps: Maps | None) -> str:
    pairing = run.record.pairing
    if pairing is None:
        return paragraph(f"Mode {run.record.mode} uses no attention of a teacher, so there is none to agree with.")
    if run.record.mode == "copy":
        if pairing.what == "map":
            return paragraph(
                "The student attends with the teacher's own maps, so that the two agree by construction in the "
                f"{_count(len(pairing.layers), 'layer')} and {_count(len(pairing.heads), 'head')} that are copied."
            )
        return paragraph(
            f"The student copies {pairing.what} of the teacher and computes the rest itself. Its maps are not compared."
        )
    if maps is None or maps.agreement is None:
        return paragraph("The student's maps were not compared with the teacher's.")
    return _agreement_of(maps.agreement)


def _agreement_of(agreement: Agreement) -> str:
    kl_LH, moved_LH = agreement.kl_nats_LH, agreement.total_variation_LH
    place = np.unravel_index(int(kl_LH.argmax()), kl_LH.shape)
    worst = f"layer {agreement.layers[place[0]]}, head {agreement.heads[place[1]]}"
    words = (
        f"The student's own maps are compared with the cached ones on {_count(agreement.num_views, 'validation image')}"
        f". The mean KL of their rows is {kl_LH.mean():.3g} nats; {moved_LH.mean():.1%} of the attention would have to "
        f"move to make them equal. They are furthest apart in {worst}: {kl_LH.max():.3g} nats."
    )
    says = f"KL from teacher to student of each layer and head, in nats: 0 to {kl_LH.max():.3g}; lighter is further."
    picture = by_layer_and_head(
        kl_LH, agreement.layers, agreement.heads, title="KL by layer and head", says=says, unit="nats"
    )
    rows = [
        (layer, f"{kl_LH[row].mean():.3g}", f"{kl_LH[row].max():.3g}", f"{100 * moved_LH[row].mean():.1f}")
        for row, layer in enumerate(agreement.layers)
    ]
    headings = ("layer", "KL, mean", "KL, worst head", "would have to move, %")
    by_layer = table(headings, rows, caption="Agreement by layer, KL in nats", numbers=3)
    heads = table(
        ("layer", *(f"head {head}" for head in agreement.heads)),
        [
            (layer, *(f"{value:.3g}" for value in kl_H))
            for layer, kl_H in zip(agreement.layers, kl_LH.tolist(), strict=True)
        ],
        caption="KL by layer and head, nats",
        numbers=len(agreement.heads),
    )
    return paragraph(words) + picture + by_layer + folded("The numbers of each head", heads)


def _named(classes: ClassNames, label: int) -> str:
    if label < 0:
        return "no label"
    return classes.name(label) or f"class {label}"


def _worst_classes(seen: Seen) -> str:
    predictions = seen.predictions
    if predictions is None:
        return paragraph("No class was predicted.")
    rows: list[tuple[float, int, tuple[str, str, str, str]]] = []
    for label in np.unique(predictions.label_N).tolist():
        of_class_N = predictions.label_N == label
        right = 100 * float(predictions.correct_N[of_class_N].mean())
        taken_for = predictions.predicted_N[of_class_N & ~predictions.correct_N]
        often = _named(seen.classes, int(np.bincount(taken_for).argmax())) if len(taken_for) else ""
        num_samples = int(of_class_N.sum())
        rows.append((right, -num_samples, (_named(seen.classes, label), often, f"{num_samples:,}", f"{right:.1f}")))
    rows.sort(key=lambda row: row[:2])
    caption = f"The {min(_MOST_CLASSES, len(rows))} worst of {_count(len(rows), 'class').replace('classs', 'classes')}"
    headings = ("class", "most often taken for", "images", "top-1 %")
    return table(headings, [row for *_, row in rows[:_MOST_CLASSES]], caption=caption, numbers=2)


def _maps(run: FinishedRun, seen: Seen) -> str:
    maps = seen.maps
    if maps is None or not maps.pictured:
        return paragraph("There are no pictures of maps.")
    query = "the class token" if maps.query == "cls" else "the mean of all tokens"
    words = f"Layer {maps.layer}, mean of its heads: what {query} attends to. "
    if run.record.mode == "copy":
        words += "The student attends with the teacher's map. "
    tiles = [_pictured(one, _named(seen.classes, one.label)) for one in maps.pictured]
    return "<h3>Where it looks</h3>" + paragraph(words + CAVEAT) + f'<div class="triples">{"".join(tiles)}</div>'


def _pictured(one: Pictured, name: str) -> str:
    maps = {"teacher": one.teacher_HW, "student": one.student_HW}
    kept = {whose: map_HW for whose, map_HW in maps.items() if map_HW is not None}
    parts = [f"<span>{image(one.image_HWC, f'The image, {name}')}<small>image</small></span>"]
    if kept:
        top = top_of_scale(np.stack(list(kept.values())))
        for whose, map_HW in kept.items():
            shown = image(overlay(_enlarged(one.image_HWC), map_HW, top), f"The {whose}'s map over the image")
            parts.append(f"<span>{shown}<small>{whose}</small></span>")
    caption = f"{text(name)} · {text(one.sample_key)}"
    return f'<figure><div class="triple">{"".join(parts)}</div><figcaption>{caption}</figcaption></figure>'


def _enlarged(image_HWC: np.ndarray, side: int = 112) -> np.ndarray:
    """An image with each pixel as a box, so that a map's patches need not fit its pixels."""
    factor = max(1, side // max(image_HWC.shape[:2]))
    return image_HWC.repeat(factor, axis=0).repeat(factor, axis=1)


def _wrong(seen: Seen) -> str:
    if seen.predictions is None:
        return ""
    if not seen.predictions.wrong:
        return "<h3>Confidently wrong</h3>" + paragraph("No prediction was wrong.")
    tiles: list[str] = []
    for one in seen.predictions.wrong:
        is_, says = (_named(seen.classes, label) for label in (one.label, one.predicted))
        shown = image(one.image_HWC, f"An image of {is_}, taken for {says}")
        words = f"{text(says)} ({one.confidence:.0%}), but it is {text(is_)} · {text(one.sample_key)}"
        tiles.append(f"<li><figure>{shown}<figcaption>{words}</figcaption></figure></li>")
    words = "The wrong predictions that the student was most sure of, with their probability."
    return "<h3>Confidently wrong</h3>" + paragraph(words) + f'<ul class="tiles">{"".join(tiles)}</ul>'


def _again(run: FinishedRun, commands: Sequence[str]) -> list[str]:
    if not commands:
        return [paragraph("The run does not say where its data were, so that its commands are not known.")]
    where = f", typed in {run.places['folder']}," if "folder" in run.places else ""
    return [
        paragraph(
            f"These commands{where} build the caches, train and evaluate, with the versions below. "
            "They do not know of a list of samples: add --keys where a cache was built with it."
        ),
        command_boxes(commands),
    ]


def _environment(environment: Sequence[tuple[str, str]]) -> str:
    return table(("what", "value"), environment, caption="Where this page was written")
