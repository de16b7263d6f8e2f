"""A loop of one's own sees what `atcache train` sees, step by step, and trains the student that it trains."""

from __future__ import annotations

import json
import math
from itertools import islice

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.testing import CompileCounterWithBackend

import atcache
from atcache.cache.cache import Cache
from atcache.errors import CacheMismatchError, CacheMissError, ConfigError, SourceError, TeacherError
from atcache.feed.loader import BatchStream
from atcache.pipelines.train.config import TrainConfig
from atcache.pipelines.train.data import open_training_data
from atcache.pipelines.train.student_run import TrainingRun

CPU = torch.device("cpu")
MIXED = {"mixup": 0.8, "cutmix": 1.0, "mix_prob": 0.5}


@pytest.fixture
def part_caches(tiny_cache, digits_tars):
    """Two caches of one teacher: of the first two tars as exact codes, and of the third in int8."""
    folder = digits_tars[0].parent
    first_two = tiny_cache(data=str(folder / "digits-{0000..0001}.tar"), views=2)
    return first_two, tiny_cache(data=str(digits_tars[2]), codec="int8")


@pytest.fixture
def training_of(tmp_path):
    """A function: mode, cache and fields of `TrainConfig` -> the state of `atcache train` before its first step."""

    def training_of(mode, cache, **fields) -> TrainingRun:
        place = {"out": tmp_path / "run", "device": "cpu", "precision": "fp32", "batch_size": 20, "steps": 6}
        config = TrainConfig(mode=mode, cache=cache, **{**place, **fields})
        (data,) = open_training_data([config], CPU)
        return TrainingRun(config, data, CPU)

    return training_of


def batches_of(cache, **fields) -> atcache.Batches:
    return atcache.batches(cache, **{"batch_size": 20, "steps": 6, "device": "cpu", **fields})


def assert_equal_batches(found, expected):
    found, expected = list(found), list(expected)
    assert len(found) == len(expected)
    for ours, theirs in zip(found, expected, strict=True):
        for name in ("images", "labels", "sample"):
            assert torch.equal(getattr(ours, name), getattr(theirs, name)), name
        for layer in (0, 1):
            assert torch.equal(ours.attention.layer(layer).maps(), theirs.attention.layer(layer).maps())


def losses_of(student, batch):
    """The label loss and the attention loss, which is 0 for a copying student."""
    out = student(batch.images, batch.attention)
    logits, attention_loss = out if isinstance(out, tuple) else (out, torch.zeros(()))
    return F.cross_entropy(logits, batch.labels), attention_loss


def steps_of_training(run):
    """The steps of `atcache train`, as it takes them."""
    return BatchStream(run.data.views, run.data.label_S, run.data.order, num_steps=run.num_steps)


# What a batch holds


@pytest.mark.parametrize(
    ("built", "fields"),
    [
        ({"views": 2}, {}),
        ({"views": 2, "pixels": "store"}, {"seed": 5}),
        ({"codec": "int8"}, {"shuffle": "block"}),
        ({}, {"subset": 25, "seed": 3}),
        ({"views": 2}, {"workers": 1, "keep_mib": 0}),
    ],
)
def test_batches_are_those_of_atcache_train(built, fields, tiny_cache, training_of):
    cache = tiny_cache(**built)
    run, batches = training_of("copy", cache, **fields), batches_of(cache, **fields)
    assert len(batches) == batches.num_steps == run.num_steps
    assert batches.num_classes == run.student.num_classes
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (run.student.input.mean, run.student.input.std))
    for ours, theirs in zip(batches, steps_of_training(run), strict=True):
        assert torch.equal(ours.sample, theirs.sample_B)
        assert torch.equal(ours.labels, theirs.label_B)
        assert ours.labels.dtype == torch.int64
        torch.testing.assert_close(ours.images, (theirs.pixels_BHWC.permute(0, 3, 1, 2) / 255 - mean) / std)
        given = run.data.teacher.factors(theirs)
        for layer in (0, 1):
            assert torch.equal(ours.attention.layer(layer).maps(), given.layer(layer).maps())


def test_a_batch_holds_the_image_label_and_maps_of_the_caches_views(tiny_cache):
    cache = atcache.open(tiny_cache(views=2))
    seen: list[tuple[int, int]] = []
    for batch in batches_of(cache, epochs=2, steps=None, mean=(0, 0, 0), std=(1, 1, 1)):
        maps_LBHQK = torch.stack([batch.attention.layer(layer).maps() for layer in (0, 1)])
        for row, sample in enumerate(batch.sample.tolist()):
            epoch = sum(sample == earlier for earlier, _ in seen)
            seen.append((sample, epoch))
            view = cache.view(sample, epoch % 2)
            assert batch.labels[row] == view.label
            np.testing.assert_array_equal((batch.images[row] * 255).round().permute(1, 2, 0), view.image)
            np.testing.assert_allclose(maps_LBHQK[:, row], view.maps_LHQK, atol=1e-6)
    # Five batches of 20 are two epochs of 48, and the first four samples of the third.
    assert {(sample, epoch) for sample in range(48) for epoch in (0, 1)} <= set(seen)
    assert len(seen) == 100


def test_several_caches_are_one_set_of_samples(part_caches, training_of):
    run, batches = training_of("copy", part_caches), batches_of(part_caches)
    first, second = map(atcache.open, part_caches)
    for ours, theirs in zip(batches, steps_of_training(run), strict=True):
        assert torch.equal(ours.sample, theirs.sample_B)
        for row, sample in enumerate(ours.sample.tolist()):
            if sample >= 32:
                assert ours.labels[row] == second.view(sample - 32).label
                expected = second.view(sample - 32).maps_LHQK[1]
                np.testing.assert_allclose(ours.attention.layer(1).maps()[row], expected, atol=1e-6)
            else:
                assert ours.labels[row] == first.view(sample).label


def test_mixed_views_have_the_share_of_each_class(tiny_cache):
    cache = atcache.open(tiny_cache(**MIXED))
    batch = next(iter(batches_of(cache)))
    assert batch.labels.shape == (20, 10)
    assert batch.labels.dtype == torch.float32
    for row, sample in enumerate(batch.sample.tolist()):
        view, expected = cache.view(sample), np.zeros(10, np.float32)
        expected[view.label] += view.share
        if view.partner is not None:
            expected[cache.view(view.partner).label] += 1 - view.share
        np.testing.assert_allclose(batch.labels[row], expected, rtol=1e-6)
    assert 0 < (batch.labels.max(dim=1).values < 1).sum() < 20


def test_ranks_share_out_every_batch(tiny_cache):
    cache = tiny_cache(views=2)
    parts = [batches_of(cache, rank=rank, num_ranks=2) for rank in (0, 1)]
    for whole, first, second in zip(batches_of(cache), *parts, strict=True):
        assert len(first.sample) == 10
        assert torch.equal(torch.cat([first.sample, second.sample]), whole.sample)
        assert torch.equal(torch.cat([first.images, second.images]), whole.images)


def test_moved_tars_are_found_by_data_given_here_or_at_opening(tiny_cache, digits_tars, tmp_path):
    own, moved = tmp_path / "own", tmp_path / "moved"
    own.mkdir()
    for tar in digits_tars:
        (own / tar.name).write_bytes(tar.read_bytes())
    cache = tiny_cache(data=str(own))
    expected = list(batches_of(cache))
    own.rename(moved)
    with pytest.raises(SourceError, match=r"digits-0000\.tar"):
        list(batches_of(cache))
    assert_equal_batches(batches_of(cache, data=moved), expected)
    assert_equal_batches(batches_of(Cache(cache, data=moved)), expected)
    own.mkdir()  # the same for the tests that follow
    for tar in digits_tars:
        (moved / tar.name).rename(own / tar.name)


# Passes, and stopping


def test_a_second_loop_goes_on_with_the_next_epochs(tiny_cache):
    cache = tiny_cache(views=2)
    whole = batches_of(cache, steps=6)
    parts = batches_of(cache, steps=3)
    assert_equal_batches([*parts, *parts], whole)
    assert len(parts) == parts.num_steps == 3


def test_a_loop_that_counts_its_steps_goes_on_with_the_next_pass(tiny_cache):
    cache = tiny_cache(views=2)
    whole, counted = list(batches_of(cache, steps=6)), batches_of(cache, steps=3)
    # Lightning and the Trainer take `len` batches, and never ask for one more.
    taken = []
    for _ in range(2):
        assert len(counted) == 3
        one_pass = iter(counted)
        taken += [next(one_pass) for _ in range(3)]
    assert_equal_batches(taken, whole)
    finished = batches_of(cache, steps=3)
    finished.load_state_dict(counted.state_dict())
    assert len(finished) == 0  # a training that had ended does not begin anew
    assert list(finished) == []


@pytest.mark.parametrize("stop", [1, 3, 4, 6])
@pytest.mark.parametrize("workers", [0, 1])
def test_a_loop_that_was_stopped_anywhere_goes_on_exactly_there(stop, workers, tiny_cache):
    cache = tiny_cache(views=2)
    whole = list(batches_of(cache, steps=6))
    stopped = batches_of(cache, steps=3, workers=workers)
    if stop > 3:
        list(stopped)
    taken = [*islice(stopped, stop if stop <= 3 else stop - 3)]
    state = json.loads(json.dumps(stopped.state_dict()))
    again = batches_of(cache, steps=3)
    again.load_state_dict(state)
    assert len(again) == -stop % 3
    assert len(stopped) == (-stop % 3 or 3)
    rest = [*again] if stop > 3 else [*again, *again]
    assert_equal_batches([*taken, *rest], whole[3 if stop > 3 else 0 :])
    if stop % 3:  # the loop that was left goes on by itself, too
        assert_equal_batches(stopped, rest[: -stop % 3])


def test_the_state_of_other_batches_is_refused(tiny_cache):
    cache = tiny_cache(views=2)
    state = batches_of(cache).state_dict()
    with pytest.raises(ConfigError, match="another stream of batches: order differ in seed, batch_size"):
        batches_of(cache, seed=1, batch_size=12).load_state_dict(state)
    with pytest.raises(ConfigError, match="another stream of batches: views differ in num_views"):
        batches_of(tiny_cache()).load_state_dict(state)
    batches = batches_of(cache)
    with pytest.raises(ConfigError, match=r"the state cannot be used \(KeyError\('pass'\)\)"):
        batches.load_state_dict({"step": 2})
    assert len(batches) == 6


# Students


@pytest.mark.parametrize(
    ("mode", "built", "fields"),
    [
        ("copy", {}, {}),
        ("distill", {}, {"layers": "1", "heads": "0"}),
        ("copy", {}, {"what": "qk"}),
        ("distill", {"codec": "int8"}, {"what": "q"}),
        ("copy", {"codec": "exact", "store": "v"}, {"what": "v"}),
        ("copy", MIXED, {"drop_path": 0.1}),
    ],
)
def test_a_made_student_is_the_one_that_atcache_train_begins_with(mode, built, fields, tiny_cache, training_of):
    cache = tiny_cache(**built)
    run = training_of(mode, cache, seed=4, **fields)
    torch.manual_seed(4)
    student = atcache.make_student(cache, mode, **fields)
    assert all(module.training for module in student.modules())
    theirs = run.student.module.state_dict()
    assert student.state_dict().keys() == theirs.keys()
    assert [name for name, value in student.state_dict().items() if not torch.equal(value, theirs[name])] == []
    ours, training = next(iter(batches_of(cache, seed=4))), next(iter(steps_of_training(run)))
    losses = run.train_step(training)
    if not fields.get("drop_path"):  # which is drawn in each step, by a seed of the run's own
        label_loss, attention_loss = losses_of(student, ours)
        torch.testing.assert_close(label_loss.detach(), losses["label_loss"])
        if mode == "distill":
            torch.testing.assert_close(attention_loss.detach(), losses["attention_loss"])


def test_a_student_of_another_shape_takes_what_the_maps_name(tiny_cache):
    cache = tiny_cache()
    shape = "vit_tiny_patch16_224:img_size=8,patch_size=2,embed_dim=16,depth=1,num_heads=1"
    batch = next(iter(batches_of(cache, layers=[1])))
    outputs = []
    for layer_map, head_map in (("0:1", "1"), ({0: 1}, [1])):
        torch.manual_seed(0)
        student = atcache.make_student(cache, "copy", student=shape, layer_map=layer_map, head_map=head_map)
        outputs.append(student(batch.images, batch.attention))
    assert outputs[0].shape == (20, 10)
    assert torch.equal(*outputs)


def test_a_layer_that_was_not_read_is_an_error_and_not_another_layer(tiny_cache):
    cache = tiny_cache()
    batch = next(iter(batches_of(cache, layers="1")))
    assert torch.equal(batch.attention.layer(1).maps(), next(iter(batches_of(cache))).attention.layer(1).maps())
    with pytest.raises(ConfigError, match="layer 0 of the teacher is in the cache, but was not read with this batch"):
        atcache.make_student(cache, "copy")(batch.images, batch.attention)
    with pytest.raises(ConfigError, match=r"layer 7 of the teacher is not in the cache, which holds layers 0, 1\."):
        batch.attention.layer(7)


def test_the_classes_of_a_student_are_those_of_all_its_caches(part_caches):
    assert atcache.make_student(part_caches, "copy").model.num_classes == 10
    assert atcache.make_student(part_caches[0], "copy", num_classes=12).model.num_classes == 12


@pytest.mark.parametrize("codec", ["exact", "int8", None])
@pytest.mark.parametrize("mode", ["copy", "distill"])
def test_a_compiled_student_is_one_graph_with_the_caches_attention(mode, codec, tiny_cache):
    cache = tiny_cache(codec=codec)
    torch.manual_seed(0)
    student = atcache.make_student(cache, mode)
    torch.compiler.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(student, backend=counter)
    for batch in batches_of(cache, steps=3):
        found = []
        for run in (student, compiled):
            student.zero_grad()
            label_loss, attention_loss = losses_of(run, batch)
            loss = label_loss + 3 * attention_loss
            loss.backward()
            found.append([loss.detach(), *(p.grad for p in student.parameters() if p.grad is not None)])
        for eager, traced in zip(*found, strict=True):
            torch.testing.assert_close(traced, eager, rtol=1e-4, atol=1e-5)
    assert counter.frame_count == 1


# What cannot be


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"batch_size": 0}, "batch_size=0: expected at least 1"),
        ({"steps": 0}, "steps=0: expected at least 1"),
        ({"steps": None, "epochs": 0}, "epochs=0: expected more than 0"),
        ({"steps": None, "epochs": math.nan}, "epochs=nan: expected more than 0"),
        ({"subset": 0}, "subset=0: expected at least 1"),
        ({"subset": 49}, "subset=49: only 48 samples can be used"),
        ({"seed": -1}, "seed=-1: expected at least 0"),
        ({"seed": 2**63}, f"seed={2**63}: expected at most {2**63 - 1}"),
        ({"workers": -1}, "workers=-1: expected at least 0"),
        ({"keep_mib": -1}, "keep_mib=-1: expected at least 0"),
        ({"shuffle": "windows"}, "shuffle='windows': expected one of global, block"),
        ({"device": "tpu"}, "device 'tpu': expected auto, cpu, cuda or cuda:N"),
        ({"layers": "0-2"}, "layer 2 is not in the cache, which holds layers 0, 1"),
        ({"mean": (0.5, 0.5)}, r"mean=\(0.5, 0.5\): expected three numbers, for red, green and blue"),
        ({"std": (0.5, 0.5, 0.0)}, "std=.*: expected three positive numbers"),
        ({"rank": 2, "num_ranks": 2}, "rank=2, num_ranks=2, batch_size=20: expected a rank from 0 to num_ranks - 1"),
        ({"num_ranks": 3}, "num_ranks=3, batch_size=20: .* a batch that can be cut into equal parts"),
    ],
)
def test_values_of_batches_that_cannot_be_used_are_refused(fields, message, tiny_cache):
    with pytest.raises(ConfigError, match=message):
        batches_of(tiny_cache(), **fields)


def test_caches_that_cannot_be_used_are_refused(tiny_cache, tmp_path):
    for make in (batches_of, lambda cache: atcache.make_student(cache, "copy")):
        with pytest.raises(ConfigError, match="no cache is named"):
            make([])
        with pytest.raises(CacheMissError, match=r"nothing\.zarr"):
            make(tmp_path / "nothing.zarr")
        with pytest.raises(CacheMismatchError, match=r"both hold samples of digits-0000\.tar"):
            make([tiny_cache(), tiny_cache(views=2)])
    with pytest.raises(ConfigError, match=r"subset=20: the views of .* are mixed with those of other samples"):
        batches_of(tiny_cache(**MIXED), subset=20)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"mode": "scratch"}, r"mode='scratch': expected copy or distill.*timm\.create_model makes them"),
        ({"what": "maps"}, "what='maps': expected one of map, qk, q, k, v, qkv"),
        ({"what": "v"}, "needs the teacher's v, which .* does not hold"),
        ({"num_classes": 9}, "digit-00009 has the label 9, but num_classes=9"),
        ({"drop_path": 1.0}, "drop_path=1.0: expected 0 or more, and less than 1"),
        ({"layers": [0, 5]}, "layer 5 is not in the cache, which holds layers 0, 1"),
        ({"layers": "0", "layer_map": {0: 1}}, "layers and layer_map both say which layers are transferred"),
        ({"heads": "0", "head_map": [1]}, "heads and head_map both say which heads are transferred"),
        ({"layer_map": "0-1"}, "layer map '0-1': '0-1' is not a pair"),
    ],
)
def test_values_of_students_that_cannot_be_used_are_refused(fields, message, tiny_cache):
    with pytest.raises(ConfigError, match=message):
        atcache.make_student(tiny_cache(), **{"mode": "copy", **fields})


def test_students_that_do_not_fit_are_refused_with_both_sides(tiny_cache):
    other = "vit_tiny_patch16_224:img_size=8,patch_size=2,embed_dim=48,depth=2,num_heads=3"
    with pytest.raises(TeacherError, match="3 heads a layer, the teacher 2"):
        atcache.make_student(tiny_cache(), "copy", student=other)
    larger = "vit_tiny_patch16_224:img_size=16,patch_size=4,embed_dim=32,depth=2,num_heads=2"
    with pytest.raises(ConfigError, match="8 x 8 pixels, the student takes 16 x 16"):
        atcache.make_student(tiny_cache(), "copy", student=larger)
