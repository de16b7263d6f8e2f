"""A server of a folder, and a block cache of its own for each test."""

from __future__ import annotations

import pytest
from range_server import FolderServer

from atcache.files.remote import block_cache, remote_file


@pytest.fixture
def blocks_dir(tmp_path, monkeypatch):
    """A folder of its own for the blocks of this test, and for those of the processes it starts."""
    folder = tmp_path / "blocks"
    monkeypatch.setenv("ATCACHE_BLOCKS_DIR", str(folder))
    monkeypatch.setenv("ATCACHE_BLOCKS_GIB", "0.01")
    monkeypatch.setattr(block_cache, "_shared", None)
    monkeypatch.setattr(remote_file, "_claims", None)
    return folder


@pytest.fixture
def server(tmp_path, blocks_dir):
    folder = tmp_path / "served"
    folder.mkdir()
    with FolderServer(folder) as server:
        yield server
