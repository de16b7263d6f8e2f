"""Ways to store a teacher's attention, all measured in the same way: bytes in a cache, fidelity and speed."""

from __future__ import annotations

import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
import torch
from map_compressors import FLOOR, MapCompressor
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from atcache.attention.blocks import find_blocks
from atcache.attention.calls import AttentionCall, MapCall
from atcache.attention.capture import CaptureCheck
from atcache.attention.factors import LayerAttention, LayerMaps
from atcache.attention.geometry import FactorGeometry
from atcache.attention.intercept import AttentionIntercept
from atcache.codecs.base import Codec
from atcache.codecs.fidelity import row_kl
from atcache.pipelines.build.calibrate import calibrate
from atcache.pipelines.build.sizes import plan_codes
from atcache.store.chunks import decompress_into
from atcache.store.shard_size import plan_layers_per_chunk
from atcache.store.writer import encode_view
from atcache.students.attend import attend_with_given
from atcache.students.teacher_side import CachedFactors
from atcache.teachers.devices import autocast
from atcache.teachers.run import TeacherRun

INDEX_NBYTES = 16
"""Offset and length of one chunk in its shard's index."""
CHECKSUM_NBYTES = 4
_CALIBRATION_BATCH = 32  # the default of `atcache build`

Kind = Literal["codec", "factors", "maps"]
"""One of atcache's codecs, or a rival: one that stores factors, or a compressor of maps."""


class Way(Protocol):
    """One way to store the attention of views."""

    name: str
    family: str
    """The method without its setting; all settings of a method have the same family."""
    kind: Kind
    fit_s: float
    """Seconds that fitting took, with the forwards that it asked the teacher for; 0 if nothing is fitted."""
    state_nbytes: int
    """Bytes of what was fitted. A cache holds them once."""
    decode_macs_per_view: int | None
    """Multiply-adds that decode all layers of a view; None if the way does not say."""

    def prepare(self, layers: Sequence[LayerAttention]) -> Any:
        """The input of `encode`. Making it is not timed: users of maps have maps, and users of factors have factors."""

    def encode(self, prepared: Any) -> list[list[list[bytes]]]:
        """For each view and each of its chunks, the parts of the chunk's bytes."""

    def decode(self, stored: list[list[list[bytes]]]) -> list[LayerAttention]:
        """The attention of each layer, from only the stored bytes."""

    def chunk_nbytes(self, parts: list[bytes]) -> int:
        """Bytes of a chunk in a cache, including its checksum and its entry in the index."""


class CodecWay:
    """A codec, fitted and stored as in a build."""

    kind = "codec"

    def __init__(self, name: str, codec: Codec, run: TeacherRun, pixels_NHWC: Tensor) -> None:
        # Only the target is a setting. Other values of the other fields make another family.
        method = re.sub(r"target_\w+=[^,]*,?", "", name).strip(":,")
        self.name, self.family = name, method if name.startswith("transform") else name.partition(":")[0]
        timed: Any = _TimedFit(codec)
        calibration = calibrate(run, timed, pixels_NHWC, layers=None, heads=None, batch_size=_CALIBRATION_BATCH)
        self._coder = calibration.coder
        self.fit_s, self.state_nbytes = timed.fit_s, calibration.state_nbytes
        self.decode_macs_per_view = self._coder.decode_macs_per_view
        self._layout, _ = plan_codes(calibration.codes_BLTC.numpy())

    def prepare(self, layers):
        return list(layers)

    def encode(self, prepared):
        codes_BLTC = self._coder.encode(prepared).numpy()
        return [[[chunk] for chunk in encode_view(self._layout, codes_LTC)] for codes_LTC in codes_BLTC]

    def decode(self, stored):
        layout, step = self._layout, self._layout.layers_per_chunk
        # The compressor's name says whether a chunk has all tokens of one component together.
        is_transposed = layout.compressor.startswith("transpose")
        sides = (layout.num_tokens, layout.num_components)
        codes_BLxx = np.empty(
            (len(stored), layout.num_layers, *(sides[::-1] if is_transposed else sides)), layout.codes_dtype
        )
        for codes_Lxx, chunks in zip(codes_BLxx, stored, strict=True):
            for number, (chunk,) in enumerate(chunks):
                target = codes_Lxx[number * step : (number + 1) * step].reshape(-1).view(np.uint8)
                decompress_into(chunk, layout.compressor, target)
        codes_BLTC = torch.from_numpy(codes_BLxx.swapaxes(2, 3) if is_transposed else codes_BLxx)
        decoder = CachedFactors(self._coder, codes_BLTC)
        return [decoder.layer(block) for block in self._coder.geometry.layers]

    def chunk_nbytes(self, parts):
        return sum(map(len, parts)) + INDEX_NBYTES  # the checksum is in the store's chunks already


class _TimedFit:
    """A codec that keeps how many seconds its `fit` took: `calibrate` does much else."""

    def __init__(self, codec: Codec) -> None:
        self._codec, self.fit_s = codec, 0.0

    def fit(self, *args, **kwargs):
        start_s = time.perf_counter()
        state = self._codec.fit(*args, **kwargs)
        self.fit_s = time.perf_counter() - start_s
        return state

    def __getattr__(self, name: str) -> Any:
        return getattr(self._codec, name)


class MapWay:
    """A compressor of maps, with as many layers in a chunk as the store would choose."""

    kind = "maps"
    fit_s, state_nbytes, decode_macs_per_view = 0.0, 0, None

    def __init__(self, compressor: MapCompressor, geometry: FactorGeometry) -> None:
        self.name, self.family = compressor.name, compressor.family
        self._compressor = compressor
        tokens = geometry.tokens.num_tokens
        layer_nbytes = geometry.map_nbytes // len(geometry.layers)
        self._step = plan_layers_per_chunk(layer_nbytes, len(geometry.layers))
        self._chunk_shape = (self._step, len(geometry.heads), tokens, tokens)

    def prepare(self, layers):
        return torch.stack([layer.maps() for layer in layers], dim=1).numpy()

    def encode(self, prepared):
        starts = range(0, prepared.shape[1], self._step)
        return [
            [self._compressor.encode(attn_LHQK[start : start + self._step]) for start in starts]
            for attn_LHQK in prepared
        ]

    def decode(self, stored):
        views = [
            np.concatenate([self._compressor.decode(parts, self._chunk_shape) for parts in chunks]) for chunks in stored
        ]
        return [LayerMaps(attn_BHQK=torch.from_numpy(np.stack(layer))) for layer in zip(*views, strict=True)]

    def chunk_nbytes(self, parts):
        return sum(map(len, parts)) + INDEX_NBYTES + CHECKSUM_NBYTES


@dataclass(frozen=True, kw_only=True, slots=True)
class Measured:
    """The results of one way on the held-back views: a row of the table."""

    name: str
    family: str
    kind: Kind
    nbytes_per_view: float
    """Bytes of the chunks, including their checksums and their entries in the index."""
    times_smaller: float
    """Bytes of the same maps as uncompressed float16, divided by `nbytes_per_view`."""
    row_kl_nats: float
    """Mean KL(A || decoded A) over all rows."""
    row_kl_p99_nats: float
    """The KL that 99% of the rows do not exceed."""
    total_variation: float
    """Half of the absolute difference, summed over keys: a mean over all rows."""
    injected_error: float
    """Relative error of the teacher's final features if it attends with decoded attention."""
    top1_agreement: float | None
    """Share of views that keep their top class with decoded attention; None if the teacher has no trained head."""
    encode_views_per_s: float
    encode_mb_per_s: float
    """Megabytes of float16 maps a second, on one core."""
    decode_views_per_s: float
    decode_mb_per_s: float
    decode_ms: float
    """Milliseconds to decode all layers of a view on one core."""
    teacher_forward_ms: float
    """Milliseconds of the teacher's forward of a view on one core, timed in turns with decoding."""
    decode_macs_per_view: int | None
    """Multiply-adds that decode a view, if the way says how many."""
    state_nbytes: int
    fit_s: float

    @property
    def decode_per_forward(self) -> float:
        """Time to decode a view over the time of the teacher's forward of it."""
        return self.decode_ms / self.teacher_forward_ms


class Scales:
    """Measures ways on the same held-back views, a few at a time.

    Args:
        run: the teacher.
        check: the geometry of its factors, and which inputs codecs may want.
        pixels_NHWC: the held-back views, uint8.
        batch_size: views whose maps are in memory at a time.
        has_classes: whether the teacher has a trained head, so that its top class means something.
    """

    def __init__(
        self, run: TeacherRun, check: CaptureCheck, pixels_NHWC: Tensor, batch_size: int, *, has_classes: bool
    ) -> None:
        geometry = check.geometry
        self._run, self._geometry, self._has_classes = run, geometry, has_classes
        self._batches = list(pixels_NHWC.split(batch_size))
        self._num_views = len(pixels_NHWC)
        self._capture = run.capture(geometry, check.input_calls)
        self._own = [self._final(pixels_BHWC, None) for pixels_BHWC in self._batches]

    def teacher_macs(self) -> int:
        """Multiply-adds of the teacher's forward of one view: those of matrix products, attention and convolutions."""
        with FlopCounterMode(display=False) as counted:
            self._forward(self._batches[0][:1])
        return counted.get_total_flops() // 2

    def measure(self, way: Way) -> Measured:
        """Encode, decode and compare every view."""
        nbytes, encode_s, decode_s, forward_s, same_top1 = 0, 0.0, 0.0, 0.0, 0
        squared_error = squared_norm = 0.0
        row_kls: list[np.ndarray] = []
        variations: list[float] = []
        way.decode(way.encode(way.prepare(self._run.factors(self._capture, self._batches[0]))))  # warms up
        for pixels_BHWC, (features, top1_B) in zip(self._batches, self._own, strict=True):
            layers = self._run.factors(self._capture, pixels_BHWC)
            prepared = way.prepare(layers)
            start_s = time.perf_counter()
            stored = way.encode(prepared)
            encode_s += time.perf_counter() - start_s
            start_s = time.perf_counter()
            decoded = way.decode(stored)
            decode_s += time.perf_counter() - start_s
            start_s = time.perf_counter()
            self._forward(pixels_BHWC)
            forward_s += time.perf_counter() - start_s
            nbytes += sum(way.chunk_nbytes(parts) for chunks in stored for parts in chunks)
            for layer, back in zip(layers, decoded, strict=True):
                positive = _without_zeros(back)
                row_kls.append(row_kl(layer, positive).numpy().reshape(-1))
                difference = layer.log_maps(torch.float64).exp() - positive.log_maps(torch.float64).exp()
                variations.append(float(difference.abs().sum(-1).sum()) / 2)
            injected, injected_top1_B = self._final(pixels_BHWC, dict(zip(self._geometry.layers, decoded, strict=True)))
            squared_error += float((injected - features).square().sum())
            squared_norm += float(features.square().sum())
            if top1_B is not None and injected_top1_B is not None:
                same_top1 += int((top1_B == injected_top1_B).sum())
        row_kl_R = np.concatenate(row_kls)
        nbytes_per_view = nbytes / self._num_views
        map_megabytes = self._geometry.map_nbytes / 1e6
        return Measured(
            name=way.name,
            family=way.family,
            kind=way.kind,
            nbytes_per_view=nbytes_per_view,
            times_smaller=self._geometry.map_nbytes / nbytes_per_view,
            row_kl_nats=max(0.0, float(row_kl_R.mean(dtype=np.float64))),
            row_kl_p99_nats=max(0.0, float(np.percentile(row_kl_R, 99))),
            total_variation=sum(variations) / len(row_kl_R),
            injected_error=(squared_error / squared_norm) ** 0.5,
            top1_agreement=None if self._own[0][1] is None else same_top1 / self._num_views,
            encode_views_per_s=self._num_views / encode_s,
            encode_mb_per_s=self._num_views * map_megabytes / encode_s,
            decode_views_per_s=self._num_views / decode_s,
            decode_mb_per_s=self._num_views * map_megabytes / decode_s,
            decode_ms=1e3 * decode_s / self._num_views,
            teacher_forward_ms=1e3 * forward_s / self._num_views,
            decode_macs_per_view=way.decode_macs_per_view,
            state_nbytes=way.state_nbytes,
            fit_s=way.fit_s,
        )

    def mean_map_kl(self, pixels_NHWC: Tensor) -> float:
        """Mean row KL of the held-back views' maps from the mean map of these other views.

        It shows how much of the maps does not depend on the image.
        """
        sums: list[Tensor] = [torch.zeros(()) for _ in self._geometry.layers]
        for pixels_BHWC in pixels_NHWC.split(len(self._batches[0])):
            layers = self._run.factors(self._capture, pixels_BHWC)
            sums = [total + layer.maps().sum(dim=0) for total, layer in zip(sums, layers, strict=True)]
        kls: list[float] = []
        for pixels_BHWC in self._batches:
            for layer, total in zip(self._run.factors(self._capture, pixels_BHWC), sums, strict=True):
                mean = LayerMaps(attn_BHQK=(total / len(pixels_NHWC)).expand(len(pixels_BHWC), -1, -1, -1))
                kls.append(float(row_kl(layer, _without_zeros(mean)).mean()))
        return sum(kls) / len(kls)

    def _forward(self, pixels_BHWC: Tensor) -> None:
        """The teacher's forward as its user would run it, from pixels to the end."""
        with torch.inference_mode(), autocast(self._run.device, self._run.dtype):
            self._run.teacher.model(self._run.images(pixels_BHWC))

    def _final(self, pixels_BHWC: Tensor, decoded: Mapping[int, LayerAttention] | None) -> tuple[Tensor, Tensor | None]:
        """The teacher's final features and its top classes, if it has any; with the decoded attention, if given."""
        model: Any = self._run.teacher.model

        def attend(call: AttentionCall | MapCall) -> Tensor:
            if decoded is None or call.block not in decoded:
                return call.run()
            return attend_with_given(call, decoded[call.block], self._geometry.heads)

        with torch.inference_mode(), autocast(self._run.device, self._run.dtype):
            with AttentionIntercept(find_blocks(model), attend):
                features: Tensor = model.forward_features(self._run.images(pixels_BHWC))
            top1_B = model.forward_head(features).argmax(-1) if self._has_classes else None
        return features.float(), top1_B


def _without_zeros(attention: LayerAttention) -> LayerAttention:
    """Maps with zeros raised to `FLOOR`, so that KL is finite. Factors are unchanged: a softmax gives no zeros."""
    if not isinstance(attention, LayerMaps):
        return attention
    attn_BHQK = attention.attn_BHQK.double().clamp_min(FLOOR)
    return LayerMaps(attn_BHQK=attn_BHQK / attn_BHQK.sum(-1, keepdim=True))
