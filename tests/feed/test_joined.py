"""Several caches in one training are one set of samples: what is learnt is what one cache of all of them teaches."""

from __future__ import annotations

import json
import os
import pickle
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from hypothesis import given, settings, strategies as st
from made_factors import equal_pairing
from safetensors.torch import load_file, save_file

from atcache.attention.factors import LayerFactors, LayerMaps
from atcache.cache.cache import Cache
from atcache.choices import SHUFFLES
from atcache.cli.main import cli
from atcache.errors import CacheMismatchError, ConfigError, SourceError
from atcache.feed.batch import Batch, Codes
from atcache.feed.caches import open_caches, open_joined_views
from atcache.feed.loader import BatchStream
from atcache.feed.order import SampleOrder
from atcache.feed.sample_views import CachedViews, JoinedViews, SampleView
from atcache.images.source import Source
from atcache.pipelines.running.metrics import read_metrics
from atcache.pipelines.train.config import TrainConfig
from atcache.pipelines.train.data import open_training_data
from atcache.pipelines.train.run import train, train_sweep
from atcache.store.reader import CacheReader
from atcache.students.teacher_side import CacheTeacher, JoinedFactors, LiveFactors

CPU = torch.device("cpu")
FLOAT32 = {"codec": "exact:dtype=float32", "views": 2}


@pytest.fixture
def part_caches(tiny_cache, digits_tars):
    """A function: fields of both, and of each -> caches of the first two tars, and of the third."""

    def part_caches(first=None, second=None, **fields) -> tuple[Path, Path]:
        folder = digits_tars[0].parent
        first_two, third = str(folder / "digits-{0000..0001}.tar"), str(digits_tars[2])
        return (
            tiny_cache(data=first_two, **{**fields, **(first or {})}),
            tiny_cache(data=third, **{**fields, **(second or {})}),
        )

    return part_caches


@pytest.fixture
def config_for(tmp_path):
    """A function: name, mode, caches and fields -> the config of a short run."""

    def config_for(name, mode, cache, **fields) -> TrainConfig:
        short = {"steps": 20, "batch_size": 24, "base_lr": 2e-2, "warmup_epochs": 1.0, "validate_every": 0}
        place = {"device": "cpu", "precision": "fp32"}
        return TrainConfig(mode=mode, out=tmp_path / name, cache=cache, **{**short, **place, **fields})

    return config_for


def losses_of(config) -> list[float]:
    return [row["loss"] for row in read_metrics(config.out, "train")]


def joined_views(paths, **fields):
    settings = {"data": None, "code_layers": len(paths) * [slice(None)], "keep_nbytes": 0}
    return open_joined_views(open_caches(paths), **{**settings, **fields})


def batches_of(paths, *, shuffle="global", workers=0, stop=6) -> list[Batch]:
    views, label_S, usable_S = joined_views(paths)
    order = SampleOrder(sample_S=usable_S, seed=3, batch_size=20, shuffle=shuffle)
    return list(BatchStream(views, label_S, order, num_steps=stop, workers=workers))


def codes_by_row(batch) -> torch.Tensor:
    """The codes of a batch whose parts have codes of one shape, each in its row."""
    together = torch.empty((len(batch.label_B), *batch.codes[0].codes_BLTC.shape[1:]), dtype=torch.int64)
    for codes in batch.codes:
        together[torch.from_numpy(codes.row_B)] = codes.codes_BLTC.long()
    return together


# Views and batches


class Numbered:
    """Views whose pixels say which part, sample and epoch they are of."""

    def __init__(self, part: int, num_samples: int) -> None:
        self.part, self.num_samples = part, num_samples
        self.expected: list[np.ndarray] = []
        self.is_remote = False

    @property
    def identity(self) -> dict[str, Any]:
        return {"part": self.part, "num_samples": self.num_samples}

    def part_of(self, sample_B):
        return np.zeros(len(sample_B), np.int64)

    def read(self, sample, epoch):
        assert 0 <= sample < self.num_samples
        pixels_HWC = np.array([[[self.part, sample, epoch]]], np.uint8)
        # Each part has codes of a shape of its own.
        return SampleView(pixels_HWC, np.full((1, 2, 1 + self.part), sample, np.int32))

    def expect(self, sample_S, epoch):
        del epoch
        assert sample_S.min() >= 0
        assert sample_S.max() < self.num_samples
        self.expected.append(sample_S)


sizes = st.lists(st.integers(1, 40), min_size=1, max_size=4)


@settings(deadline=None)
@given(sizes=sizes, batch_size=st.integers(1, 50), seed=st.integers(0, 2**63), shuffle=st.sampled_from(SHUFFLES))
def test_every_sample_of_every_part_comes_once_an_epoch_with_its_own_codes(sizes, batch_size, seed, shuffle):
    parts = [Numbered(part, size) for part, size in enumerate(sizes)]
    views, num_samples = JoinedViews(parts), sum(sizes)
    order = SampleOrder(sample_S=np.arange(num_samples), seed=seed, batch_size=batch_size, shuffle=shuffle)
    stop = -(-2 * num_samples // batch_size)
    seen = []
    for batch in BatchStream(views, np.arange(num_samples), order, num_steps=stop):
        rows = batch.pixels_BHWC[:, 0, 0].tolist()
        seen += rows
        starts = np.cumsum([0, *sizes])
        assert batch.sample_B.tolist() == [starts[part] + sample for part, sample, _ in rows]
        assert torch.equal(batch.label_B, batch.sample_B)
        assert sorted(row for codes in batch.codes for row in codes.row_B) == list(range(batch_size))
        for codes in batch.codes:
            assert codes.codes_BLTC.shape[1:] == (1, 2, 1 + codes.part)
            expected = [rows[row][:2] for row in codes.row_B]
            assert [[codes.part, int(values[0, 0, 0])] for values in codes.codes_BLTC] == expected
    everyone = [[part, sample] for part, size in enumerate(sizes) for sample in range(size)]
    for epoch in range(2):
        stretch = seen[epoch * num_samples : (epoch + 1) * num_samples]
        assert sorted(row[:2] for row in stretch) == everyone
        assert {row[2] for row in stretch} == {epoch}


@given(sizes=sizes, data=st.data())
def test_each_part_is_told_to_expect_its_own_samples(sizes, data):
    parts = [Numbered(part, size) for part, size in enumerate(sizes)]
    rows = data.draw(st.sets(st.integers(0, sum(sizes) - 1), min_size=1))
    JoinedViews(parts).expect(np.array(sorted(rows)), 0)
    starts = np.cumsum([0, *sizes])
    told = [int(row + starts[part.part]) for part in parts for expected in part.expected for row in expected]
    assert told == sorted(rows)
    assert all(len(part.expected) <= 1 for part in parts)


@given(part_B=st.lists(st.integers(0, 2), min_size=6, max_size=24).map(lambda parts: parts[: len(parts) // 6 * 6]))
def test_a_batch_is_cut_into_the_rows_it_had(part_B):
    size = len(part_B)
    rows = [np.flatnonzero(np.array(part_B) == part) for part in range(3)]
    codes = [Codes(part, row_B, torch.from_numpy(row_B).view(-1, 1, 1, 1)) for part, row_B in enumerate(rows)]
    numbers = torch.arange(size)
    batch = Batch(numbers, numbers, numbers, numbers, numbers, tuple(part for part in codes if len(part.row_B)))
    for num_parts in (1, 2, 3, 6):
        cut = batch.cut(num_parts)
        assert torch.cat([part.label_B for part in cut]).tolist() == list(range(size))
        for part in cut:
            assert len(part.label_B) == size // num_parts
            found = codes_by_row(part).flatten()
            assert torch.equal(found, part.sample_B)
            assert all(len(codes.row_B) for codes in part.codes)
            assert {codes.part for codes in part.codes} == {part_B[row] for row in part.sample_B.tolist()}
            # Views, not copies: cutting must not take memory where memory is what lacks.
            assert part.pixels_BHWC.untyped_storage().data_ptr() == numbers.untyped_storage().data_ptr()


@pytest.mark.parametrize(("shuffle", "workers"), [("global", 0), ("block", 0), ("global", 2)])
def test_joined_batches_are_those_of_one_cache_of_all_tars(shuffle, workers, part_caches, tiny_cache):
    found = batches_of(part_caches(**FLOAT32), shuffle=shuffle, workers=workers)
    expected = batches_of([tiny_cache(**FLOAT32)], shuffle=shuffle)
    for ours, theirs in zip(found, expected, strict=True):
        assert {codes.part for codes in ours.codes} == {0, 1}
        for name in ("sample_B", "pixels_BHWC", "label_B", "mix_label_B", "mix_share_B"):
            assert torch.equal(getattr(ours, name), getattr(theirs, name)), name
        assert torch.equal(codes_by_row(ours), codes_by_row(theirs))


def test_each_cache_has_its_own_number_of_views(part_caches):
    paths = part_caches(first={"views": 3}, second={"views": 1})
    views, *_ = joined_views(paths)
    first, second = (CacheReader(path) for path in paths)
    for epoch in range(4):
        assert np.array_equal(views.read(30, epoch).codes_LTC, first.read_codes(epoch % 3, 30))
        assert np.array_equal(views.read(33, epoch).codes_LTC, second.read_codes(0, 1))


def test_partners_are_mixed_within_their_cache(part_caches):
    mixing = {"mixup": 0.8, "cutmix": 1.0, "mix_prob": 1.0}
    paths = part_caches(first=mixing, second={"policy": "eval"})
    label_S = np.concatenate([CacheReader(path).labels_S for path in paths])
    for batch in batches_of(paths):
        is_second = batch.sample_B >= 32
        assert (batch.mix_share_B[is_second] == 1).all()
        assert (batch.mix_share_B[~is_second] < 1).any()
        for sample, label, mixed in zip(batch.sample_B, batch.label_B, batch.mix_label_B, strict=True):
            assert label == label_S[sample]
            assert mixed in (label_S[:32] if sample < 32 else [label])


def test_a_joined_stream_goes_on_where_it_was_left_and_knows_its_caches(part_caches):
    def stream_of(paths, num_steps=7):
        views, label_S, usable_S = joined_views(paths)
        order = SampleOrder(sample_S=usable_S, seed=3, batch_size=20)
        return BatchStream(views, label_S, order, num_steps=num_steps)

    paths = part_caches(**FLOAT32)
    whole = [batch.sample_B.tolist() for batch in stream_of(paths)]
    stopped = iter(stream := stream_of(paths))
    found = [next(stopped).sample_B.tolist() for _ in range(3)]
    again = stream_of(paths)
    again.load_state_dict(json.loads(json.dumps(stream.state_dict())))
    assert found + [batch.sample_B.tolist() for batch in again] == whole
    with pytest.raises(ConfigError, match="another stream of batches: views differ in joined"):
        stream_of(paths[::-1]).load_state_dict(stream.state_dict())


def test_memory_for_views_counts_the_chunk_that_a_cut_of_layers_holds(tiny_cache):
    reader = CacheReader(tiny_cache(**FLOAT32))
    assert reader.layout.layers_per_chunk == 2
    chunk_nbytes, pixels_nbytes = reader.layout.codes.chunk_nbytes, 8 * 8 * 3

    def is_kept(keep_nbytes) -> bool:
        fields = {"code_layers": slice(1, 2), "keep_nbytes": keep_nbytes}
        views = CachedViews(reader, Source(reader.samples), **fields)
        return views.read(5, 0) is views.read(5, 0)

    assert is_kept(chunk_nbytes + pixels_nbytes)
    assert not is_kept(chunk_nbytes + pixels_nbytes - 1)


def test_no_views_at_all_are_refused():
    with pytest.raises(ConfigError, match="no views to join: give at least one"):
        JoinedViews([])


# What students are given


def teacher_of(paths) -> CacheTeacher:
    readers = open_caches(paths)
    return CacheTeacher(readers, [equal_pairing(Cache(paths[0]).geometry)], CPU)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("transform", "transform"),
        ("transform", "exact:dtype=float32"),
        ("int8", "exact"),
        ("int8", "logmap"),
    ],
)
def test_each_samples_factors_are_decoded_by_its_own_caches_codec(first, second, part_caches):
    paths = part_caches(first={"codec": first}, second={"codec": second})
    if first == second == "transform":
        bases = [CacheReader(path).state["basis_LJC"] for path in paths]
        assert bases[0].shape != bases[1].shape or not np.array_equal(*bases)
    teacher, caches = teacher_of(paths), [Cache(path) for path in paths]
    batch = batches_of(paths, stop=1)[0]
    for part in (batch, *batch.cut(2), batch.rows(0, 1)):
        given = teacher.factors(part)
        for block in (0, 1):
            layer = given.layer(block)
            assert layer.shape_BHT == (len(part.label_B), 2, 17)
            for row, sample in enumerate(part.sample_B.tolist()):
                cache, own = (caches[0], sample) if sample < 32 else (caches[1], sample - 32)
                codes_LTC = cache.reader.read_codes(0, own)
                alone = cache.coder.decode(torch.from_numpy(codes_LTC[None])).layer(block)
                torch.testing.assert_close(layer.select(slice(row, row + 1)).maps(), alone.maps())
                if second != "logmap":
                    torch.testing.assert_close(layer.q_BHTD[row], alone.q_BHTD[0])
                    torch.testing.assert_close(layer.k_BHTD[row], alone.k_BHTD[0])
    assert isinstance(teacher.factors(batch).layer(0), LayerMaps) == (second == "logmap")


def test_factors_that_autocast_decodes_to_another_type_are_joined_as_float32(part_caches):
    paths = part_caches(first={"codec": "transform"}, second={"codec": "exact"})
    batch = batches_of(paths, stop=1)[0]
    with torch.autocast("cpu", torch.bfloat16):
        layer = teacher_of(paths).factors(batch).layer(0)
    assert layer.q_BHTD.dtype == torch.float32
    exact = teacher_of(paths).factors(batch).layer(0)
    torch.testing.assert_close(layer.q_BHTD, exact.q_BHTD, rtol=0.05, atol=0.1)


def test_joined_factors_keep_bias_scale_grouped_keys_and_values():
    torch.manual_seed(0)
    whole = LayerFactors(
        q_BHTD=torch.randn(7, 4, 5, 3),
        k_BHTD=torch.randn(7, 2, 5, 3),
        v_BHTD=torch.randn(7, 2, 5, 6),
        scale=0.3,
        bias=torch.randn(1, 4, 5, 5),
    )
    row_B = [torch.tensor([1, 4, 6]), torch.tensor([0, 2, 3, 5])]
    parts = [
        LiveFactors(
            {2: replace(whole, **{name: getattr(whole, name)[rows] for name in ("q_BHTD", "k_BHTD", "v_BHTD")})},
            (0, 1, 2, 3),
        )
        for rows in row_B
    ]
    joined = JoinedFactors(parts, row_B)
    assert joined.heads == (0, 1, 2, 3)
    assert torch.equal(joined.layer(2).maps(), whole.maps())
    assert torch.equal(joined.layer(2).v_BHTD, whole.v_BHTD)


# Training


@pytest.mark.parametrize(
    ("mode", "fields"),
    [
        ("copy", {"accumulate": 2, "student_jitter": 0.4}),
        ("distill", {"shuffle": "block", "workers": 1}),
        ("scratch", {}),
    ],
)
def test_training_from_two_caches_is_training_from_one_of_all_tars(mode, fields, config_for, part_caches, tiny_cache):
    joined = config_for("joined", mode, part_caches(**FLOAT32), **fields)
    whole = config_for("whole", mode, tiny_cache(**FLOAT32), **fields)
    summaries = [train(joined), train(whole)]
    assert losses_of(joined) == losses_of(whole)
    assert [summary.num_samples for summary in summaries] == [48, 48]
    ours, theirs = (load_file(config.out / "model.safetensors") for config in (joined, whole))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_finetuning_and_subsets_take_all_caches(config_for, part_caches, tiny_cache, tiny_weights):
    fields = {"weights": tiny_weights, "subset": 20}
    joined = config_for("joined", "finetune", part_caches(**FLOAT32), **fields)
    whole = config_for("whole", "finetune", tiny_cache(**FLOAT32), **fields)
    (data,) = open_training_data([joined], CPU)
    assert 0 < (data.order.sample_S >= 32).sum() < 20
    assert data.record.num_classes == 10
    assert train(joined).num_samples == train(whole).num_samples == 20
    assert losses_of(joined) == losses_of(whole)


def test_the_live_teacher_runs_for_all_caches(config_for, part_caches, tiny_weights):
    paths = part_caches(**FLOAT32)
    cached = config_for("cached", "copy", paths)
    live = config_for("live", "copy", paths, live_teacher=True, weights=tiny_weights)
    train(cached)
    train(live)
    assert losses_of(cached) == pytest.approx(losses_of(live), rel=1e-5)


def test_caches_of_other_codecs_and_views_teach_about_the_same(config_for, part_caches, tiny_cache):
    paths = part_caches(first={"codec": "transform", "views": 1}, second={"codec": "transform:dct=false", "views": 1})
    joined, whole = config_for("joined", "copy", paths), config_for("whole", "copy", tiny_cache(codec=FLOAT32["codec"]))
    train(joined)
    train(whole)
    assert losses_of(joined) == pytest.approx(losses_of(whole), rel=0.03)


def test_a_student_of_a_sweep_learns_from_all_caches_as_it_would_alone(config_for, part_caches):
    paths = part_caches(**FLOAT32)
    students = [config_for(f"sweep/{mode}", mode, paths) for mode in ("copy", "distill", "scratch")]
    train_sweep(students)
    for config in students:
        alone = replace(config, out=config.out.parent.with_name("alone") / config.mode)
        train(alone)
        assert losses_of(config) == losses_of(alone)
        # The same run by its record: it is found finished.
        assert train(replace(alone, out=config.out)).loss == train(alone).loss


DIES = """
import pickle, sys, threading, time, os, signal
def die(checkpoint):
    while not checkpoint.exists():
        time.sleep(0.0005)
    os.kill(os.getpid(), signal.SIGKILL)
config = pickle.load(sys.stdin.buffer)
threading.Thread(target=die, args=(config.out / "checkpoint.pt",), daemon=True).start()
from atcache.pipelines.train.run import train
train(config)
"""


def test_a_killed_run_goes_on_and_other_caches_are_another_run(config_for, part_caches):
    paths = part_caches(**FLOAT32)
    whole, died = (config_for(name, "copy", paths, steps=60, checkpoint_every=7) for name in ("whole", "died"))
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", DIES], input=pickle.dumps(died), capture_output=True, env=env)
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()
    assert not (died.out / "model.safetensors").exists()
    for others in (paths[::-1], paths[:1], paths[1:]):
        with pytest.raises(CacheMismatchError, match=r"another run: .*its training images are different"):
            train(replace(died, cache=others))
    train(died)
    train(whole)
    assert losses_of(died) == losses_of(whole)


def test_the_command_takes_caches_more_than_once_and_the_file_a_list(part_caches, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    first, second = part_caches(**FLOAT32)
    run = ["train", "--mode", "copy", "--steps", "2", "--batch-size", "12", "--device", "cpu", "--precision", "fp32"]
    typed = CliRunner().invoke(cli, [*run, "--cache", str(first), "--cache", str(second), "--out", "typed"])
    assert typed.exit_code == 0, typed.output
    Path("atcache.toml").write_text(f'[train]\ncache = ["{first}", "{second}"]\n')
    listed = CliRunner().invoke(cli, [*run, "--out", "listed"])
    assert listed.exit_code == 0, listed.output
    Path("atcache.toml").write_text(f'[train]\ncache = "{first}"\n')
    one = CliRunner().invoke(cli, [*run, "--out", "one"])
    assert one.exit_code == 0, one.output
    found = [json.loads(done.stdout) for done in (typed, listed, one)]
    assert [row["num_samples"] for row in found] == [48, 48, 32]
    assert found[0]["loss"] == found[1]["loss"]
    records = [json.loads((tmp_path / name / "run.json").read_text()) for name in ("typed", "listed")]
    for name, record in zip(("typed", "listed"), records, strict=True):
        assert record["places"].pop("out") == name
    assert records[0] == records[1]


def test_a_sweeps_student_may_name_the_caches_that_all_have(part_caches, tmp_path):
    first, second = part_caches(**FLOAT32)
    table = f'[[student]]\nname = "a"\ncache = ["{first}", "{second}"]\n[[student]]\nname = "b"\n'
    (tmp_path / "sweep.toml").write_text(table)
    common = ["train", "--sweep", str(tmp_path / "sweep.toml"), "--out", str(tmp_path / "runs"), "--mode", "scratch"]
    place = ["--steps", "2", "--batch-size", "12", "--device", "cpu", "--precision", "fp32"]
    same = CliRunner().invoke(cli, [*common, *place, "--cache", str(first), "--cache", str(second)])
    assert same.exit_code == 0, same.output
    other = CliRunner().invoke(cli, [*common, *place, "--cache", str(first)])
    assert other.exit_code == 1
    assert "cache is (" in other.stderr
    assert "They share one stream of batches" in other.stderr


def test_data_names_the_moved_tars_of_all_caches(config_for, part_caches, digits_tars, tmp_path):
    here, there = tmp_path / "here", tmp_path / "there"
    for folder, tars in ((here, digits_tars[:2]), (there, digits_tars[2:])):
        folder.mkdir()
        for tar in tars:
            (folder / tar.name).write_bytes(tar.read_bytes())
    paths = part_caches(**FLOAT32)
    moved = config_for("moved", "copy", paths, data=(str(here), str(there)), steps=3)
    in_place = config_for("in-place", "copy", paths, steps=3)
    assert train(moved).loss == train(in_place).loss
    with pytest.raises(SourceError, match=rf"^{there} does not hold the tars that were indexed: digits-0000\.tar is"):
        train(replace(moved, data=(str(there),), out=tmp_path / "half"))


def test_validation_on_two_caches_is_validation_on_one_of_all_tars(config_for, part_caches, tiny_cache):
    teaching = tiny_cache(**FLOAT32)
    exact = {"codec": "exact:dtype=float32", "policy": "eval"}
    parts, whole = part_caches(**exact), tiny_cache(**exact)
    on_parts = train(config_for("on-parts", "copy", teaching, steps=3, val_cache=parts)).validation
    assert on_parts.num_samples == 48
    assert on_parts == train(config_for("on-whole", "copy", teaching, steps=3, val_cache=whole)).validation
    one, other = parts
    run = str(config_for("on-parts", "copy", teaching).out)
    place = ["--device", "cpu", "--precision", "fp32"]
    shown = CliRunner().invoke(cli, ["eval", run, "--cache", str(one), "--cache", str(other), *place])
    assert shown.exit_code == 0, shown.output
    assert json.loads(shown.stdout)["sets"][0]["runs"][0]["loss"] == pytest.approx(on_parts.loss)


# Refusals


def test_tars_that_would_not_be_read_are_refused(config_for, part_caches, digits_tars):
    stored, tars = part_caches(pixels="store"), str(digits_tars[0].parent)
    with pytest.raises(ConfigError, match=rf"^data={tars}: no tar would be read, .* in {stored[0]} and {stored[1]}\."):
        train(config_for("stored", "copy", stored, data=tars, steps=1))
    with pytest.raises(ConfigError, match=rf"^data={tars}: no tar would be read, .* in {stored[0]}\. Leave it out"):
        train(config_for("validated", "scratch", part_caches()[1], steps=1, val_cache=stored[0], val_data=tars))
    half_stored = part_caches(second={"pixels": "store"})
    assert train(config_for("half", "copy", half_stored, data=tars, steps=1)).steps == 1


def test_caches_that_do_not_go_together_are_refused_with_both_named(part_caches, tiny_weights, tmp_path):
    weights = {name: 2 * tensor for name, tensor in load_file(tiny_weights).items()}
    save_file(weights, tmp_path / "other.safetensors")
    larger = "vit_tiny_patch16_224:img_size=16,patch_size=4,embed_dim=32,depth=2,num_heads=2,num_classes=10"
    scaled = {name: tensor for name, tensor in load_file(tiny_weights).items() if "patch_embed" not in name}
    scaled |= {"patch_embed.proj.weight": torch.randn(32, 3, 4, 4), "patch_embed.proj.bias": torch.zeros(32)}
    save_file(scaled, tmp_path / "larger.safetensors")
    for fields, difference in (
        ({"weights": tmp_path / "other.safetensors"}, r"weights_sha256 is '\w+...' in {0} and '\w+...' in {1}"),
        ({"layers": "0"}, r"geometry\.layers is \[0, 1\] in {0} and \[0\] in {1}"),
        ({"heads": "1"}, r"geometry\.heads is \[0, 1\] in {0} and \[1\] in {1}"),
        (
            {"teacher": larger, "weights": tmp_path / "larger.safetensors"},
            r".*views\.image_height is 8 in {0} and 16 in {1}",
        ),
    ):
        paths = part_caches(second=fields)
        expected = r"these caches cannot be used together: .*" + difference.format(*map(str, paths))
        with pytest.raises(CacheMismatchError, match=expected):
            open_caches(paths)


def test_samples_that_two_caches_hold_are_refused(part_caches, tiny_cache):
    first, second = part_caches()
    whole, drawn_anew = tiny_cache(), tiny_cache(views=2)
    for paths in ([first, first], [whole, drawn_anew], [second, first, whole]):
        with pytest.raises(
            CacheMismatchError, match=r"both hold samples of digits-000\d\.tar, which would count twice"
        ):
            open_caches(paths)


def test_what_one_of_the_caches_cannot_do_is_refused_by_its_name(config_for, part_caches):
    paths = part_caches(first={"codec": "int8"}, second={"codec": "transform"})
    with pytest.raises(ConfigError, match=rf"codec transform of {paths[1]} keeps only their maps"):
        train(config_for("q", "copy", paths, what="q"))
    paths = part_caches(second={"mixup": 0.8})
    with pytest.raises(ConfigError, match=rf"subset=5: the views of {paths[1]} are mixed"):
        train(config_for("subset", "copy", paths, subset=5))
