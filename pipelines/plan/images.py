"""What images cost a build, measured on the user's own, and what to do if they are the limit."""

from __future__ import annotations

from dataclasses import dataclass, replace

from atcache.choices import Decoding
from atcache.images.source import SampleIndex
from atcache.views.policy import ViewPolicy

from ..build.calibrate import render_calibration_views
from .verdict import Machine, number

_TIMED_SAMPLES = 32
_WORTH_SAYING = 0.9
"""The share of the time that reduced decoding must take at most to be advised."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ImageCost:
    """What a view costs one processor core: to read, decode and augment its image."""

    decoding: Decoding
    """What the plan was asked for."""
    view_ms: float
    """With that decoding."""
    reduced_view_ms: float | None
    """With reduced decoding; None if that is what `view_ms` is."""
    num_workers: int


def measure_images(index: SampleIndex, policy: ViewPolicy, num_workers: int) -> ImageCost:
    """Time views of some samples in this process.

    The decodings are compared on images that were just read: reading them takes both equally long, and whoever comes
    second would otherwise be spared it.

    Args:
        index: the samples.
        policy: how views are drawn.
        num_workers: processes that will load images.
    """

    def view_ms(decoding: Decoding) -> float:
        wanted = replace(policy, decoding=decoding)
        return 1e3 * render_calibration_views(index, wanted, _TIMED_SAMPLES, skip_bad=True).render_s

    asked_ms, reduced_ms = view_ms(policy.decoding), None
    if policy.decoding != "reduced":
        reduced_ms = asked_ms - max(0.0, view_ms(policy.decoding) - view_ms("reduced"))
    return ImageCost(decoding=policy.decoding, view_ms=asked_ms, reduced_view_ms=reduced_ms, num_workers=num_workers)


def say_image_cost(cost: ImageCost, machine: Machine, build_limits: frozenset[str], *, stores_pixels: bool) -> str:
    """A sentence or more: what images cost, whether they limit the build, and what to do about it.

    Args:
        cost: what was measured.
        machine: its speeds, with the loading of images.
        build_limits: what building waits for with each codec setting.
        stores_pixels: whether the cache is to keep the images.
    """
    loads = cost.num_workers * 1e3 / cost.view_ms if machine.load_img_per_s is None else machine.load_img_per_s
    workers = f"{cost.num_workers} worker{'s' * (cost.num_workers > 1)}"
    costs = (
        f"Images cost {number(cost.view_ms)} ms a view on one core, so {workers} make {number(loads)} views/s; the "
        f"teacher takes {number(machine.teacher_img_per_s)} views/s."
    )
    if "loading images" not in build_limits:
        return f"{costs} They do not limit the build."
    advice: list[str] = []
    if not machine.shares_processors:
        advice.append("raise --workers if there are cores left")
    if cost.reduced_view_ms is not None and cost.reduced_view_ms < _WORTH_SAYING * cost.view_ms:
        advice.append(f"take --decoding reduced, {number(cost.reduced_view_ms)} ms a view on these images")
    if not stores_pixels:
        advice.append("take --pixels store, with which at least training decodes none")
    what_to_do = f": {'; or '.join(advice)}" if advice else ""
    return f"{costs} They limit the build{what_to_do}."
