"""What the tests of verifying share: caches to be damaged."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest


@pytest.fixture
def cache(tiny_cache, tmp_path) -> Path:
    """A copy, to be damaged, of a cache whose views are replayed."""
    return shutil.copytree(tiny_cache(codec="int8", views=2), tmp_path / "digits.zarr")


@pytest.fixture
def stored(tiny_cache, tmp_path) -> Path:
    """A copy of a cache that keeps its images."""
    return shutil.copytree(tiny_cache(codec="int8", views=2, pixels="store"), tmp_path / "stored.zarr")
