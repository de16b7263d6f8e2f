"""A training step never waits for the device: whatever it needs to know of its batch, it is told by the host."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from atcache.feed.loader import BatchStream
from atcache.pipelines.train.data import open_training_data
from atcache.pipelines.train.student_run import TrainingRun

MODES = ["scratch", "copy", "distill"]
EVERYTHING = {
    "clip_grad": 1.0,
    "ema": 0.9,
    "drop_path": 0.1,
    "student_jitter": 0.4,
    "label_smoothing": 0.1,
    "accumulate": 2,
    "layer_decay": 0.9,
}
WAITING = {
    "aten::_local_scalar_dense",
    "aten::equal",
    "aten::is_nonzero",
    "aten::item",
    "aten::masked_select",
    "aten::nonzero",
    "aten::one_hot",
    "aten::unique_dim",
    "aten::_unique2",
}
"""Operations whose result, or its shape, the host has to read."""


class NothingIsRead(TorchDispatchMode):
    """Refuses all operations for which a GPU would have to be waited for; counts the others."""

    def __init__(self):
        super().__init__()
        self.num_calls = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name
        indices = args[1] if name.startswith("aten::index") and isinstance(args[1], (list, tuple)) else []
        has_mask = any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in indices)
        assert name not in WAITING, f"{name} waits for the device"
        assert not has_mask, f"{name} with a mask waits for the device"
        self.num_calls += 1
        return func(*args, **(kwargs or {}))


def run_and_batch(config, device="cpu"):
    """A run, and its second batch, after a step on the first."""
    (data,) = open_training_data([config], torch.device(device))
    run = TrainingRun(config, data, torch.device(device))
    first, second = BatchStream(data.views, data.label_S, data.order, num_steps=2)
    run.train_step(first.pin_memory() if device == "cuda" else first)
    return run, second.pin_memory() if device == "cuda" else second


def test_the_check_finds_what_waits():
    for waits in (lambda x: float(x[0]), lambda x: x[x > 0], lambda x: x.nonzero(), lambda x: bool(x.any())):
        with pytest.raises(AssertionError, match="waits for the device"), NothingIsRead():
            waits(torch.ones(3))


@pytest.mark.parametrize("mode", MODES)
def test_no_step_reads_anything_from_the_device(config_for, mode, tiny_cache):
    run, batch = run_and_batch(config_for(mode, cache=tiny_cache(codec="transform"), precision="bf16", **EVERYTHING))
    # What the host has to know of a batch it reads before the batch is sent.
    batch = run.on_device(batch)
    with NothingIsRead() as calls:
        run.train_step(batch)
    assert calls.num_calls > 100


def test_no_step_on_mixed_views_from_two_caches_reads_anything(config_for, tiny_cache, digits_tars):
    mixed = {"mixup": 0.2, "policy": "crop-flip"}
    codecs = ("int8", "exact")
    caches = tuple(
        tiny_cache(codec=codec, data=str(tar), **mixed) for codec, tar in zip(codecs, digits_tars, strict=False)
    )
    run, batch = run_and_batch(config_for("copy", cache=caches))
    assert batch.is_mixed
    assert len(batch.codes) == 2
    batch = run.on_device(batch)
    with NothingIsRead():
        run.train_step(batch)


SOME_HEADS = [("copy", {"heads": "1"}), ("distill", {"heads": "1"})]


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("mode", "fields"), [*((mode, fields) for mode in MODES for fields in ({}, EVERYTHING)), *SOME_HEADS]
)
def test_no_step_waits_for_a_gpu(config_for, mode, fields, tiny_cache):
    config = replace(
        config_for(mode, cache=tiny_cache(codec="transform"), **fields), device="cuda", precision="bf16", compile=False
    )
    run, batch = run_and_batch(config, "cuda")
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        run.train_step(batch)
    finally:
        torch.cuda.set_sync_debug_mode("default")
