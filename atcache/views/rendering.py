"""From stored samples to the pixels of a view: drawn for the first time, or replayed and checked."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np

from atcache.errors import BadImageError, CacheMismatchError, CorruptCacheError
from atcache.images.source import Source
from atcache.images.tar_samples import Problem
from atcache.views.apply import library_versions, pixel_hash, render_alone
from atcache.views.draw import draw_view
from atcache.views.kept import Kept
from atcache.views.mixing import NOT_MIXED, Mix, draw_mix, mix_pixels, parse_mix
from atcache.views.policy import PARAMETER_NAMES, ViewPolicy

STORED = 1
"""The status of a view that was rendered; the others are `Problem`s."""


class Rendered(NamedTuple):
    """One view of one sample."""

    status: int
    """STORED, or the `Problem` that kept it from being rendered."""
    parameters_P: np.ndarray
    """What was drawn, float32, named by the policy's `parameter_names`; all 0 if nothing could be drawn."""
    pixel_hash: int
    """Hash of the pixels; 0 if there are none."""
    pixels_HWC: np.ndarray
    """uint8 (height, width, 3); all 0 if there are none."""


class Unmixed(NamedTuple):
    """One view of one sample before mixing."""

    parameters_P: np.ndarray
    """float32, named by `PARAMETER_NAMES`."""
    pixels_HWC: np.ndarray
    """uint8. Not to be written to."""


class Renderer:
    """Draws views and applies them. Equal arguments give equal views, whatever was rendered before.

    For one thread; copies for other processes are independent.

    Args:
        source: where the images are.
        policy: how views are drawn.
        skip_bad: return a problem as the status instead of raising.
        keep_nbytes: memory for views before mixing, which are kept because each may be mixed into others of its block.
    """

    def __init__(self, source: Source, policy: ViewPolicy, *, skip_bad: bool, keep_nbytes: int = 0) -> None:
        self._source, self._policy, self._skip_bad = source, policy, skip_bad
        self._keep_nbytes = keep_nbytes
        self._block: tuple[int, range] | None = None
        self._partner_S = np.empty(0, np.int64)
        self._kept = Kept[Unmixed](0)

    def render(self, sample: int, view: int, block: range | None = None) -> Rendered:
        """One view of one sample.

        Under a policy that mixes, the partner is a sample of `block` without a problem in the index. If the partner
        turns out to be undecodable and bad images are skipped, the view is not mixed.

        Args:
            sample: row of the source's index.
            view: which of the sample's views.
            block: rows it may be mixed with; None for all.

        Raises:
            BadImageError: the image or its partner cannot be read, and bad images are not skipped.
        """
        problem = int(self._source.index.problem_S[sample])
        if problem != Problem.NONE:
            return self._not_rendered(problem)
        self._enter(view, range(self._source.index.num_samples) if block is None else block)
        try:
            own = self._unmixed(sample, view)
        except BadImageError:
            if not self._skip_bad:
                raise
            return self._not_rendered(Problem.UNDECODABLE)
        if self._policy.mixing is None:
            return Rendered(STORED, own.parameters_P, pixel_hash(own.pixels_HWC), own.pixels_HWC)
        mix, pixels_HWC = self._mixed(own, sample, view)
        parameters_P = np.concatenate([own.parameters_P, np.array(mix, np.float32)])
        return Rendered(STORED, parameters_P, pixel_hash(pixels_HWC), pixels_HWC)

    def _enter(self, view: int, block: range) -> None:
        """On a new block or view, drop the kept views and find the rows that can be partners."""
        if self._policy.mixing is not None and self._block != (view, block):
            self._block = view, block
            good = self._source.index.problem_S[block.start : block.stop] == Problem.NONE
            self._partner_S = block.start + np.flatnonzero(good)
            self._kept = Kept[Unmixed](self._keep_nbytes)

    def _mixed(self, own: Unmixed, sample: int, view: int) -> tuple[Mix, np.ndarray]:
        mix = draw_view_mix(self._policy, self._source, sample, view, self._partner_S)
        if mix == NOT_MIXED:
            return NOT_MIXED, own.pixels_HWC
        try:
            partner = self._unmixed(sample + mix.partner, view)
        except BadImageError:
            if not self._skip_bad:
                raise
            return NOT_MIXED, own.pixels_HWC
        return mix, mix_pixels(own.pixels_HWC, partner.pixels_HWC, mix)

    def _unmixed(self, sample: int, view: int) -> Unmixed:
        return self._kept.get(sample, lambda: self._render_alone(sample, view), lambda value: value.pixels_HWC.nbytes)

    def _render_alone(self, sample: int, view: int) -> Unmixed:
        encoded = self._source.read_encoded(sample)
        parameters_P = draw_sample_view(self._policy, self._source, sample, view, encoded.height, encoded.width)
        return Unmixed(parameters_P, render_alone(encoded, parameters_P, self._policy))

    def _not_rendered(self, problem: int) -> Rendered:
        pixels_HWC = np.zeros((self._policy.image_height, self._policy.image_width, 3), np.uint8)
        return Rendered(int(problem), np.zeros(len(self._policy.parameter_names), np.float32), 0, pixels_HWC)


def draw_sample_view(
    policy: ViewPolicy, source: Source, sample: int, view: int, source_height: int, source_width: int
) -> np.ndarray:
    """The parameters of a view of a sample before mixing, float32, see `draw_view`; errors name the sample.

    Args:
        policy: how views are drawn.
        source: where the images are.
        sample: row of the source's index.
        view: which of the sample's views.
        source_height: the decoded image's height in pixels.
        source_width: the decoded image's width in pixels.

    Raises:
        BadImageError: the image is too long and thin for the policy; the message names tar and key.
    """
    try:
        return draw_view(policy, source.index.sample_key(sample), view, source_height, source_width)
    except BadImageError as error:
        raise BadImageError(f"{source.where(sample)}: {error}") from error


def draw_view_mix(policy: ViewPolicy, source: Source, sample: int, view: int, partner_S: np.ndarray) -> Mix:
    """What a policy mixes into a view, see `draw_mix`; always `NOT_MIXED` if the policy does not mix.

    Args:
        policy: how views are drawn.
        source: where the images are.
        sample: row of the source's index.
        view: which of the sample's views.
        partner_S: rows it may be mixed with, ascending.
    """
    if policy.mixing is None:
        return NOT_MIXED
    return draw_mix(
        policy.mixing,
        policy.seed,
        source.index.sample_key(sample),
        view,
        sample=sample,
        partner_S=partner_S,
        image_height=policy.image_height,
        image_width=policy.image_width,
    )


def stored_mix(policy: ViewPolicy, parameters_P: np.ndarray) -> Mix:
    """What was mixed into a stored view, from all its parameters; always `NOT_MIXED` if the policy does not mix.

    Raises:
        CorruptCacheError: the parameters do not fit the policy.
    """
    if policy.mixing is None:
        return NOT_MIXED
    return parse_mix(parameters_P[len(PARAMETER_NAMES) :], policy.image_height, policy.image_width)


def replay_view(
    source: Source,
    policy: ViewPolicy,
    sample: int,
    parameters_of: Callable[[int], np.ndarray],
    expected_hash: int,
    recorded_versions: Mapping[str, str],
) -> np.ndarray:
    """The pixels of a stored view, uint8 (height, width, 3), bit for bit what the teacher saw.

    Args:
        source: where the images are.
        policy: how the views were drawn.
        sample: row of the source's index.
        parameters_of: returns a row's stored parameters of this view; called for the sample, and its partner if mixed.
        expected_hash: hash of the stored view's pixels.
        recorded_versions: versions of the libraries at build time.

    Raises:
        CacheMismatchError: the replayed pixels have another hash; the message names the libraries that changed.
        CorruptCacheError: the parameters do not fit the image or the policy.
    """
    parameters_P = parameters_of(sample)
    mix = stored_mix(policy, parameters_P)
    pixels_HWC = _replay_unmixed(source, policy, sample, parameters_P)
    where = source.where(sample)
    if mix != NOT_MIXED:
        partner = sample + mix.partner
        if not 0 <= partner < source.index.num_samples:
            raise CorruptCacheError(f"{where}: mixed with sample {partner}, of {source.index.num_samples} samples.")
        pixels_HWC = mix_pixels(pixels_HWC, _replay_unmixed(source, policy, partner, parameters_of(partner)), mix)
        where = f"{where}, mixed with {source.where(partner)}"
    if pixel_hash(pixels_HWC) != expected_hash:
        now = library_versions()
        changed = [
            f"{name} {recorded_versions.get(name, 'unknown')} at build time and {version} now"
            for name, version in now.items()
            if recorded_versions.get(name) != version
        ]
        raise CacheMismatchError(
            f"{where}: the replayed image differs from the one the teacher saw "
            f"({'; '.join(changed) or 'with the same library versions: was the image changed?'}). Install the recorded "
            "versions, or build the cache with --pixels store."
        )
    return pixels_HWC


def _replay_unmixed(source: Source, policy: ViewPolicy, sample: int, parameters_P: np.ndarray) -> np.ndarray:
    if policy.mixing is not None:
        parameters_P = parameters_P[: len(PARAMETER_NAMES)]
    return render_alone(source.read_encoded(sample), parameters_P, policy)
