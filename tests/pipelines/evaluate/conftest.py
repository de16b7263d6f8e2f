"""Finished runs, and the cache that they were validated on."""

from __future__ import annotations

from pathlib import Path

import pytest

from atcache.pipelines.train.config import TrainConfig
from atcache.pipelines.train.run import train


@pytest.fixture(scope="session")
def val_cache(tiny_cache) -> Path:
    return tiny_cache(policy="eval", codec="exact:dtype=float32", pixels="store")


@pytest.fixture(scope="session")
def runs(tiny_cache, val_cache, tmp_path_factory):
    """Finished runs by mode, and the validation each ended with."""
    folder = tmp_path_factory.mktemp("runs")
    cache = tiny_cache(codec="exact:dtype=float32")
    common = {"cache": cache, "val_cache": val_cache, "steps": 40, "batch_size": 24, "base_lr": 3e-2}
    place = {"device": "cpu", "precision": "fp32", "validate_every": 0}
    configs = {
        "copy": TrainConfig(mode="copy", out=folder / "copy", **common, **place),
        "copy-1": TrainConfig(mode="copy", out=folder / "copy-1", layers="1", **common, **place),
        "distill": TrainConfig(mode="distill", out=folder / "distill", **common, **place),
        "scratch": TrainConfig(mode="scratch", out=folder / "scratch", **common, **place),
    }
    return {name: (config.out, train(config).validation) for name, config in configs.items()}
