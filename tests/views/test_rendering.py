"""From a sample to the pixels of a view: drawn once, replayed with proof, normalised for a model."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from made_tars import encoded, member, write_tar
from PIL import Image
from torchvision.transforms.functional import normalize

from atcache.errors import BadImageError, CacheMismatchError, CorruptCacheError
from atcache.images.decode import MAX_SIDE
from atcache.images.source import Source, index_source
from atcache.images.tar_samples import Problem
from atcache.store.layout import Status
from atcache.teachers.inputs import normalise_images
from atcache.views.apply import apply_view, checked_parameters, library_versions, pixel_hash
from atcache.views.draw import draw_view
from atcache.views.mixing import MIXING_NAMES, NOT_MIXED, MixPolicy, draw_mix
from atcache.views.policy import PARAMETER_NAMES, ViewPolicy
from atcache.views.rendering import STORED, Renderer, replay_view, stored_mix

POLICY = ViewPolicy(name="crop-flip", seed=3, image_height=8, image_width=8)
UNMIXED = ViewPolicy(name="randaug", seed=3, image_height=8, image_width=8)
MIXED = replace(UNMIXED, mixing=MixPolicy(mixup_alpha=0.8, cutmix_alpha=1.0))
EVAL = ViewPolicy(name="eval", image_height=224, image_width=224)
BLOCK = range(10, 30)


@pytest.fixture
def source(digits_tars) -> Source:
    return Source(index_source(digits_tars))


def render(source, sample, view=0, *, skip_bad=False):
    return Renderer(source, POLICY, skip_bad=skip_bad).render(sample, view)


def with_problem(source: Source, sample: int, problem: Problem) -> Source:
    problem_S = source.index.problem_S.copy()
    problem_S[sample] = problem
    return Source(replace(source.index, problem_S=problem_S))


def test_a_view_is_stored_with_its_hash_and_replays_to_the_same_pixels(source):
    for sample in range(source.index.num_samples):
        view = render(source, sample, view=1)
        assert view.status == STORED == Status.STORED
        assert view.pixel_hash == pixel_hash(view.pixels_HWC) != 0
        stored = {sample: view.parameters_P}
        again = replay_view(source, POLICY, sample, stored.__getitem__, view.pixel_hash, library_versions())
        assert np.array_equal(again, view.pixels_HWC)


def test_replaying_another_image_names_the_libraries_that_changed(source):
    view = render(source, 3)
    recorded = {**library_versions(), "pillow": "1.0"}
    with pytest.raises(CacheMismatchError, match=r"digit-00004.*pillow 1\.0 at build time and \d.*--pixels store"):
        replay_view(source, POLICY, 4, lambda _: view.parameters_P, view.pixel_hash, recorded)


def test_replaying_another_image_under_the_same_libraries_suspects_the_image(source):
    view = render(source, 3)
    with pytest.raises(CacheMismatchError, match="with the same library versions: was the image changed"):
        replay_view(source, POLICY, 4, lambda _: view.parameters_P, view.pixel_hash, library_versions())


@pytest.mark.parametrize("problem", [Problem.NO_LABEL, Problem.DUPLICATE_KEY, Problem.TRUNCATED])
def test_a_sample_known_to_be_bad_is_not_read(source, problem):
    view = render(with_problem(source, 5, problem), 5)
    assert view.status == problem == Status[problem.name]
    assert (view.pixel_hash, int(view.pixels_HWC.max()), float(np.abs(view.parameters_P).max())) == (0, 0, 0)


def with_broken_image(source: Source, sample: int) -> Source:
    """Its index points at the first half of the image."""
    nbytes_S = source.index.nbytes_S.copy()
    nbytes_S[sample] //= 2
    return Source(replace(source.index, nbytes_S=nbytes_S))


def test_an_undecodable_image_raises_or_becomes_a_status(source):
    broken = with_broken_image(source, 2)
    with pytest.raises(BadImageError, match="digit-00002"):
        render(broken, 2)
    view = render(broken, 2, skip_bad=True)
    assert view.status == Problem.UNDECODABLE
    assert view.pixels_HWC.shape == (8, 8, 3)
    assert (view.pixel_hash, int(view.pixels_HWC.max())) == (0, 0)


@pytest.fixture(scope="module")
def long_images(tmp_path_factory) -> Source:
    """Images of 5,000 x 1 and of 40,000,000 x 1 pixels, both in small files."""
    images = {"thin": Image.new("L", (5000, 1)), "endless": Image.new("L", (40_000_000, 1))}
    members = [member(f"{key}.png", encoded(image)) for key, image in images.items()]
    path = write_tar(tmp_path_factory.mktemp("long") / "long.tar", members)
    return Source(index_source(path, labels="none"))


TOO_WIDE = r"long\.tar: key 'endless': the image has 40000000 x 1 pixels, expected at most 33554431 a side\. Crop it"
TOO_THIN = r"long\.tar: key 'thin': an image of 5000 x 1 would be resized to 1280000 x 256 pixels, .* Leave it out"


@pytest.mark.parametrize(
    ("row", "policy", "sentence"),
    [(0, EVAL, TOO_THIN), (1, EVAL, TOO_WIDE), (1, UNMIXED, TOO_WIDE), (1, MIXED, TOO_WIDE)],
    ids=["thin", "endless", "endless-cut", "endless-mixed"],
)
def test_an_image_too_long_for_the_policy_is_named_or_skipped(row, policy, sentence, long_images):
    with pytest.raises(BadImageError, match=sentence):
        Renderer(long_images, policy, skip_bad=False).render(row, 0)
    assert Renderer(long_images, policy, skip_bad=True).render(row, 0).status == Problem.UNDECODABLE


@pytest.mark.parametrize("name", ["crop-flip", "randaug"])
@pytest.mark.parametrize("size", [(1, MAX_SIDE), (2, MAX_SIDE), (MAX_SIDE, 1), (MAX_SIDE, 2)])
def test_the_views_of_the_longest_images_are_whole_numbers(name, size):
    policy = ViewPolicy(name=name, image_height=224, image_width=224)
    for view in range(4):
        values = checked_parameters(draw_view(policy, "a.tar/k", view, *size), *size, policy)
        assert max(values[:2]) == (MAX_SIDE - max(values[2:4])) // 2


# Mixed views


def mixed_views(source, *, skip_bad=False, keep_nbytes=0, order=BLOCK, view=1):
    renderer = Renderer(source, MIXED, skip_bad=skip_bad, keep_nbytes=keep_nbytes)
    return {sample: renderer.render(sample, view, BLOCK) for sample in order}


def assert_equal_views(found, expected):
    assert found.keys() == expected.keys()
    for sample, view in expected.items():
        assert found[sample].status == view.status
        assert found[sample].pixel_hash == view.pixel_hash
        assert np.array_equal(found[sample].parameters_P, view.parameters_P)
        assert np.array_equal(found[sample].pixels_HWC, view.pixels_HWC)


def test_a_mixed_view_is_two_views_put_together_pixel_by_pixel(source):
    num_blends = num_boxes = 0
    for sample, found in mixed_views(source).items():
        key = source.index.sample_key(sample)
        mix = draw_mix(MIXED.mixing, 3, key, 1, sample=sample, partner_S=np.array(BLOCK), image_height=8, image_width=8)
        assert found.status == STORED
        assert tuple(found.parameters_P[-6:]) == tuple(np.array(mix, np.float32))
        views = []
        for row in (sample, sample + mix.partner):
            image = source.read_image(row)
            parameters_P = draw_view(UNMIXED, source.index.sample_key(row), 1, image.height, image.width)
            views.append(apply_view(image, parameters_P, UNMIXED).astype(int))
            if row == sample:
                assert np.array_equal(found.parameters_P[: len(PARAMETER_NAMES)], parameters_P)
        for place in np.ndindex(8, 8, 3):
            own, partner = (int(view[place]) for view in views)
            expected = (own * int(mix.share * 65536) + partner * int(65536 - mix.share * 65536) + 32768) // 65536
            if mix.height:
                inside = mix.top <= place[0] < mix.top + mix.height and mix.left <= place[1] < mix.left + mix.width
                expected = partner if inside else own
            assert found.pixels_HWC[place] == expected
        num_boxes += mix.height > 0
        num_blends += mix.height == 0 and mix.partner != 0
    assert num_boxes > 4
    assert num_blends > 4


def test_mixed_views_are_the_same_in_any_order_and_whatever_is_kept(source):
    expected = mixed_views(source)
    for order, keep_nbytes in ((BLOCK, 10**6), (BLOCK[::-1], 10**6), (BLOCK[::-1], 500), (BLOCK[5:8], 10**6)):
        found = mixed_views(source, order=order, keep_nbytes=keep_nbytes)
        assert_equal_views(found, {sample: expected[sample] for sample in order})


def test_what_is_kept_of_one_view_or_block_is_not_shown_in_another(source):
    expected = [mixed_views(source, view=view) for view in (0, 1)]
    renderer = Renderer(source, MIXED, skip_bad=False, keep_nbytes=10**6)
    for view in (0, 1, 0):
        assert_equal_views({sample: renderer.render(sample, view, BLOCK) for sample in BLOCK}, expected[view])
        # Another block: partners of its own.
        for sample in range(30, 40):
            mix = stored_mix(MIXED, renderer.render(sample, view, range(30, 40)).parameters_P)
            assert sample + mix.partner in range(30, 40)


def test_mixed_views_replay_from_both_samples_parameters(source):
    views = mixed_views(source)
    stored = {sample: view.parameters_P for sample, view in views.items()}
    for sample, view in views.items():
        again = replay_view(source, MIXED, sample, stored.__getitem__, view.pixel_hash, library_versions())
        assert np.array_equal(again, view.pixels_HWC)
    # And not from parameters that say less: the proof would notice.
    sample = next(row for row, view in views.items() if 0 < view.parameters_P[-5] < 0.9)
    cut = {row: np.concatenate([parameters_P[:-6], np.array(NOT_MIXED)]) for row, parameters_P in stored.items()}
    with pytest.raises(CacheMismatchError, match="differs from the one the teacher saw"):
        replay_view(source, MIXED, sample, cut.__getitem__, views[sample].pixel_hash, library_versions())


def test_a_mixed_view_that_differs_names_both_images(source):
    views = mixed_views(source)
    stored = {sample: view.parameters_P for sample, view in views.items()}
    sample = next(row for row, parameters_P in stored.items() if parameters_P[-6])
    partner = sample + int(stored[sample][-6])
    with pytest.raises(CacheMismatchError, match=f"digit-000{sample}', mixed with .*digit-000{partner}': the replayed"):
        replay_view(source, MIXED, sample, stored.__getitem__, 1, library_versions())


def test_a_partner_that_is_nowhere_is_refused(source):
    parameters_P = mixed_views(source)[12].parameters_P.copy()
    parameters_P[-6:] = (-13, 0.5, 0, 0, 0, 0)
    with pytest.raises(CorruptCacheError, match="digit-00012': mixed with sample -1, of 48 samples"):
        replay_view(source, MIXED, 12, {12: parameters_P}.__getitem__, 1, library_versions())


def test_a_sample_known_to_be_bad_is_nobodys_partner(source):
    bad = 17
    views = mixed_views(with_problem(source, bad, Problem.TRUNCATED))
    assert views[bad].status == Problem.TRUNCATED
    assert views[bad].parameters_P.tolist() == [0] * (len(PARAMETER_NAMES) + len(MIXING_NAMES))
    partners = {
        sample + stored_mix(MIXED, view.parameters_P).partner for sample, view in views.items() if sample != bad
    }
    assert bad not in partners


def test_a_partner_found_undecodable_leaves_the_view_unmixed(source):
    before = mixed_views(source)
    # One that somebody is mixed with.
    sample = next(row for row, view in before.items() if view.parameters_P[-6])
    bad = sample + int(before[sample].parameters_P[-6])
    broken = with_broken_image(source, bad)
    with pytest.raises(BadImageError, match=f"digit-000{bad}"):
        mixed_views(broken, order=[sample])
    found = mixed_views(broken, skip_bad=True, keep_nbytes=10**6)
    assert found[bad].status == Problem.UNDECODABLE
    alone = Renderer(source, UNMIXED, skip_bad=False)
    for row in before.keys() - {bad}:
        if row + int(before[row].parameters_P[-6]) != bad:
            assert_equal_views({row: found[row]}, {row: before[row]})
        else:
            assert stored_mix(MIXED, found[row].parameters_P) == NOT_MIXED
            assert np.array_equal(found[row].pixels_HWC, alone.render(row, 1).pixels_HWC)
            stored = {row: found[row].parameters_P}
            replay_view(broken, MIXED, row, stored.__getitem__, found[row].pixel_hash, library_versions())


def test_normalised_images_are_those_of_torchvision():
    generator = torch.Generator().manual_seed(0)
    pixels_BHWC = torch.randint(0, 256, (2, 5, 7, 3), generator=generator, dtype=torch.uint8)
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    images = normalise_images(pixels_BHWC, mean, std, "cpu")
    expected = normalize(pixels_BHWC.permute(0, 3, 1, 2) / 255, list(mean), list(std))
    assert images.dtype == torch.float32
    torch.testing.assert_close(images, expected, atol=1e-6, rtol=1e-6)
