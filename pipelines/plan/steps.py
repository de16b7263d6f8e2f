"""Times a student's training steps, and any other call, in a few seconds."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from atcache.attention.geometry import FactorGeometry
from atcache.choices import Mode
from atcache.errors import ConfigError
from atcache.students.pairing import TeacherFactors
from atcache.students.student import Student, new_student
from atcache.teachers.devices import training_autocast
from atcache.teachers.inputs import normalise_images
from atcache.teachers.names import parse_model_name
from atcache.teachers.run import TeacherRun

from .config import PlanConfig

_SECONDS_A_SPEED = 4.0
_MAX_CALLS = 5


def seconds_a_call(call: Callable[[], object], device: torch.device) -> float:
    """Median time of a few calls after one that warms up; if that one takes long, its time alone."""

    def timed() -> float:
        start_s = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - start_s

    first_s = timed()
    if first_s > _SECONDS_A_SPEED:
        return first_s
    seconds: list[float] = []
    while not seconds or (len(seconds) < _MAX_CALLS and sum(seconds) < _SECONDS_A_SPEED):
        seconds.append(timed())
    return statistics.median(seconds)


class StudentSteps:
    """Times whole training steps: forward, backward and AdamW, on one batch that is already in memory."""

    def __init__(
        self, config: PlanConfig, run: TeacherRun, geometry: FactorGeometry, num_classes: int, pixels_BHWC: Tensor
    ) -> None:
        self._run, self._geometry, self._num_classes = run, geometry, num_classes
        self._name = parse_model_name(config.student or str(run.teacher.name))
        self.mode: Mode = config.mode
        self._pixels_BHWC = pixels_BHWC
        self._students: dict[Mode, tuple[Student, torch.optim.Optimizer]] = {}

    def img_per_s(self, mode: Mode, factors: Callable[[], TeacherFactors | None]) -> float:
        """Images per second in training steps that each call `factors` for the teacher's attention on the batch."""
        student, optimizer = self._student(mode)
        device = self._run.device
        label_B = torch.zeros(len(self._pixels_BHWC), dtype=torch.int64, device=device)

        def step() -> None:
            images = normalise_images(self._pixels_BHWC, student.input.mean, student.input.std, device)
            with training_autocast(student.model, device, self._run.dtype):
                label_loss, attention_loss = student.train_step(images, label_B, factors(), 0.0)
            loss = label_loss if attention_loss is None else label_loss + attention_loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        return len(self._pixels_BHWC) / seconds_a_call(step, device)

    def _student(self, mode: Mode) -> tuple[Student, torch.optim.Optimizer]:
        if mode not in self._students:
            geometry = self._geometry
            # A plan must not change the random numbers that its caller draws next.
            with torch.random.fork_rng(devices=[]):
                student = new_student(mode, self._name, self._num_classes, geometry=geometry)
            policy, wanted = self._pixels_BHWC.shape[1:3], (student.input.height, student.input.width)
            if tuple(policy) != wanted:
                raise ConfigError(
                    f"student {self._name} takes {wanted[0]} x {wanted[1]} pixels, but the teacher's views are "
                    f"{policy[0]} x {policy[1]}. Give --student with img_size={policy[0]}."
                )
            student.module.to(self._run.device).train()
            parameters = [parameter for parameter in student.model.parameters() if parameter.requires_grad]
            self._students[mode] = student, torch.optim.AdamW(parameters, lr=1e-6, fused=True)
        return self._students[mode]
