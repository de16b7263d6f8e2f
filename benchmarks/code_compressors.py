"""The size of a cache's codes with other compressors, orders and integer widths, and how fast each is.

    python benchmarks/code_compressors.py CACHE [--views 32]

Each chunk is compressed as the store would compress it. "entropy" is the order-0 entropy of the codes with one table
for each component: what an ideal coder without context would need. Speeds are for one thread. Integers that do not fit
a width are clipped. This changes few of them, so it hardly changes the size.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numcodecs import blosc, zstd

import atcache
from atcache.codecs.base import Coder
from atcache.codecs.transform.coder import TransformCoder
from atcache.codecs.transform.packing import entropy_bits
from atcache.store.chunks import compress, decompress_into
from atcache.store.layout import GZIP


@dataclass(frozen=True, kw_only=True, slots=True)
class Candidate:
    """One way to compress a chunk."""

    name: str
    by_component: bool
    """Whether all tokens of a component are together in memory, instead of all components of a token."""
    dtype: str | None
    """The dtype of codes; None for that of the cache."""
    compress: Callable[[np.ndarray], bytes]
    decompress: Callable[[bytes, np.ndarray], object]


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The parsed options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cache")
    parser.add_argument("--views", type=int, default=32)
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print a table."""
    options = parse(arguments)
    blosc.use_threads = False
    cache = atcache.open(options.cache)
    layout = cache.reader.layout
    stored = np.flatnonzero(cache.reader.status_VS[0] == 1)
    samples = stored[np.linspace(0, len(stored) - 1, min(len(stored), options.views)).astype(int)]
    codes_BLTC = np.stack([cache.reader.read_codes(0, int(sample)) for sample in samples])
    print(
        f"{len(samples)} views of {options.cache}: codec {cache.codec.to_json()}, "
        f"{layout.num_layers} x {layout.num_tokens} x {layout.num_components} {layout.codes_dtype}\n"
    )
    print("| stored as | bytes a view | compress ms a view | decompress ms a view |\n|---|--:|--:|--:|")
    print(f"| entropy | {_entropy_nbytes(cache.coder, codes_BLTC):,.0f} | | |")
    for candidate in _candidates():
        print(_row(candidate, codes_BLTC, layout.layers_per_chunk))


def _candidates() -> Iterator[Candidate]:
    def shuffled(shuffle: int, level: int) -> Callable[[np.ndarray], bytes]:
        return lambda chunk: blosc.compress(chunk, b"zstd", level, shuffle, 0)

    for by_component in (False, True):
        for name, shuffle in (("byte shuffle", blosc.SHUFFLE), ("bitshuffle", blosc.BITSHUFFLE)):
            yield Candidate(
                name=f"blosc zstd, {name}",
                by_component=by_component,
                dtype=None,
                compress=shuffled(shuffle, 5),
                decompress=blosc.decompress,
            )
        yield Candidate(
            name="zstd",
            by_component=by_component,
            dtype=None,
            compress=lambda chunk: zstd.compress(chunk, 1),
            decompress=zstd.decompress,
        )
    for dtype in ("uint8", "int16"):
        yield Candidate(
            name=f"blosc zstd, byte shuffle, {dtype}",
            by_component=True,
            dtype=dtype,
            compress=shuffled(blosc.SHUFFLE, 5),
            decompress=blosc.decompress,
        )
    yield Candidate(
        name="gzip as a cache has it",
        by_component=False,
        dtype=None,
        compress=lambda chunk: compress(chunk, GZIP),
        decompress=lambda packed, out: decompress_into(packed, GZIP, out.reshape(-1).view(np.uint8)),
    )
    for level in (3, 9):
        yield Candidate(
            name=f"blosc zstd level {level}, byte shuffle",
            by_component=True,
            dtype=None,
            compress=shuffled(blosc.SHUFFLE, level),
            decompress=blosc.decompress,
        )
    try:
        from pcodec import ChunkConfig, standalone
    except ImportError:
        return
    yield Candidate(
        name="pcodec",
        by_component=True,
        dtype="int16",
        compress=lambda chunk: standalone.simple_compress(chunk.reshape(-1), ChunkConfig()),
        decompress=lambda packed, out: standalone.simple_decompress_into(packed, out.reshape(-1)),
    )


def _row(candidate: Candidate, codes_BLTC: np.ndarray, layers_per_chunk: int) -> str:
    dtype = np.dtype(candidate.dtype or codes_BLTC.dtype)
    largest = np.iinfo(dtype).max
    nbytes = 0
    compress_s: list[float] = []
    decompress_s: list[float] = []
    for codes_LTC in codes_BLTC:
        ordered = codes_LTC.swapaxes(1, 2) if candidate.by_component else codes_LTC
        chunks = [
            np.ascontiguousarray(chunk.clip(max=largest), dtype=dtype)
            for chunk in np.split(ordered, len(ordered) // layers_per_chunk)
        ]
        start_s = time.perf_counter()
        packed = [candidate.compress(chunk) for chunk in chunks]
        middle_s = time.perf_counter()
        unpacked = [np.empty_like(chunk) for chunk in chunks]
        for part, out in zip(packed, unpacked, strict=True):
            candidate.decompress(part, out)
        decompress_s.append(time.perf_counter() - middle_s)
        compress_s.append(middle_s - start_s)
        assert all(np.array_equal(chunk, out) for chunk, out in zip(chunks, unpacked, strict=True)), candidate.name
        nbytes += sum(map(len, packed))
    order = "by component" if candidate.by_component else "by token"
    times = f"{1e3 * statistics.median(compress_s):.3f} | {1e3 * statistics.median(decompress_s):.3f}"
    return f"| {candidate.name}, {order} | {nbytes / len(codes_BLTC):,.0f} | {times} |"


def _entropy_nbytes(coder: Coder, codes_BLTC: np.ndarray) -> float:
    return sum(map(entropy_bits, _integers(coder, codes_BLTC))) / 8 / len(codes_BLTC)


def _integers(coder: Coder, codes_BLTC: np.ndarray) -> Iterator[np.ndarray]:
    """Each layer's integers, codes_BTC. Those of codec transform are unpacked first."""
    if not isinstance(coder, TransformCoder):
        yield from codes_BLTC.swapaxes(0, 1)
        return
    rows = coder.packing.open(torch.from_numpy(codes_BLTC).squeeze(2))
    yield from (rows.layer(position).numpy() for position in range(len(coder.layers)))


if __name__ == "__main__":
    main()
