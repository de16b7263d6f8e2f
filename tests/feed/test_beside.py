"""Several teachers in one loop: each batch has the maps of all of them, of the same views, or is refused."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
import webdataset
from builds import picture

import atcache
from atcache.errors import CacheMismatchError, SourceError

OTHER_TEACHER = (
    "vit_tiny_patch16_224:img_size=8,patch_size=4,embed_dim=48,depth=3,num_heads=3,reg_tokens=2,num_classes=0"
)
"""Another number of tokens, heads and layers than `tiny_vit`; the same image size."""


@pytest.fixture(scope="module")
def other_weights(tmp_path_factory):
    from safetensors.torch import save_file

    from atcache.teachers.load import create_student
    from atcache.teachers.names import parse_model_name

    torch.manual_seed(1)
    model = create_student(parse_model_name(OTHER_TEACHER), num_classes=0)
    path = tmp_path_factory.mktemp("weights") / "other.safetensors"
    save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, path)
    return path


@pytest.fixture
def other_cache(tiny_cache, other_weights):
    """A function: fields of `BuildConfig` -> a cache of the digits by the other teacher."""
    return lambda **fields: tiny_cache(teacher=OTHER_TEACHER, weights=other_weights, **fields)


def batches_of(cache, **fields) -> atcache.Batches:
    return atcache.batches(cache, **{"batch_size": 8, "seed": 1, "device": "cpu", **fields})


def assert_maps_are_of(cache, batch, factors, epoch: int):
    """The batch's maps of one teacher are those that its cache has for the batch's samples in this epoch's view."""
    opened = atcache.open(cache)
    row_of = {key: row for row, key in enumerate(opened.samples.sample_key.values.tolist())}
    for position, key in enumerate(batch):
        view = opened.view(row_of[key], epoch)
        for number, layer in enumerate(opened.geometry.layers):
            found = factors.layer(layer).maps()[position]
            torch.testing.assert_close(found, torch.from_numpy(view.maps_LHQK[number]))


@pytest.mark.parametrize(
    ("built", "fields"),
    [({}, {}), ({"pixels": "store"}, {"workers": 1}), ({"codec": "int8"}, {"keep_mib": 0})],
)
def test_a_batch_has_the_maps_of_both_teachers_of_the_same_views(built, fields, tiny_cache, other_cache):
    first, second = tiny_cache(views=2), other_cache(views=2, **built)
    keys = atcache.open(first).samples.sample_key.values
    alone = batches_of(first, epochs=2, **fields)
    batches = batches_of(first, beside={"other": second}, epochs=2, **fields)
    assert len(batches) == len(alone) == 12
    for number, (batch, expected) in enumerate(zip(batches, alone, strict=True)):
        assert torch.equal(batch.images, expected.images)
        assert torch.equal(batch.sample, expected.sample)
        assert batch.beside.keys() == {"other"}
        assert expected.beside == {}
        names = keys[batch.sample.numpy()].tolist()
        assert_maps_are_of(first, names, batch.attention, number // 6)
        assert_maps_are_of(second, names, batch.beside["other"], number // 6)


def test_several_teachers_are_named_and_samples_are_found_by_their_keys(tiny_cache, other_cache, digits_tars):
    folder = digits_tars[0].parent
    # The second cache has other rows than the first; the third lacks the first tar, whose samples are left out.
    second = other_cache(data=str(folder / "digits-{0002..0000..-1}.tar"))
    third = tiny_cache(data=str(folder / "digits-{0001..0002}.tar"), codec="int8")
    first = tiny_cache(data=str(folder / "digits-{0000..0001}.tar"))
    keys = atcache.open(first).samples.sample_key.values
    found = list(batches_of(first, beside={"a": second, "b": atcache.open(third)}))
    assert len(found) == 2
    for batch in found:
        names = keys[batch.sample.numpy()].tolist()
        assert all(name.startswith("digits-0001.tar/") for name in names)
        assert_maps_are_of(second, names, batch.beside["a"], 0)
        assert_maps_are_of(third, names, batch.beside["b"], 0)


def test_joined_caches_can_have_a_teacher_beside_them(tiny_cache, other_cache, digits_tars):
    folder = digits_tars[0].parent
    parts = [tiny_cache(data=str(folder / "digits-{0000..0001}.tar"), views=2), tiny_cache(data=str(digits_tars[2]))]
    second = other_cache(views=2)
    keys = np.concatenate([atcache.open(part).samples.sample_key.values for part in parts])
    for batch in batches_of(parts, beside={"other": second}):
        assert_maps_are_of(second, keys[batch.sample.numpy()].tolist(), batch.beside["other"], 0)


def test_a_loop_continues_only_beside_the_same_teacher(tiny_cache, other_cache):
    first, second = tiny_cache(views=2), other_cache(views=2)
    batches = batches_of(first, beside={"other": second})
    next(iter(batches))
    state = json.loads(json.dumps(batches.state_dict()))
    again = batches_of(first, beside={"other": second})
    again.load_state_dict(state)
    assert len(again) == len(batches) == 5
    with pytest.raises(atcache.ConfigError, match="views differ in kind"):
        batches_of(first).load_state_dict(state)
    with pytest.raises(atcache.ConfigError, match="views differ in beside"):
        batches_of(first, beside={"other": other_cache(views=2, codec="int8")}).load_state_dict(state)


def test_views_that_are_not_the_same_images_are_refused(tiny_cache, other_cache):
    first, second = tiny_cache(views=2), other_cache(views=2, seed=7)
    with pytest.raises(CacheMismatchError, match=r"view 0 of digits-\d+.tar/digit-\d+ is not the same image.*seed"):
        next(iter(batches_of(first, beside={"other": second})))
    with pytest.raises(CacheMismatchError, match=r"has 1 views of each sample, .* has 2. Build it with as many"):
        batches_of(first, beside={"other": other_cache()})


def test_a_cache_without_any_of_the_samples_is_refused(tiny_cache, other_cache, digits_tars, tmp_path):
    renamed = tmp_path / "renamed.tar"
    shutil.copy(digits_tars[0], renamed)
    with pytest.raises(SourceError, match=r"beside other: .* has none of the samples"):
        batches_of(tiny_cache(views=1), beside={"other": other_cache(data=str(renamed))})


def test_another_image_under_the_same_key_is_refused(tiny_cache, other_cache, digits_tars, tmp_path):
    changed = tmp_path / digits_tars[0].name
    with changed.open("wb") as file, webdataset.TarWriter(file) as writer:
        for number in range(16):
            writer.write({"__key__": f"digit-{number:05d}", "png": picture(number, kind="PNG"), "cls": b"0"})
    second = other_cache(data=str(changed))
    first = tiny_cache(data=str(digits_tars[0]))
    with pytest.raises(CacheMismatchError, match="the policies are equal, so the image was another one"):
        list(batches_of(first, beside={"other": second}))
