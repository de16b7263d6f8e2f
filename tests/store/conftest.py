"""What the tests of the store share: a small cache, to be read or to be damaged."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from made_store import build


@pytest.fixture(scope="session")
def pristine(tmp_path_factory):
    return build(tmp_path_factory.mktemp("pristine") / "cache.zarr")


@pytest.fixture
def cache(pristine, tmp_path):
    """A copy that a test may damage."""
    return Path(shutil.copytree(pristine, tmp_path / "cache.zarr"))
