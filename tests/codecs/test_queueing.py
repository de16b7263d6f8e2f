"""Capture and encoding are queued without a look at the device; finishing takes copies, of all views or of some."""

from __future__ import annotations

import math

import pytest
import torch
from made_factors import make_factors, make_geometry
from torch.utils._python_dispatch import TorchDispatchMode

from atcache.attention.capture import FactorCapture
from atcache.attention.factors import LayerMaps
from atcache.codecs.registry import parse_codec
from atcache.codecs.transform.escapes import find_escapes
from atcache.errors import CodecError
from atcache.teachers.run import TeacherRun

NAMES = ["exact", "exact:dtype=float32", "int8", "logmap", "transform"]
LOOKS = ("_local_scalar_dense", "nonzero", "masked_select", "_unique2", "is_nonzero", "equal", "lift_fresh")
"""Operations that a host waits for on a GPU: numbers it reads, shapes that depend on values, constants it sends."""


class NoLooks(TorchDispatchMode):
    """Refuses what would wait for a GPU; on a CPU too."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.name().removeprefix("aten::").partition(".")[0]
        assert name not in LOOKS, f"{name} waits for the device"
        if name == "index":
            assert all(index is None or index.dtype != torch.bool for index in args[1]), "a mask waits for the device"
        return func(*args, **(kwargs or {}))


def coder_of(name, geometry, layers):
    codec = parse_codec(name)
    return codec.coder(geometry, codec.fit(geometry, [layers]))


def test_looks_are_noticed():
    tensor = torch.arange(3.0)
    looks = (
        lambda: float(tensor.sum()),
        lambda: tensor[tensor > 1],
        lambda: torch.tensor([1]),
        lambda: bool(tensor[0]),
    )
    for look in looks:
        with pytest.raises(AssertionError, match="waits for the device"), NoLooks():
            look()


@pytest.mark.parametrize("name", NAMES)
def test_queueing_does_not_look_at_the_device(name):
    geometry = make_geometry()
    layers = make_factors(geometry, batch=3)
    coder = coder_of(name, geometry, layers)
    coder.queue(layers)  # makes what is made once
    with NoLooks():
        queued = coder.queue(layers)
    whole = queued.settle(queued.parts, queued.is_fine_N)
    codes_BLTC = coder.encode(layers)
    for view in range(3):
        assert torch.equal(coder.finish([part[view : view + 1] for part in whole]), codes_BLTC[view : view + 1])


@pytest.mark.parametrize("heads", [None, "1"])
def test_running_a_teacher_does_not_look_at_the_device(heads, tiny_vit, tiny_weights):
    run = TeacherRun.load(tiny_vit, tiny_weights, device="cpu", precision="fp32")
    layers, chosen = run.select(None, heads)
    capture = FactorCapture(run.teacher.model, layers, chosen)
    pixels_BHWC = torch.randint(0, 256, (2, 8, 8, 3), dtype=torch.uint8)
    expected = run.factors(capture, pixels_BHWC)
    with NoLooks():
        found = run.factors(capture, pixels_BHWC)
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one.q_BHTD, other.q_BHTD)


@pytest.mark.parametrize("name", ["exact", "int8", "transform"])
def test_what_does_not_fit_is_told_of_when_it_is_settled(name):
    geometry = make_geometry()
    layers = make_factors(geometry)
    coder = coder_of(name, geometry, layers)
    coder.queue(layers)  # makes what is made once
    layers[1].q_BHTD[0, 0, 0, 0] = math.nan
    with NoLooks():
        queued = coder.queue(layers)
    with pytest.raises(
        CodecError, match=r"layer 2: a factor (is|of size) nan.* Check the teacher's weights and precision"
    ):
        queued.settle(queued.parts, queued.is_fine_N)


def test_rows_that_are_no_distributions_are_told_of_when_they_are_settled():
    geometry = make_geometry()
    maps = [LayerMaps(attn_BHQK=layer.maps()) for layer in make_factors(geometry)]
    maps[1].attn_BHQK[0, 0, 0, 0] = -0.1
    queued = coder_of("logmap", geometry, maps).queue(maps)
    with pytest.raises(CodecError, match="layer 2: a row of a map is not a distribution"):
        queued.settle(queued.parts, queued.is_fine_N)


def test_views_with_more_escapes_than_were_listed_are_packed_all_the_same():
    """Views far larger than those of the fit: all of their integers escape, more than the device lists at first."""
    geometry = make_geometry(head_dim=16, grid=(6, 6))
    layers, large = make_factors(geometry, batch=8), make_factors(geometry, batch=2, size=200.0)
    coder = coder_of("transform", geometry, layers)
    queued = coder.queue(large)
    assert int(queued.parts[3].max()) > queued.parts[1].shape[1], "or this tests nothing"
    codes_BLTC = coder.finish(queued.settle([part.clone() for part in queued.parts], queued.is_fine_N))
    assert torch.equal(codes_BLTC, coder.encode(large))
    rows = coder.packing.open(codes_BLTC.squeeze(2))
    for position, walked in enumerate(coder.walk(large)):
        stored_TJ = coder.is_stored_LTJ[position, :, : walked.codes_BTJ.shape[2]]
        assert torch.equal(rows.layer(position), walked.codes_BTJ * stored_TJ)


@pytest.mark.parametrize("capacity", [1, 3, 50])
def test_escapes_are_the_first_ones_and_all_are_counted(capacity):
    missing_BS = torch.zeros(3, 50, dtype=torch.int32)
    for cell in (4, 7, 49):
        missing_BS[1, cell] = 100 + cell
    missing_BS[2] = 5
    place_BK, missing_BK, num_B = find_escapes(missing_BS, capacity)
    assert num_B.tolist() == [0, 3, 50]
    count = min(capacity, 3)
    assert place_BK[1, :count].tolist() == [4, 7, 49][:count]
    assert missing_BK[1, :count].tolist() == [104, 107, 149][:count]
    assert place_BK[2].tolist() == list(range(capacity))
