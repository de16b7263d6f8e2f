"""Verifying in tests: looking at a cache, and damaging it in chosen ways."""

from __future__ import annotations

from pathlib import Path

from atcache.pipelines.build.config import BuildConfig
from atcache.pipelines.verify.config import VerifyConfig
from atcache.pipelines.verify.run import VerifySummary, verify
from atcache.store.chunks import compress
from atcache.store.layout import ZSTD
from atcache.store.manifest import read_commit
from atcache.store.reader import CacheReader
from atcache.store.writer import TaskWriter, encode_view, finish_cache

# The tasks of these caches are 2 views of 3 blocks of 20, 20 and 8 digits.
TASK, BLOCK_SIZE = "v0001-b000001", 20
CODES = "attention/codes/c/1/1/0/0/0"
RECORD = f"commits/{TASK}.json"


def look(cache: Path, **fields) -> VerifySummary:
    place = {"device": "cpu"} if "teacher" in fields else {}
    return verify(VerifyConfig(cache=cache, **{**place, **fields}))


def messages(summary: VerifySummary) -> list[str]:
    return [finding.message for finding in summary.problems]


def flip(file: Path, place: float, bit: int = 0x10) -> None:
    """Flip a bit of one byte; a place below 1 is a share of the file."""
    data = bytearray(file.read_bytes())
    data[int(len(data) * place) if isinstance(place, float) else place] ^= bit
    file.write_bytes(data)


def contents(path: Path) -> dict[str, bytes]:
    return {str(file.relative_to(path)): file.read_bytes() for file in path.rglob("*") if file.is_file()}


def rewrite_task(path, *, codes=None, pixels=None) -> None:
    """Write one task again with other codes or pixels: every checksum, record and total is right."""
    reader = CacheReader(path)
    layout, commit = reader.layout, read_commit(path, TASK)
    codes = codes or (lambda sample: reader.read_codes(1, sample))
    pixels = pixels or (lambda sample: reader.read_pixels(1, sample))
    writer = TaskWriter(path, layout, commit.task)
    for sample in range(commit.task.start, commit.task.stop):
        rgb = None if layout.rgb is None else compress(pixels(sample), ZSTD)
        writer.add(
            sample,
            status=reader.status(1, sample),
            parameters_P=reader.parameters(1, sample),
            pixel_hash=reader.pixel_hash(1, sample),
            chunks=encode_view(layout, codes(sample)),
            pixels_chunk=rgb,
        )
    writer.commit(commit.quality)
    finish_cache(path)


def build_config(teacher, weights, data, out) -> BuildConfig:
    """As the fixtures' caches were built."""
    return BuildConfig(
        teacher=teacher,
        weights=weights,
        data=str(data),
        out=out,
        codec="int8",
        views=2,
        samples_per_shard=20,
        workers=0,
        device="cpu",
        precision="fp32",
    )
