"""How well predictions fit labels: those of students, of their averages, and of each two together."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Annotated

import torch
from torch import Tensor

from atcache.feed.batch import Batch
from atcache.fields import JsonFields, Omitted
from atcache.images.class_names import ClassNames
from atcache.students.student import Student
from atcache.students.teacher_side import CacheTeacher, LiveTeacher
from atcache.teachers.devices import autocast, memory_errors_explained
from atcache.teachers.inputs import normalise_images

from ..running.ranks import Ranks
from .validation import ValidationSet

NUM_BINS = 15
"""Bins of confidence that calibration is measured in, as Guo et al. 2017 do."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ClassScore(JsonFields):
    """How well predictions fit the labels of one class."""

    label: int
    name: str
    """Empty if it is not known."""
    top1: float
    """Share of the class's samples whose label is the first prediction, in percent."""
    num_samples: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Score(JsonFields):
    """How well predictions fit labels."""

    top1: float
    """Share of samples whose label is the first prediction, in percent."""
    top1_error: float
    """Standard error of `top1` over samples, in percentage points: sqrt(top1 (100 - top1) / num_samples)."""
    top5: float
    """Share of samples whose label is among the first five, in percent; equal to 100 with five classes or fewer."""
    loss: float
    """Mean cross-entropy, in nats."""
    ece: float
    """Expected calibration error, in percentage points: how far the confidence in the first prediction is from the
    share of right ones, in 15 equal bins of confidence, averaged over samples (Guo et al. 2017, equation 3)."""
    num_samples: int
    classes: Annotated[tuple[ClassScore, ...] | None, Omitted] = None
    """Each class that has samples by itself, if that was asked for."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PairScore(JsonFields):
    """How far two students predict alike."""

    runs: tuple[int, int]
    """Which two, counted from 0."""
    agreement: float
    """Share of samples with the same first prediction, in percent."""
    shared_errors: float | None
    """Of the samples that one or both predict wrongly, the share that both do, in percent; None if there is none."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StudentScores:
    """The scores of several students on the same samples."""

    runs: tuple[Score, ...]
    """One a student."""
    mean_probabilities: Score | None
    """Of the mean of their probabilities (Li et al. 2024); None for one student."""
    mean_logits: Score | None
    """Of the mean of their logits; None for one student."""
    pairs: tuple[PairScore, ...]


def score_students(
    students: Sequence[Student],
    data: ValidationSet,
    device: torch.device,
    dtype: torch.dtype,
    ranks: Ranks = Ranks(),  # noqa: B008 - frozen
    *,
    by_class: bool = False,
) -> StudentScores:
    """Score students on the same views, each of which is read once. All ranks return the same.

    With `by_class`, each class is scored too. Each rank scores its share. The students' modules are left in eval mode.
    """
    num_classes, several = students[0].num_classes, len(students) > 1
    tallies = [_Tally(num_classes, device) for _ in range(len(students) + 2 * several)]
    pairs = list(combinations(range(len(students)), 2))
    # Of each pair: predicted alike, both wrong, one or both wrong. Summed on the device, so that no batch waits for it.
    pair_sums_P3 = torch.zeros(len(pairs), 3, dtype=torch.float64, device=device)
    dropped_C = _dropped(data, num_classes, device)
    for student in students:
        student.module.eval()
    for batch in data.batches(ranks):
        label_B = batch.label_B.to(device, non_blocking=True)
        with memory_errors_explained("the student", len(batch.label_B), device):
            logits_RBC = _logits(students, batch, data.teacher, device, dtype)
        if dropped_C is not None:
            logits_RBC = logits_RBC.masked_fill(dropped_C, -torch.inf)
        probability_RBC = logits_RBC.softmax(dim=2)
        predictions = list(probability_RBC)
        if several:
            predictions += [probability_RBC.mean(dim=0), logits_RBC.mean(dim=0).softmax(dim=1)]
        firsts = [
            tally.add(probability_BC, label_B) for tally, probability_BC in zip(tallies, predictions, strict=True)
        ]
        for pair, (a, b) in enumerate(pairs):
            wrong_B, also_B = firsts[a] != label_B, firsts[b] != label_B
            alike = (firsts[a] == firsts[b]).sum()
            pair_sums_P3[pair] += torch.stack([alike, (wrong_B & also_B).sum(), (wrong_B | also_B).sum()])
    classes = data.classes if by_class else None
    scores = [tally.score(ranks, classes) for tally in tallies]
    return StudentScores(
        runs=tuple(scores[: len(students)]),
        mean_probabilities=scores[-2] if several else None,
        mean_logits=scores[-1] if several else None,
        pairs=_pair_scores(pairs, ranks.sum(pair_sums_P3.reshape(-1)) if pairs else [], scores[0].num_samples),
    )


class _Tally:
    """The counts that a score is made of, of one predictor, summed on the device."""

    def __init__(self, num_classes: int, device: torch.device) -> None:
        self.sums_4 = torch.zeros(4, dtype=torch.float64, device=device)
        """First right, label among the first five, negative log-likelihood, samples."""
        self.sums_2C = torch.zeros(2, num_classes, dtype=torch.float64, device=device)
        """Of each class: right ones, and all."""
        self.sums_2K = torch.zeros(2, NUM_BINS, dtype=torch.float64, device=device)
        """Of each bin: right ones, and the sum of the confidence."""

    def add(self, probability_BC: Tensor, label_B: Tensor) -> Tensor:
        """Count a batch of predictions; returns the first class of each sample."""
        best = probability_BC.topk(min(5, probability_BC.shape[1]))
        first_B, confidence_B = best.indices[:, 0], best.values[:, 0]
        ranked_BC = best.indices == label_B.unsqueeze(1)
        right_B, one_B = ranked_BC[:, 0].double(), torch.ones_like(confidence_B)
        # A probability that underflowed to 0 has no logarithm; the smallest normal number stands in for it.
        of_label_B = probability_BC.gather(1, label_B.unsqueeze(1)).clamp_min(torch.finfo(torch.float64).tiny)
        self.sums_4 += torch.stack([right_B.sum(), ranked_BC.any(1).sum(), -of_label_B.log().sum(), one_B.sum()])
        self.sums_2C.index_add_(1, label_B, torch.stack([right_B, one_B]))
        self.sums_2K.index_add_(1, bins_of(confidence_B), torch.stack([right_B, confidence_B]))
        return first_B

    def score(self, ranks: Ranks, classes: ClassNames | None) -> Score:
        """The score over all ranks; of each class too, if their names are given."""
        parts = self.sums_4, self.sums_2K.reshape(-1), self.sums_2C.reshape(-1)
        sums = ranks.sum(torch.cat(parts))
        (first, among5, loss, count), by_bin, by_class = sums[:4], sums[4 : 4 + 2 * NUM_BINS], sums[4 + 2 * NUM_BINS :]
        share = first / count
        gaps = [abs(right - sure) for right, sure in zip(by_bin[:NUM_BINS], by_bin[NUM_BINS:], strict=True)]
        return Score(
            top1=100 * first / count,
            top1_error=100 * math.sqrt(share * (1 - share) / count),
            top5=100 * among5 / count,
            loss=loss / count,
            ece=100 * math.fsum(gaps) / count,
            num_samples=int(count),
            classes=None if classes is None else _class_scores(by_class, classes),
        )


def bins_of(confidence_B: Tensor) -> Tensor:
    """The bin of each confidence. Bins are open below and closed above, so that a confidence of 1 is in the last."""
    return ((confidence_B * NUM_BINS).ceil().long() - 1).clamp(0, NUM_BINS - 1)


def _class_scores(sums: Sequence[float], classes: ClassNames) -> tuple[ClassScore, ...]:
    """The scores of the classes that have samples, from the counts of right ones and of all."""
    num_classes = len(sums) // 2
    return tuple(
        ClassScore(label=label, name=classes.name(label), top1=100 * right / count, num_samples=int(count))
        for label, (right, count) in enumerate(zip(sums[:num_classes], sums[num_classes:], strict=True))
        if count
    )


def _pair_scores(pairs: Sequence[tuple[int, int]], sums: Sequence[float], num_samples: int) -> tuple[PairScore, ...]:
    return tuple(
        PairScore(
            runs=pair,
            agreement=100 * sums[3 * number] / num_samples,
            shared_errors=100 * sums[3 * number + 1] / sums[3 * number + 2] if sums[3 * number + 2] else None,
        )
        for number, pair in enumerate(pairs)
    )


def _dropped(data: ValidationSet, num_classes: int, device: torch.device) -> Tensor | None:
    """Which classes are not among the predictions; None if all are."""
    if data.kept_K is None:
        return None
    dropped_C = torch.ones(num_classes, dtype=torch.bool)
    dropped_C[torch.from_numpy(data.kept_K)] = False
    return dropped_C.to(device)


@torch.no_grad()
def _logits(
    students: Sequence[Student],
    batch: Batch,
    teacher: CacheTeacher | LiveTeacher | None,
    device: torch.device,
    dtype: torch.dtype,
) -> Tensor:
    """The logits of each student (R), as float64."""
    given = None if teacher is None else teacher.factors(batch)
    logits: list[Tensor] = []
    for student in students:
        images = normalise_images(batch.pixels_BHWC, student.input.mean, student.input.std, device)
        with autocast(device, dtype):
            logits.append(student.predict(images, given).double())
    return torch.stack(logits)
