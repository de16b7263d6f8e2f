"""Students of the four modes behind one interface."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from atcache.attention.blocks import find_blocks
from atcache.attention.capture import FactorCapture
from atcache.attention.geometry import FactorGeometry
from atcache.cache.record import CacheRecord
from atcache.choices import Mode
from atcache.errors import ConfigError
from atcache.store.reader import CacheReader
from atcache.students.copy import CopyStudent
from atcache.students.distil import DistilledStudent
from atcache.students.pairing import Pairing, TeacherFactors, check_student, plan_pairing
from atcache.teachers.inputs import InputConfig, input_config
from atcache.teachers.load import create_student
from atcache.teachers.names import ModelName


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
    """Outputs of its head; 0 if it has none."""
    pairing: Pairing | None = None
    """What it is given of a teacher, and where; None in the modes scratch and finetune."""

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

    def attention_loss(self, images: Tensor, teacher: TeacherFactors | None) -> Tensor:
        """The attention loss of a distilled student alone, for which no labels are needed."""
        assert self.mode == "distill", "checked by the caller's config"
        return self.module(images, teacher)[1]

    def predict(self, images: Tensor, teacher: TeacherFactors | None) -> Tensor:
        """Class logits. Only copying students need the teacher to predict."""
        return self.module(images, teacher) if self.mode == "copy" else self.model(images)

    def averaged(self, module: nn.Module) -> Student:
        """The same student with another module of its kind: a moving average of it."""
        model = module if self.module is self.model else module.get_submodule("model")
        return replace(self, module=module, model=model)


def new_student(
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
        num_classes: outputs of its head; 0 for none.
        geometry: the teacher's geometry; needed for copy and distill.
        pairing: what is transferred, and where; None transfers all to a student of the teacher's shape.
        drop_path: the largest rate of stochastic depth.
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
    pairing = pairing or plan_pairing(geometry)
    capture = FactorCapture(model.eval(), with_values=pairing.needs_values)
    capture(torch.zeros(1, 3, config.height, config.width))
    check_student(geometry, capture.geometry, pairing, student_name=str(name))
    wrapper = CopyStudent if mode == "copy" else DistilledStudent
    module = wrapper(model, find_blocks(model), pairing)
    return Student(mode=mode, module=module, model=model, input=config, num_classes=num_classes, pairing=pairing)


def check_views_fit(student: Student, reader: CacheReader) -> None:
    """Refuse a cache whose views are not of the student's size.

    Raises:
        ConfigError: the sizes differ; the message names both.
    """
    policy = CacheRecord.of(reader).policy
    if (policy.image_height, policy.image_width) != (student.input.height, student.input.width):
        raise ConfigError(
            f"the views of {reader.path} are {policy.image_height} x {policy.image_width} pixels, the student takes "
            f"{student.input.height} x {student.input.width}. Give --student with img_size={policy.image_height}; for "
            f"a finished run, give a cache whose views are {student.input.height} x {student.input.width}, or --data."
        )
