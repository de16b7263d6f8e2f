"""Containers often have 64 MB of /dev/shm. Building and training take none of it."""

from __future__ import annotations

import pickle
import shutil
import subprocess
import sys
from dataclasses import replace

import pytest

from atcache.pipelines.train.config import TrainConfig
from atcache.store.reader import CacheReader

ONE_PAGE = 'mount -t tmpfs -o size=4k tmpfs /dev/shm && exec "$@"'
RUN = """
import pickle, sys
from atcache.pipelines.build.run import build
from atcache.pipelines.train.run import train

if __name__ == "__main__":
    function, config = pickle.load(sys.stdin.buffer)
    {"build": build, "train": train}[function](config)
"""


def is_allowed() -> bool:
    if shutil.which("unshare") is None:
        return False
    return subprocess.run(["unshare", "-m", "sh", "-c", ONE_PAGE, "sh", "true"], capture_output=True).returncode == 0


def with_one_page(function, config) -> None:
    """Run it where /dev/shm holds one page."""
    command = ["unshare", "-m", "sh", "-c", ONE_PAGE, "sh", sys.executable, "-c", RUN]
    done = subprocess.run(command, input=pickle.dumps((function, config)), capture_output=True, timeout=300)
    assert done.returncode == 0, done.stderr.decode()
    assert "Traceback" not in done.stderr.decode()


@pytest.mark.skipif(not is_allowed(), reason="this user may not mount another /dev/shm (unshare -m)")
def test_building_and_training_with_workers_need_no_room_in_dev_shm(digits_build, tmp_path):
    config = replace(digits_build, workers=2, batch_size=32)
    with_one_page("build", config)
    assert CacheReader(config.out).is_complete
    run = TrainConfig(mode="copy", cache=config.out, out=tmp_path / "run", steps=6, batch_size=24, workers=2)
    with_one_page("train", run)
    assert (run.out / "model.safetensors").exists()
