"""What a student predicts, and where it looks, on some validation samples.

Each pass stops after half a minute, so that a report never takes long. Samples come in a random order, the same each
time: the first ones are a fair choice.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from atcache import stats
from atcache.attention.capture import FactorCapture
from atcache.attention.tokens import TokenLayout
from atcache.errors import CacheMismatchError, UnsupportedAttentionError
from atcache.feed.batch import Batch
from atcache.feed.loader import validation_batches
from atcache.feed.sample_views import Views
from atcache.images.source import SampleIndex
from atcache.pictures import default_query, query_maps
from atcache.students.pairing import PairedFactors, Pairing
from atcache.students.student import Student
from atcache.students.teacher_side import CacheTeacher
from atcache.teachers.devices import autocast
from atcache.teachers.inputs import normalise_images
from atcache.teachers.record import TeacherRecord

from ..compare.run import KL_FLOOR
from ..train.scores import bins_of
from ..train.validation import ValidationSet

MOST_SECONDS = 30.0
"""Of each pass; one batch is always taken."""
_MOST_WRONG = 12
_MOST_PICTURES = 6
_PREDICTED_AT_ONCE, _COMPARED_AT_ONCE = 64, 8


@dataclass(frozen=True, kw_only=True, slots=True)
class Wrong:
    """A view whose class was not the first prediction."""

    sample_key: str
    image_HWC: np.ndarray
    label: int
    predicted: int
    confidence: float
    """Probability of the first prediction."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Predictions:
    """First predictions on some samples."""

    label_N: np.ndarray
    predicted_N: np.ndarray
    confidence_N: np.ndarray
    """Probability of the first prediction."""
    in_top5_N: np.ndarray
    loss_N: np.ndarray
    """Cross-entropy, in nats."""
    num_all: int
    """Samples that there are to predict."""
    wrong: tuple[Wrong, ...]
    """The most confidently wrong ones, worst first."""

    @property
    def correct_N(self) -> np.ndarray:
        """Which predictions are right."""
        return self.label_N == self.predicted_N

    @property
    def ece(self) -> float:
        """The expected calibration error of a `Score`, in percentage points."""
        bin_N = bins_of(torch.from_numpy(self.confidence_N)).numpy()
        gap_K = np.bincount(bin_N, weights=self.correct_N - self.confidence_N)
        return 100 * float(np.abs(gap_K).sum()) / len(bin_N)


@dataclass(frozen=True, kw_only=True, slots=True)
class Pictured:
    """A view, with where teacher and student look: maps over the patches, the mean of the heads of one layer."""

    sample_key: str
    image_HWC: np.ndarray
    label: int
    """-1 for none."""
    teacher_HW: np.ndarray | None
    student_HW: np.ndarray | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Agreement:
    """How near a student's own maps are to the teacher's: means over rows and views."""

    layers: tuple[int, ...]
    """The student's blocks."""
    heads: tuple[int, ...]
    """The student's heads."""
    kl_nats_LH: np.ndarray
    """KL(teacher || student)."""
    total_variation_LH: np.ndarray
    """Share of the attention that would have to move."""
    num_views: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Maps:
    """What was seen of maps."""

    layer: int
    """The student's block that is pictured."""
    query: str
    """The token whose row is pictured; "all" is the mean of all."""
    pictured: tuple[Pictured, ...]
    agreement: Agreement | None


def sample_key(indexes: Sequence[SampleIndex], row: int) -> str:
    """The key of a row of joined sample tables."""
    for index in indexes:
        if row < index.num_samples:
            return index.sample_key(row)
        row -= index.num_samples
    raise IndexError(row)


def some_of(sample_S: np.ndarray, most: int) -> np.ndarray:
    """At most so many rows, at random, always the same ones."""
    return np.random.default_rng(0).permutation(sample_S)[:most]


def in_time(batches: Iterator[Batch], seconds: float) -> Iterator[Batch]:
    """The batches that fit into a time, at least one."""
    start_s = time.monotonic()
    for batch in batches:
        yield batch
        if time.monotonic() - start_s > seconds:
            return


@torch.no_grad()
def predict(
    student: Student,
    data: ValidationSet,
    device: torch.device,
    dtype: torch.dtype,
    most: int,
    seconds: float = MOST_SECONDS,
) -> Predictions:
    """The predictions of a student on at most so many samples, in at most about so many seconds."""
    columns: list[Tensor] = []
    wrong: list[Wrong] = []
    batches = validation_batches(
        data.views, data.label_S, some_of(data.sample_S, most), batch_size=_PREDICTED_AT_ONCE, workers=0
    )
    for batch in in_time(batches, seconds):
        images = normalise_images(batch.pixels_BHWC, student.input.mean, student.input.std, device)
        given = None if data.teacher is None else data.teacher.factors(batch)
        with autocast(device, dtype):
            logits_BC = student.predict(images, given)
        log_BC = logits_BC.double().log_softmax(1).cpu()
        top = log_BC.topk(min(5, log_BC.shape[1]))
        label_B = batch.label_B.cpu()
        confidence_B, predicted_B = top.values[:, 0].exp(), top.indices[:, 0]
        in_top5_B = (top.indices == label_B[:, None]).any(1)
        loss_B = -log_BC.gather(1, label_B[:, None])[:, 0]
        columns.append(torch.stack([label_B, predicted_B, confidence_B, in_top5_B, loss_B]).double())
        for place in np.flatnonzero((predicted_B != label_B).numpy()).tolist():
            wrong.append(
                Wrong(
                    sample_key=sample_key(data.indexes, int(batch.sample_B[place])),
                    image_HWC=batch.pixels_BHWC[place].cpu().numpy(),
                    label=int(label_B[place]),
                    predicted=int(predicted_B[place]),
                    confidence=float(confidence_B[place]),
                )
            )
        wrong = sorted(wrong, key=lambda one: -one.confidence)[:_MOST_WRONG]
    label_N, predicted_N, confidence_N, in_top5_N, loss_N = torch.cat(columns, dim=1).numpy()
    return Predictions(
        label_N=label_N.astype(int),
        predicted_N=predicted_N.astype(int),
        confidence_N=confidence_N,
        in_top5_N=in_top5_N.astype(bool),
        loss_N=loss_N,
        num_all=len(data.sample_S),
        wrong=tuple(wrong),
    )


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Viewed:
    """Views to look at maps of."""

    views: Views
    label_S: np.ndarray
    sample_S: np.ndarray
    indexes: Sequence[SampleIndex]
    teacher: CacheTeacher | None
    """Gives the teacher's maps; None if there are none."""
    tokens: TokenLayout | None = None
    """The tokens of the teacher's maps; None without a teacher."""


class _TwoSides:
    """The maps of a student and of its teacher, layer by layer.

    Args:
        student: in eval mode. One that copies maps has none of its own.
        viewed: says whether there are maps of the teacher.
        device: where the student is.

    Raises:
        UnsupportedAttentionError: the student has no maps that could be seen.
    """

    def __init__(self, student: Student, viewed: Viewed, device: torch.device) -> None:
        self._student, self._teacher, self._device = student, viewed.teacher, device
        self._pairing = pairing = student.pairing
        self._capture: FactorCapture | None = None
        if student.mode == "copy":
            assert pairing is not None, "of all copying students"
            assert viewed.tokens is not None, "checked by the caller"
            self.layers, self.heads, self.tokens = pairing.student_layers, pairing.student_heads, viewed.tokens
            return
        self._capture = FactorCapture(student.model, None if pairing is None else list(pairing.student_layers))
        # Once on nothing, which says what maps there are.
        self._capture(torch.zeros(1, 3, student.input.height, student.input.width, device=device))
        geometry = self._capture.geometry
        self.layers, self.tokens = self._capture.layers, geometry.tokens
        self.heads = tuple(range(geometry.num_model_heads)) if pairing is None else pairing.student_heads

    def of(self, batch: Batch, places: Sequence[int]) -> Iterator[tuple[int, Tensor | None, Tensor | None]]:
        """For some places in `layers`: the place, the teacher's maps and the student's, attn_BHQK float32.

        If a cache keeps the first rows of maps only, the student's have these rows too.
        """
        own = None
        if self._capture is not None:
            mean, std = self._student.input.mean, self._student.input.std
            own = self._capture(normalise_images(batch.pixels_BHWC, mean, std, self._device))
        given = None
        if self._teacher is not None and self._pairing is not None:
            given = PairedFactors(self._teacher.factors(self._teacher.looked_at(batch)), self._pairing)
        for place in places:
            theirs_BHQK = None if given is None else given.layer(self.layers[place]).maps().float()
            ours_BHQK = None if own is None else own[place].select_heads(self.heads).maps().float()
            if theirs_BHQK is not None and ours_BHQK is not None:
                ours_BHQK = ours_BHQK[:, :, : theirs_BHQK.shape[2]]
            yield place, theirs_BHQK, ours_BHQK


@torch.no_grad()
def look_at_maps(
    student: Student,
    viewed: Viewed,
    device: torch.device,
    dtype: torch.dtype,
    most: int,
    seconds: float = MOST_SECONDS,
) -> Maps | None:
    """Pictures of a few maps and, of a distilled student, how near all its maps are to the teacher's.

    Args:
        student: in eval mode.
        viewed: the views, and their teacher.
        device: where the student is.
        dtype: the precision it computes in.
        most: views that are compared.
        seconds: about how long this may take.

    Returns:
        None if there are no maps that could be seen.
    """
    copies_maps = student.mode == "copy" and student.pairing is not None and student.pairing.what == "map"
    if student.mode == "copy" and not (copies_maps and viewed.teacher is not None):
        return None
    try:
        sides = _TwoSides(student, viewed, device)
    except UnsupportedAttentionError:
        return None
    compares = viewed.teacher is not None and student.mode == "distill"
    chosen = some_of(viewed.sample_S, most if compares else min(most, _MOST_PICTURES))
    last = len(sides.layers) - 1
    places = range(last + 1) if compares else (last,)
    sums_LH2 = np.zeros((len(sides.layers), len(sides.heads), 2))
    pictured: list[Pictured] = []
    num_views = 0
    batches = validation_batches(viewed.views, viewed.label_S, chosen, batch_size=_COMPARED_AT_ONCE, workers=0)
    for batch in in_time(batches, seconds):
        with autocast(device, dtype):
            for place, theirs_BHQK, ours_BHQK in sides.of(batch, places):
                if theirs_BHQK is not None and ours_BHQK is not None:
                    sums_LH2[place] += _distances(theirs_BHQK, ours_BHQK)
                if place == last:
                    found = _pictured(batch, viewed, sides.tokens, theirs_BHQK, ours_BHQK)
                    pictured += itertools.islice(found, _MOST_PICTURES - len(pictured))
        num_views += len(batch.sample_B)
    kl_nats_LH, total_variation_LH = np.moveaxis(sums_LH2 / max(1, num_views), -1, 0)
    agreement = Agreement(
        layers=sides.layers,
        heads=sides.heads,
        kl_nats_LH=kl_nats_LH,
        total_variation_LH=total_variation_LH,
        num_views=num_views,
    )
    return Maps(
        layer=sides.layers[-1],
        query=default_query(sides.tokens),
        pictured=tuple(pictured),
        agreement=agreement if compares else None,
    )


def _distances(theirs_BHQK: Tensor, ours_BHQK: Tensor) -> np.ndarray:
    """KL in nats and total variation of each head, means over rows and sums over views: shape (head, 2)."""
    kl_BHQ = stats.kl_divergence(theirs_BHQK.double(), ours_BHQK.double(), floor=KL_FLOOR)
    moved_BHQ = stats.total_variation(theirs_BHQK.double(), ours_BHQK.double())
    both: Tensor = torch.stack([kl_BHQ.mean(-1).sum(0), moved_BHQ.mean(-1).sum(0)], dim=-1)
    return both.cpu().numpy()


def _pictured(
    batch: Batch, viewed: Viewed, tokens: TokenLayout, theirs_BHQK: Tensor | None, ours_BHQK: Tensor | None
) -> Iterator[Pictured]:
    maps = [None if maps is None else maps.mean(dim=1).cpu().numpy() for maps in (theirs_BHQK, ours_BHQK)]
    query = [default_query(tokens)]
    for place, sample in enumerate(map(int, batch.sample_B)):
        seen = [None if maps_BQK is None else query_maps(maps_BQK[place], tokens, query) for maps_BQK in maps]
        yield Pictured(
            sample_key=sample_key(viewed.indexes, sample),
            image_HWC=batch.pixels_BHWC[place].cpu().numpy(),
            label=int(batch.label_B[place]),
            teacher_HW=seen[0],
            student_HW=seen[1],
        )


def check_teacher(given: TeacherRecord, cached: TeacherRecord, pairing: Pairing, place: object) -> None:
    """Refuse a cache of another teacher's maps, or without those that the student was trained with.

    Raises:
        CacheMismatchError: weights, layers or heads differ.
    """
    if given.weights_sha256 != cached.weights_sha256:
        raise CacheMismatchError(
            f"{place} holds maps of a teacher with other weights (sha256 {cached.weights_sha256[:12]}...) than the "
            f"student's ({given.weights_sha256[:12]}...). Give a validation cache that was built with that teacher."
        )
    for what, needed, stored in (
        ("layer", pairing.teacher_layers, cached.geometry.layers),
        ("head", pairing.teacher_heads, cached.geometry.heads),
    ):
        if missing := sorted(set(needed) - set(stored)):
            raise CacheMismatchError(
                f"{place} has no maps of {what} {missing[0]}, which the student was trained with. Give a validation "
                f"cache that was built with the --{what}s of the training cache."
            )
