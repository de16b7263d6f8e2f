"""What `plan` says about images."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from made_tars import encoded, member, picture, write_tar
from range_server import FolderServer

from atcache.files.remote import block_cache, remote_file
from atcache.images.source import index_source
from atcache.pipelines.plan.images import ImageCost, measure_images, say_image_cost
from atcache.pipelines.plan.verdict import Machine
from atcache.views.policy import ViewPolicy

COST = ImageCost(decoding="full", view_ms=10, reduced_view_ms=4, num_workers=3)
MACHINE = Machine(teacher_img_per_s=900, student_img_per_s=1, load_img_per_s=300, write_nbytes_per_s=1, free_nbytes=1)
LIMITS = frozenset({"loading images", "the disk"})


def own_blocks(folder: Path, monkeypatch) -> None:
    """Another block cache for this process."""
    monkeypatch.setenv("ATCACHE_BLOCKS_DIR", str(folder))
    monkeypatch.setattr(block_cache, "_shared", None)
    monkeypatch.setattr(remote_file, "_claims", None)


def say(cost: ImageCost = COST, machine: Machine = MACHINE, limits: frozenset[str] = LIMITS, *, stores=False) -> str:
    return say_image_cost(cost, machine, limits, stores_pixels=stores)


def test_the_cost_and_the_advice_are_said_where_images_limit_the_build():
    assert say() == (
        "Images cost 10 ms a view on one core, so 3 workers make 300 views/s; the teacher takes 900 views/s. "
        "They limit the build: raise --workers if there are cores left; or take --decoding reduced, 4 ms a view on "
        "these images; or take --pixels store, with which at least training decodes none."
    )


def test_no_advice_is_given_where_they_do_not():
    assert say(limits=frozenset({"compressing"})).endswith("900 views/s. They do not limit the build.")


def test_slow_reading_is_no_reason_for_reduced_decoding(tmp_path, monkeypatch):
    """The first views wait for a server, the next ones find their images on this machine."""
    members = [member(f"{seed}.png", encoded(picture(seed, size=(600, 600)))) for seed in range(6)]
    write_tar(tmp_path / "photos.tar", members)
    with FolderServer(tmp_path) as server:
        own_blocks(tmp_path / "while indexing", monkeypatch)
        index = index_source(f"{server.url}/photos.tar", labels="none")
        own_blocks(tmp_path / "nothing yet", monkeypatch)
        server.delay_s = 0.6
        cost = measure_images(index, ViewPolicy(name="eval", image_height=16, image_width=16), 1)
    assert cost.view_ms > 100
    assert 0.8 * cost.view_ms < cost.reduced_view_ms <= cost.view_ms


@pytest.mark.parametrize("reduced_ms", [None, 9.5])
def test_reduced_decoding_is_advised_only_where_it_saves_time(reduced_ms):
    assert "--decoding" not in say(replace(COST, reduced_view_ms=reduced_ms))


def test_what_cannot_help_is_not_advised():
    busy = replace(MACHINE, shares_processors=True)
    assert say(replace(COST, reduced_view_ms=None), busy, stores=True).endswith("They limit the build.")
