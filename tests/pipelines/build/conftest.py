"""What the tests of building share."""

from __future__ import annotations

import pytest

from atcache.pipelines.build.config import BuildConfig


@pytest.fixture
def config(digits_build) -> BuildConfig:
    return digits_build
