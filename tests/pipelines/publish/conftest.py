"""A hub for the tests of push and pull."""

from __future__ import annotations

import os

import pytest
from dataset_hub import a_hub_in_use


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub that this process uses, logged in."""
    with a_hub_in_use(tmp_path, monkeypatch) as hub:
        yield hub


@pytest.fixture
def hub_settings(hub, tmp_path):
    """The environment of a process that uses the hub."""
    return {**os.environ, "HF_ENDPOINT": hub.url, "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(tmp_path / "home")}
