"""What the tests of training share."""

from __future__ import annotations

import pytest

from atcache.pipelines.train.config import TrainConfig


@pytest.fixture
def config_for(tiny_cache, tmp_path):
    """A function: mode and fields -> the config of a short run, in a folder of its own."""
    numbers = iter(range(100))

    def config_for(mode, **fields) -> TrainConfig:
        common = {"cache": tiny_cache(), "out": tmp_path / f"run-{next(numbers)}", "steps": 20, "batch_size": 24}
        recipe = {"base_lr": 2e-2, "warmup_epochs": 1.0, "device": "cpu", "precision": "fp32", "validate_every": 0}
        return TrainConfig(mode=mode, **{**common, **recipe, **fields})

    return config_for
