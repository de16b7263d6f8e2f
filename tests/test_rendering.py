"""From a sample to the pixels of a view: drawn once, replayed with proof, normalised for a model."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torchvision.transforms.functional import normalize

from atcache.errors import BadImageError, CacheMismatchError
from atcache.rendering import STORED, normalise_images, render_view, replay_view
from atcache.source import Problem, Source, index_source
from atcache.store.layout import Status
from atcache.views import ViewPolicy, library_versions, pixel_hash

POLICY = ViewPolicy(name="crop-flip", seed=3, image_height=8, image_width=8)


@pytest.fixture
def source(digits_tars) -> Source:
    return Source(index_source(digits_tars))


def render(source, sample, view=0, *, skip_bad=False):
    return render_view(source, POLICY, sample, view, skip_bad=skip_bad)


def with_problem(source: Source, sample: int, problem: Problem) -> Source:
    problem_S = source.index.problem_S.copy()
    problem_S[sample] = problem
    return Source(replace(source.index, problem_S=problem_S))


def test_a_view_is_stored_with_its_hash_and_replays_to_the_same_pixels(source):
    for sample in range(source.index.num_samples):
        view = render(source, sample, view=1)
        assert view.status == STORED == Status.STORED
        assert view.pixel_hash == pixel_hash(view.pixels_HWC) != 0
        again = replay_view(source, POLICY, sample, view.parameters_P, view.pixel_hash, library_versions())
        assert np.array_equal(again, view.pixels_HWC)


def test_replaying_another_image_names_the_libraries_that_changed(source):
    view = render(source, 3)
    recorded = {**library_versions(), "pillow": "1.0"}
    with pytest.raises(CacheMismatchError, match=r"digit-00004.*pillow 1\.0 at build time and \d.*--pixels store"):
        replay_view(source, POLICY, 4, view.parameters_P, view.pixel_hash, recorded)


def test_replaying_another_image_under_the_same_libraries_suspects_the_image(source):
    view = render(source, 3)
    with pytest.raises(CacheMismatchError, match="with the same library versions: was the image changed"):
        replay_view(source, POLICY, 4, view.parameters_P, view.pixel_hash, library_versions())


@pytest.mark.parametrize("problem", [Problem.NO_LABEL, Problem.DUPLICATE_KEY, Problem.TRUNCATED])
def test_a_sample_known_to_be_bad_is_not_read(source, problem):
    view = render(with_problem(source, 5, problem), 5)
    assert view.status == problem == Status[problem.name]
    assert (view.pixel_hash, int(view.pixels_HWC.max()), float(np.abs(view.parameters_P).max())) == (0, 0, 0)


def test_an_undecodable_image_raises_or_becomes_a_status(source):
    # The index is made to point at the first half of an image.
    nbytes_S = source.index.nbytes_S.copy()
    nbytes_S[2] //= 2
    broken = Source(replace(source.index, nbytes_S=nbytes_S))
    with pytest.raises(BadImageError, match="digit-00002"):
        render(broken, 2)
    view = render(broken, 2, skip_bad=True)
    assert view.status == Problem.UNDECODABLE
    assert view.pixels_HWC.shape == (8, 8, 3)
    assert (view.pixel_hash, int(view.pixels_HWC.max())) == (0, 0)


def test_normalised_images_are_those_of_torchvision():
    generator = torch.Generator().manual_seed(0)
    pixels_BHWC = torch.randint(0, 256, (2, 5, 7, 3), generator=generator, dtype=torch.uint8)
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    images = normalise_images(pixels_BHWC, mean, std, "cpu")
    expected = normalize(pixels_BHWC.permute(0, 3, 1, 2) / 255, list(mean), list(std))
    assert images.dtype == torch.float32
    torch.testing.assert_close(images, expected, atol=1e-6, rtol=1e-6)
