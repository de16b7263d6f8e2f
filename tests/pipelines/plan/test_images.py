"""What `plan` says about images."""

from __future__ import annotations

from dataclasses import replace

import pytest

from atcache.pipelines.plan.images import ImageCost, say_image_cost
from atcache.pipelines.plan.verdict import Machine

COST = ImageCost(decoding="full", view_ms=10, reduced_view_ms=4, num_workers=3)
MACHINE = Machine(teacher_img_per_s=900, student_img_per_s=1, load_img_per_s=300, write_nbytes_per_s=1, free_nbytes=1)
LIMITS = frozenset({"loading images", "the disk"})


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


@pytest.mark.parametrize("reduced_ms", [None, 9.5])
def test_reduced_decoding_is_advised_only_where_it_saves_time(reduced_ms):
    assert "--decoding" not in say(replace(COST, reduced_view_ms=reduced_ms))


def test_what_cannot_help_is_not_advised():
    busy = replace(MACHINE, shares_processors=True)
    assert say(replace(COST, reduced_view_ms=None), busy, stores=True).endswith("They limit the build.")
