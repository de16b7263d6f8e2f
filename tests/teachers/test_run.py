"""What a running teacher says if its device is too small."""

from __future__ import annotations

import pytest
import torch
from builds import picture, write_tar
from foreign_models import COLOURS, SIZES, HandWrittenViT, PackedFused

import atcache
from atcache.attention.capture import FactorCapture
from atcache.errors import ConfigError
from atcache.teachers.run import TeacherRun

PIXELS_BHWC = torch.zeros(8, 32, 32, 3, dtype=torch.uint8)


class Hungry(HandWrittenViT):
    """Takes more memory than there is for batches of more than four images."""

    def forward(self, images):
        if len(images) > 4:
            self.fill(images)
        return super().forward(images)

    def fill(self, images):
        images.new_empty(len(images), 2**50)


class HungryOnGpu(Hungry):
    def fill(self, images):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 8.00 EiB.")  # there is no GPU to fill


class Broken(Hungry):
    def fill(self, images):
        raise RuntimeError("a bug of the module's own")


def run_of(module_class):
    teacher = atcache.own_teacher(module_class(PackedFused), **SIZES, **COLOURS)
    run = TeacherRun.load(teacher, None, device="cpu", precision="fp32")
    return run, FactorCapture(run.teacher.model)


@pytest.mark.parametrize("module_class", [Hungry, HungryOnGpu])
def test_a_batch_that_does_not_fit_in_memory_is_told_in_a_sentence(module_class):
    run, capture = run_of(module_class)
    with pytest.raises(ConfigError) as raised:
        run.factors(capture, PIXELS_BHWC)
    assert str(raised.value) == (
        f"{run.teacher.name}: a batch of 8 images does not fit in the memory of device cpu. Give a smaller "
        "--batch-size (in Python batch_size=), or another --device."
    )
    assert len(run.factors(capture, PIXELS_BHWC[:4])) == 2


def test_another_error_of_the_teacher_stays_what_it_is():
    run, capture = run_of(Broken)
    with pytest.raises(RuntimeError, match="a bug of the module's own"):
        run.factors(capture, PIXELS_BHWC)


def test_a_build_whose_batches_do_not_fit_goes_through_with_smaller_ones(tmp_path):
    tar = write_tar(tmp_path / "train-0000.tar", [{"jpg": picture(seed, side=40), "cls": b"1"} for seed in range(12)])
    given = {
        "teacher": atcache.own_teacher(Hungry(PackedFused), **SIZES, **COLOURS),
        "data": str(tar),
        "out": tmp_path / "own.zarr",
        "codec": "int8",
        "workers": 0,
        "device": "cpu",
        "precision": "fp32",
        "calibration_samples": 8,
    }
    with pytest.raises(ConfigError, match=r"a batch of \d images does not fit in the memory of device cpu\."):
        atcache.build(**given, batch_size=8)
    assert atcache.build(**given, batch_size=4).num_built_views == 12
