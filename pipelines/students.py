"""Students of the four modes behind one interface, and what they are given with each batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, replace
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from atcache.attention.capture import FactorCapture, find_blocks
from atcache.attention.factors import FactorGeometry
from atcache.attention.joined import JoinedFactors
from atcache.attention.pairing import OF_VALUES, Pairing, TeacherFactors, What, check_student
from atcache.attention.transfer import CachedFactors, CopyStudent, DistilledStudent, LiveFactors
from atcache.cache import stored_coder
from atcache.codecs import Coder, codec_from_json
from atcache.errors import ConfigError
from atcache.loader import Batch, Codes
from atcache.store.reader import CacheReader
from atcache.teachers import InputConfig, ModelName, create_student, input_config
from atcache.views import ViewPolicy

from .calibrate import TeacherRun

Mode = Literal["copy", "distill", "scratch", "finetune"]
MODES: tuple[Mode, ...] = ("copy", "distill", "scratch", "finetune")


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Student:
    """A model being trained or evaluated, whatever its mode."""

    mode: Mode
    module: nn.Module
    """What is trained and saved: the timm model itself, or the wrapper that gives it attention."""
    model: nn.Module
    """The timm model inside, whose parameters are optimised."""
    input: InputConfig
    """The pixels' size and normalisation."""
    num_classes: int
    """Outputs of its head."""
    pairing: Pairing | None = None
    """What it is given of a teacher, and where; None for scratch and finetune."""

    def train_step(
        self, images: Tensor, label_B: Tensor, teacher: TeacherFactors | None, label_smoothing: float
    ) -> tuple[Tensor, Tensor | None]:
        """The label loss, and the attention loss of a distilled student (None for the others), in nats.

        `label_B` may also be probabilities (batch, class), for images that show two samples.
        """
        attention_loss = None
        if self.mode == "distill":
            logits, attention_loss = self.module(images, teacher)
        else:
            logits = self.predict(images, teacher)
        return F.cross_entropy(logits.float(), label_B, label_smoothing=label_smoothing), attention_loss

    def predict(self, images: Tensor, teacher: TeacherFactors | None) -> Tensor:
        """Class logits. Only copying students need the teacher to predict."""
        return self.module(images, teacher) if self.mode == "copy" else self.model(images)

    def averaged(self, module: nn.Module) -> Student:
        """The same student with another module of its kind: a moving average of it."""
        model = module if self.module is self.model else module.get_submodule("model")
        return replace(self, module=module, model=model)


def make_student(
    mode: Mode,
    name: ModelName,
    num_classes: int,
    *,
    geometry: FactorGeometry | None,
    pairing: Pairing | None = None,
    drop_path: float = 0.0,
    weights: Mapping[str, Tensor] | None = None,
) -> Student:
    """A student with fresh weights (from torch's global generator), or the given ones.

    Args:
        mode: what it does with the teacher's attention.
        name: its timm architecture.
        num_classes: outputs of its head.
        geometry: the teacher's; needed for copy and distill.
        pairing: what of it is transferred, and where; None gives all to a student of the teacher's shape.
        drop_path: stochastic depth.
        weights: a state dict to begin with, for fine-tuning; the head stays fresh.

    Raises:
        TeacherError: the teacher's factors do not fit the student.
    """
    model = create_student(name, num_classes, weights=weights, drop_path=drop_path)
    config = input_config(model)
    if mode in ("scratch", "finetune"):
        return Student(mode=mode, module=model, model=model, input=config, num_classes=num_classes)
    if geometry is None:
        raise ConfigError(f"mode {mode} needs the teacher's attention: give --cache.")
    pairing = pairing or Pairing.equal(geometry)
    capture = FactorCapture(model.eval(), with_values=pairing.needs_values)
    capture(torch.zeros(1, 3, config.height, config.width))
    check_student(geometry, capture.geometry, pairing, student_name=str(name))
    wrapper = CopyStudent if mode == "copy" else DistilledStudent
    module = wrapper(model, find_blocks(model), pairing)
    return Student(mode=mode, module=module, model=model, input=config, num_classes=num_classes, pairing=pairing)


def check_views_fit(student: Student, reader: CacheReader) -> None:
    """Refuse a cache whose views are not of the student's size.

    Raises:
        ConfigError: naming both sizes.
    """
    policy = ViewPolicy.from_json(reader.attributes["views"]["policy"])
    if (policy.image_height, policy.image_width) != (student.input.height, student.input.width):
        raise ConfigError(
            f"the views of {reader.path} are {policy.image_height} x {policy.image_width} pixels, the student takes "
            f"{student.input.height} x {student.input.width}. Give --student with img_size={policy.image_height}."
        )


class CacheTeacher:
    """Gives each batch its teacher's factors, decoded from the batch's codes, those of each cache by its own codec."""

    def __init__(self, readers: Sequence[CacheReader], pairings: Sequence[Pairing], device: torch.device) -> None:
        """Take the caches in the order of their rows, and what students are given of them.

        Raises:
            ConfigError: a student is given q or k, and a cache's are in another basis than the teacher's; or v, and a
                cache has none.
        """
        self._device = device
        layers = sorted({layer for pairing in pairings for layer in pairing.teacher_layers})
        whats: set[What] = {pairing.what for pairing in pairings}
        self._coders = [_coder(reader, whats - {"map"}, device) for reader in readers]
        self.code_layers = tuple(_code_layers(coder, layers) for coder in self._coders)
        """For each cache, the rows of L to read."""

    def factors(self, batch: Batch) -> TeacherFactors:
        """The factors of a batch that came with codes."""
        assert batch.codes, "batches for a cache's teacher are read with codes"
        parts = [self._part(codes) for codes in batch.codes]
        if len(parts) == 1:
            return parts[0]
        return JoinedFactors(parts, [torch.from_numpy(codes.row_B).to(self._device) for codes in batch.codes])

    def _part(self, codes: Codes) -> CachedFactors:
        codes_BLTC = codes.codes_BLTC.to(self._device, non_blocking=True)
        return CachedFactors(self._coders[codes.part], codes_BLTC, self.code_layers[codes.part].start)


def _coder(reader: CacheReader, factors: Set[What], device: torch.device) -> Coder:
    """A cache's coder, which must give the teacher's own `factors` where there are any."""
    codec = codec_from_json(reader.attributes["codec"])
    coder = stored_coder(reader, codec, FactorGeometry.from_json(reader.attributes["geometry"]), str(device))
    if (of_values := sorted(factors & OF_VALUES)) and not coder.geometry.v_head_dim:
        raise ConfigError(
            f"--what {of_values[0]} needs the teacher's v, which {reader.path} does not hold. Build it with --store v, "
            "or train with another --what."
        )
    if factors and not coder.factors_are_teachers:
        raise ConfigError(
            f"--what {min(factors)} needs the teacher's own q and k, but codec {codec.name} of {reader.path} keeps no "
            "more of them than their maps. Build it with --codec int8 or exact, or train without --what."
        )
    return coder


def _code_layers(coder: Coder, layers: Sequence[int]) -> slice:
    """The rows of L that these blocks are decoded from. One range is one read; what is between them comes along."""
    rows = [coder.code_layer(coder.geometry.layers.index(layer)) for layer in layers]
    return slice(min(rows), max(rows) + 1)


class LiveTeacher:
    """Gives each batch its teacher's factors by running the teacher: what a cache replaces, kept for comparison."""

    def __init__(
        self, run: TeacherRun, heads: Sequence[int], layers: Sequence[int], *, with_values: bool = False
    ) -> None:
        self._run = run
        self._capture = FactorCapture(run.teacher.model, layers, heads, with_values=with_values)
        self._heads = tuple(heads)

    def factors(self, batch: Batch) -> TeacherFactors:
        """The factors of a batch's pixels."""
        layers = self._run.factors(self._capture, batch.pixels_BHWC)
        return LiveFactors(dict(zip(self._capture.layers, layers, strict=True)), self._heads)
