"""Builds for tests: tars of made images, the command, and folders compared byte by byte."""

from __future__ import annotations

import io
import multiprocessing
from pathlib import Path

import numpy as np
import webdataset
from click.testing import CliRunner
from PIL import Image

from atcache.cli.main import cli
from atcache.pipelines.build.config import BuildConfig
from atcache.pipelines.build.run import build
from atcache.store.manifest import list_commits

# Processes that start in no time: their server has imported everything once, and knows nothing of pytest's threads.
CHILDREN = multiprocessing.get_context("forkserver")
CHILDREN.set_forkserver_preload(
    ["__main__", "atcache.pipelines.build.run", "atcache.cache.cache", "timm", "zarr", "dask.array"]
)


MIXED = {"mixup": 0.8, "cutmix": 1.0}


def files(path: Path) -> dict[str, bytes]:
    return {str(file.relative_to(path)): file.read_bytes() for file in path.rglob("*") if file.is_file()}


def differences(path: Path, expected: Path) -> list[str]:
    """Names of the files that are not the same in both folders."""
    ours, theirs = files(path), files(expected)
    return sorted(name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name))


def picture(seed: int, side: int = 8, kind: str = "JPEG") -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (side, side, 3), np.uint8)
    encoded = io.BytesIO()
    Image.fromarray(pixels).save(encoded, format=kind)
    return encoded.getvalue()


def write_tar(path: Path, samples: list[dict]) -> Path:
    with path.open("wb") as file, webdataset.TarWriter(file) as writer:
        for number, sample in enumerate(samples):
            writer.write({"__key__": f"sample-{number:03d}", **sample})
    return path


def run_cli(config: BuildConfig, **options: str):
    """`atcache build` as the config says; `options` replace or add."""
    names = ("teacher", "weights", "data", "out", "workers", "device", "precision", "samples_per_shard", "batch_size")
    given = {**{name: getattr(config, name) for name in names}, **options}
    arguments = [text for name, value in given.items() for text in (f"--{name.replace('_', '-')}", str(value))]
    return CliRunner().invoke(cli, ["build", *arguments])


def in_a_child(config, after_s=None, after_commits=None):
    """Exit code of a build in a process of its own, killed after a while or so many commits if it still runs."""
    child = CHILDREN.Process(target=build, args=(config,))
    child.start()
    while after_commits is not None and child.is_alive() and len(list_commits(config.out)) < after_commits:
        child.join(0.002)
    child.join(0 if after_commits is not None else after_s)
    child.kill()
    child.join()
    return child.exitcode
