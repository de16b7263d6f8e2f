"""What a user would otherwise choose to store maps: probabilities, quantised and then compressed by a general tool.

Every compressor decodes from only its bytes and the shape of the maps. Rows of lossy ones are made to sum to 1 again.
pcodec and ZFP are included if their packages are installed (`pip install -e '.[bench]'`).
"""

from __future__ import annotations

import importlib.util
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numcodecs import blosc, zstd

FLOOR = 2.0**-24
"""The smallest float16. In KL, probabilities rounded to 0 count as this, because against 0 it would be infinite."""
_ZSTD_LEVEL, _BLOSC_LEVEL, _PCODEC_LEVEL = 3, 5, 8
_FLOAT16_MANTISSA_BITS = 10

MANTISSA_BITS = (6, 4, 3, 2, 1, 0)
LOG_STEPS_NATS = (0.05, 0.1, 0.2, 0.35, 0.5, 0.7, 1.0)
TOP_K = (16, 32)
ZFP_ACCURACIES = (1e-5, 1e-4, 1e-3, 1e-2)
ZFP_LOG_ACCURACIES_NATS = (0.1, 0.3, 1.0, 3.0)

Arrays = Sequence[np.ndarray]


@dataclass(frozen=True, kw_only=True, slots=True)
class Packer:
    """A lossless compressor of arrays."""

    name: str
    pack: Callable[[np.ndarray], bytes]
    unpack: Callable[[bytes, np.dtype], np.ndarray]
    """Turns bytes and a dtype into a flat array."""


class Quantiser(ABC):
    """Turns maps into arrays with fewer different values, and back."""

    name: str
    """With the setting; for the table."""
    family: str
    """Without the setting; each family is one curve in the plot."""

    @abstractmethod
    def layout(self, shape_LHQK: tuple[int, ...]) -> list[tuple[str, tuple[int, ...]]]:
        """Dtype and shape of each array that `quantise` makes from maps of this shape."""

    @abstractmethod
    def quantise(self, attn_LHQK: np.ndarray) -> list[np.ndarray]:
        """The arrays from which `restore` can make the float32 maps."""

    @abstractmethod
    def restore(self, arrays: Arrays, shape_LHQK: tuple[int, ...]) -> np.ndarray:
        """The float32 maps; rows sum to 1."""


class MapCompressor(ABC):
    """Turns the float32 maps of some layers of one view into bytes, and back."""

    name: str
    family: str

    @abstractmethod
    def encode(self, attn_LHQK: np.ndarray) -> list[bytes]:
        """The maps' bytes, in one or more parts."""

    @abstractmethod
    def decode(self, parts: list[bytes], shape_LHQK: tuple[int, ...]) -> np.ndarray:
        """The maps, float32, from only their bytes and shape."""


class Float16(Quantiser):
    """float16 with a mantissa rounded to this many bits, so that the error is relative to the value."""

    def __init__(self, mantissa_bits: int = _FLOAT16_MANTISSA_BITS) -> None:
        self._dropped = _FLOAT16_MANTISSA_BITS - mantissa_bits
        self.family = "rounded float16"
        self.name = f"float16, {mantissa_bits} bits of mantissa" if self._dropped else "float16"

    def layout(self, shape_LHQK):
        return [("float16", shape_LHQK)]

    def quantise(self, attn_LHQK):
        halves = attn_LHQK.astype(np.float16)
        if self._dropped:
            # Rounding: add half of the last kept bit, then cut. A carry goes into the exponent, which is right.
            bits = halves.view(np.uint16) + np.uint16(1 << (self._dropped - 1))
            halves = (bits & np.uint16(0xFFFF << self._dropped & 0xFFFF)).view(np.float16)
        return [halves]

    def restore(self, arrays, shape_LHQK):
        return normalised_rows(arrays[0].astype(np.float32))


class LinearUint8(Quantiser):
    """Probability times 255, rounded."""

    name = family = "linear uint8"

    def layout(self, shape_LHQK):
        return [("uint8", shape_LHQK)]

    def quantise(self, attn_LHQK):
        return [np.rint(attn_LHQK * 255).astype(np.uint8)]

    def restore(self, arrays, shape_LHQK):
        return normalised_rows(arrays[0].astype(np.float32))


class LogSteps(Quantiser):
    """-log p in whole steps; a p below `FLOOR` counts as `FLOOR`."""

    family = "log-quantised"

    def __init__(self, step_nats: float) -> None:
        self._step = step_nats
        self._dtype = np.dtype(np.uint8 if -math.log(FLOOR) / step_nats <= 255 else np.uint16)
        self.name = f"log-quantised, step {step_nats:g}"

    def layout(self, shape_LHQK):
        return [(self._dtype.name, shape_LHQK)]

    def quantise(self, attn_LHQK):
        return [np.rint(np.log(np.maximum(attn_LHQK, FLOOR)) * (-1 / self._step)).astype(self._dtype)]

    def restore(self, arrays, shape_LHQK):
        (codes,) = arrays
        values = np.exp(np.arange(int(codes.max()) + 1) * -self._step).astype(np.float32)
        return normalised_rows(values[codes])


class TopK(Quantiser):
    """The k largest values of a row as float16, and their positions. The others are 0, or share the rest evenly."""

    def __init__(self, k: int, *, share_rest: bool = False) -> None:
        self._k, self._share_rest = k, share_rest
        self.family = "top-k, rest even" if share_rest else "top-k"
        self.name = self.family.replace("k", str(k), 1)

    def layout(self, shape_LHQK):
        k = min(self._k, shape_LHQK[-1])
        shape = (*shape_LHQK[:-1], k)
        return [("float16", shape), ("uint8" if shape_LHQK[-1] <= 256 else "uint16", shape)]

    def quantise(self, attn_LHQK):
        (_, shape), (index_dtype, _) = self.layout(attn_LHQK.shape)
        num_dropped = attn_LHQK.shape[-1] - shape[-1]
        # Sorted by key, which compresses better than sorted by size.
        kept = np.sort(np.argpartition(attn_LHQK, num_dropped - 1 if num_dropped else 0, -1)[..., num_dropped:], -1)
        return [np.take_along_axis(attn_LHQK, kept, -1).astype(np.float16), kept.astype(index_dtype)]

    def restore(self, arrays, shape_LHQK):
        values, kept = arrays
        attn_LHQK = np.zeros(shape_LHQK, np.float32)
        if self._share_rest and (num_dropped := shape_LHQK[-1] - values.shape[-1]):
            attn_LHQK += np.maximum(0, 1 - values.sum(-1, keepdims=True, dtype=np.float32)) / num_dropped
        np.put_along_axis(attn_LHQK, kept.astype(np.int64), values.astype(np.float32), -1)
        return normalised_rows(attn_LHQK)


class Packed(MapCompressor):
    """A quantiser's arrays, each compressed by the same lossless compressor."""

    def __init__(self, quantiser: Quantiser, packer: Packer) -> None:
        self._quantiser, self._packer = quantiser, packer
        self.name = f"{quantiser.name} + {packer.name}"
        self.family = f"{quantiser.family} + {packer.name}"

    def encode(self, attn_LHQK):
        return [self._packer.pack(array) for array in self._quantiser.quantise(attn_LHQK)]

    def decode(self, parts, shape_LHQK):
        arrays = [
            self._packer.unpack(part, np.dtype(dtype)).reshape(shape)
            for part, (dtype, shape) in zip(parts, self._quantiser.layout(shape_LHQK), strict=True)
        ]
        return self._quantiser.restore(arrays, shape_LHQK)


class Zfp(MapCompressor):
    """ZFP at a fixed absolute accuracy, for probabilities or their logarithms. All rows form one 2-D field."""

    def __init__(self, accuracy: float, *, of_logs: bool) -> None:
        self._accuracy, self._of_logs = accuracy, of_logs
        self.family = "ZFP of logarithms" if of_logs else "ZFP"
        self.name = f"{self.family}, accuracy {accuracy:g}"

    def encode(self, attn_LHQK):
        import zfpy

        fields = np.log(np.maximum(attn_LHQK, FLOOR)) if self._of_logs else attn_LHQK
        # ZFP's blocks span 4 numbers along each axis, and neighbouring heads are unrelated, so heads get no axis.
        flat = np.ascontiguousarray(fields, np.float32).reshape(-1, fields.shape[-1])
        return [zfpy.compress_numpy(flat, tolerance=self._accuracy, write_header=True)]

    def decode(self, parts, shape_LHQK):
        import zfpy

        fields = zfpy.decompress_numpy(parts[0]).reshape(shape_LHQK)
        return normalised_rows(np.exp(fields) if self._of_logs else np.maximum(fields, 0))


def normalised_rows(attn_LHQK: np.ndarray) -> np.ndarray:
    """Rows that sum to 1, float32; a row of zeros becomes uniform."""
    sums = attn_LHQK.sum(-1, keepdims=True, dtype=np.float32)
    return np.where(sums > 0, attn_LHQK / np.where(sums > 0, sums, 1), np.float32(1 / attn_LHQK.shape[-1]))


def _pack_pcodec(array: np.ndarray) -> bytes:
    from pcodec import ChunkConfig, standalone

    wide = array.astype(np.uint16) if array.dtype == np.uint8 else array  # pcodec has no good mode for bytes
    return standalone.simple_compress(wide.reshape(-1), ChunkConfig(compression_level=_PCODEC_LEVEL))


def _unpack_pcodec(data: bytes, dtype: np.dtype) -> np.ndarray:
    from pcodec import standalone

    unpacked = standalone.simple_decompress(data)
    assert unpacked is not None
    return unpacked.astype(dtype, copy=False)


ZSTD = Packer(
    name="zstd",
    pack=lambda array: bytes(zstd.compress(np.ascontiguousarray(array), _ZSTD_LEVEL)),
    unpack=lambda data, dtype: np.frombuffer(zstd.decompress(data), dtype),
)
BLOSC = Packer(
    name="blosc",
    pack=lambda array: bytes(blosc.compress(np.ascontiguousarray(array), b"zstd", _BLOSC_LEVEL, blosc.BITSHUFFLE, 0)),
    unpack=lambda data, dtype: np.frombuffer(blosc.decompress(data), dtype),
)
PCODEC = Packer(name="pcodec", pack=_pack_pcodec, unpack=_unpack_pcodec)


def map_compressors() -> tuple[list[MapCompressor], dict[str, str]]:
    """All compressors whose packages are installed; and, by name, why the others are missing."""
    missing = {
        name: f"package {package} is not installed (pip install -e '.[bench]')"
        for name, package in (("pcodec", "pcodec"), ("ZFP", "zfpy"))
        if importlib.util.find_spec(package) is None
    }
    packers = [ZSTD, BLOSC] + ([] if "pcodec" in missing else [PCODEC])
    found: list[MapCompressor] = [Packed(Float16(), packer) for packer in packers]
    found += [Packed(Float16(bits), packer) for packer in packers[1:] for bits in MANTISSA_BITS]
    found += [Packed(LogSteps(step), packer) for packer in packers for step in LOG_STEPS_NATS]
    found.append(Packed(LinearUint8(), ZSTD))
    found += [Packed(TopK(k, share_rest=share), ZSTD) for share in (False, True) for k in TOP_K]
    if "ZFP" not in missing:
        found += [Zfp(accuracy, of_logs=False) for accuracy in ZFP_ACCURACIES]
        found += [Zfp(accuracy, of_logs=True) for accuracy in ZFP_LOG_ACCURACIES_NATS]
    return found, missing
