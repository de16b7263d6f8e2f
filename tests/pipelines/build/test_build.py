"""Building: what is stored is what the teacher attended with, and neither kills, workers nor bad input change it."""

from __future__ import annotations

import io
import json
import multiprocessing
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import webdataset
from click.testing import CliRunner
from PIL import Image

import atcache
from atcache.attention.capture import FactorCapture
from atcache.cli.main import cli
from atcache.codecs.int8 import Int8Codec
from atcache.codecs.registry import parse_codec
from atcache.codecs.transform.codec import TransformCodec
from atcache.errors import (
    BadImageError,
    CacheMismatchError,
    CacheMissError,
    ConfigError,
    CorruptCacheError,
    DiskFullError,
    SourceError,
)
from atcache.pipelines.build.config import BuildConfig
from atcache.pipelines.build.run import build
from atcache.pipelines.fidelity import Expectation
from atcache.store.layout import BLOSC, COMPRESSORS, ZSTD, Status
from atcache.store.manifest import check_commit, list_commits, read_commits
from atcache.store.writer import encode_view
from atcache.teachers.inputs import normalise_images
from atcache.teachers.load import create_student, load_teacher
from atcache.teachers.names import parse_model_name
from atcache.views.apply import apply_view
from atcache.views.draw import draw_view

# Processes that start in no time: their server has imported everything once, and knows nothing of pytest's threads.
CHILDREN = multiprocessing.get_context("forkserver")
CHILDREN.set_forkserver_preload(
    ["__main__", "atcache.pipelines.build.run", "atcache.cache.cache", "timm", "zarr", "dask.array"]
)


MIXED = {"mixup": 0.8, "cutmix": 1.0}


@pytest.fixture
def config(digits_build) -> BuildConfig:
    return digits_build


def files(path: Path) -> dict[str, bytes]:
    return {str(file.relative_to(path)): file.read_bytes() for file in path.rglob("*") if file.is_file()}


def differences(path: Path, expected: Path) -> list[str]:
    """Names of the files that are not the same in both folders."""
    ours, theirs = files(path), files(expected)
    return sorted(name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name))


def picture(seed: int, side: int = 8, kind: str = "JPEG") -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (side, side, 3), np.uint8)
    encoded = io.BytesIO()
    Image.fromarray(pixels).save(encoded, format=kind)
    return encoded.getvalue()


def write_tar(path: Path, samples: list[dict]) -> Path:
    with path.open("wb") as file, webdataset.TarWriter(file) as writer:
        for number, sample in enumerate(samples):
            writer.write({"__key__": f"sample-{number:03d}", **sample})
    return path


# What is stored


@pytest.mark.parametrize("policy", ["eval", "crop-flip", "randaug"])
def test_stored_maps_are_those_timm_forms_of_the_same_pixels(config, policy):
    build(replace(config, policy=policy, codec="exact:dtype=float32"))
    cache = atcache.open(config.out)
    teacher = load_teacher(config.teacher, weights=config.weights)
    pixels = torch.from_numpy(np.stack([cache.image(sample) for sample in range(48)]))
    formed = formed_maps(teacher.model, normalise_images(pixels, teacher.input.mean, teacher.input.std, "cpu"))
    for layer, attn_SHQK in enumerate(formed):
        stored = cache.maps(layer=layer)[0].compute()
        assert np.allclose(stored, attn_SHQK, atol=2e-6)
        assert attn_SHQK.max() > 0.3, "maps near uniform would prove little"


def formed_maps(model, images):
    """Maps as timm's unfused attention forms them."""
    maps, hooks = [], []
    for block in model.blocks:
        block.attn.fused_attn = False
        hooks.append(block.attn.attn_drop.register_forward_hook(lambda _, args, __: maps.append(args[0].numpy())))
    with torch.no_grad():
        model(images)
    return maps


@pytest.mark.parametrize("codec", ["int8", "exact", "exact:dtype=float32"])
def test_codes_are_those_of_the_factors_captured_directly(config, codec):
    build(replace(config, codec=codec))
    cache = atcache.open(config.out)
    teacher = load_teacher(config.teacher, weights=config.weights)
    capture = FactorCapture(teacher.model, None, None)
    coder = parse_codec(codec).coder(cache.geometry, {})
    for start, stop in [(0, 3), (6, 8), (45, 48)]:  # batches as the build formed them
        pixels = torch.from_numpy(np.stack([cache.image(sample) for sample in range(start, stop)]))
        images = normalise_images(pixels, teacher.input.mean, teacher.input.std, "cpu")
        with torch.inference_mode():
            codes_BLTC = coder.encode(capture(images)).numpy()
        stored = np.stack([cache.reader.read_codes(0, sample) for sample in range(start, stop)])
        assert np.array_equal(stored, codes_BLTC)


def test_chosen_layers_and_heads_are_those_of_the_whole(config, tmp_path):
    build(replace(config, codec="exact:dtype=float32"))
    build(replace(config, codec="exact:dtype=float32", layers="1", heads="1", out=tmp_path / "part.zarr"))
    whole, part = atcache.open(config.out), atcache.open(tmp_path / "part.zarr")
    assert (part.geometry.layers, part.geometry.heads) == ((1,), (1,))
    assert np.allclose(part.maps(layer=1).compute(), whole.maps(layer=1, heads=[1]).compute(), atol=1e-6)
    with pytest.raises(CacheMissError, match=r"layer 0 of the teacher is not stored .* stored are 1"):
        part.maps(layer=0)


@pytest.mark.parametrize("policy", ["eval", "crop-flip", "randaug"])
def test_stored_pixels_are_the_replayed_ones(config, tmp_path, policy):
    views = 1 if policy == "eval" else 2
    build(replace(config, policy=policy, views=views))
    build(replace(config, policy=policy, views=views, pixels="store", out=tmp_path / "stored.zarr"))
    replayed, stored = atcache.open(config.out), atcache.open(tmp_path / "stored.zarr")
    assert stored.reader.layout.pixels == (8, 8)
    for view in range(views):
        for sample in range(48):
            assert np.array_equal(replayed.image(sample, view), stored.image(sample, view))
            assert np.array_equal(replayed.reader.read_codes(view, sample), stored.reader.read_codes(view, sample))


def test_views_replay_bit_for_bit_in_other_processes_in_another_order(config):
    build(replace(config, policy="randaug", views=2, workers=1))
    cache = atcache.open(config.out)
    expected = {}
    for view in range(2):
        for sample in range(48):
            image, key = cache.source.read_image(sample), cache.reader.samples.sample_key(sample)
            drawn_P = draw_view(cache.policy, key, view, image.height, image.width)
            expected[sample, view] = apply_view(image, drawn_P, cache.policy)
    order = random.Random(1).sample(sorted(expected), len(expected))
    for num_processes in (1, 2):
        with ProcessPoolExecutor(num_processes, mp_context=CHILDREN) as processes:
            images = processes.map(cache.image, *zip(*order, strict=True), chunksize=5)
            assert all(np.array_equal(image, expected[place]) for place, image in zip(order, images, strict=True))


@pytest.mark.parametrize("mixed", [{}, MIXED], ids=["plain", "mixed"])
def test_workers_do_not_change_a_byte(config, tmp_path, mixed):
    config = replace(config, **mixed)
    build(config)
    build(replace(config, workers=2, out=tmp_path / "two.zarr"))
    assert differences(tmp_path / "two.zarr", config.out) == []


def test_the_teacher_attends_to_the_mixed_image_that_is_replayed(config):
    build(replace(config, codec="exact:dtype=float32", views=2, **MIXED))
    cache = atcache.open(config.out)
    teacher = load_teacher(config.teacher, weights=config.weights)
    capture = FactorCapture(teacher.model, None, None)
    unmixed = replace(cache.policy, mixing=None)
    num_mixed = 0
    for view in range(2):
        pixels = torch.from_numpy(np.stack([cache.image(sample, view) for sample in range(48)]))
        images = normalise_images(pixels, teacher.input.mean, teacher.input.std, "cpu")
        with torch.inference_mode():
            layers = capture(images)
        for layer, expected in enumerate(layers):
            stored = cache.factors(layer=layer, view=view)
            assert np.allclose(stored.q_VSHTD[0].compute(), expected.q_BHTD, rtol=1e-5, atol=1e-5)
            assert np.allclose(stored.k_VSHTD[0].compute(), expected.k_BHTD, rtol=1e-5, atol=1e-5)
        for sample in range(48):
            source_image, key = cache.source.read_image(sample), cache.reader.samples.sample_key(sample)
            alone = apply_view(source_image, draw_view(unmixed, key, view, 8, 8), unmixed)
            num_mixed += not np.array_equal(alone, pixels[sample].numpy())
    assert num_mixed > 80, "views that are not mixed would prove little"


def test_a_view_says_who_is_mixed_in(config):
    build(replace(config, **MIXED))
    cache = atcache.open(config.out)
    for sample in range(48):
        view, parameters_P = cache.view(sample), cache.reader.parameters(0, sample)
        assert view.share == parameters_P[-5]
        assert view.partner == (sample + parameters_P[-6] if parameters_P[-6] else None)
        assert view.partner is None or view.partner // 8 == sample // 8, "tasks are of 8 samples"
    printed = CliRunner().invoke(cli, ["info", str(config.out)]).output
    assert "crop-flip with mixup 0.8 and CutMix 1.0, seed 0" in printed


def test_bad_samples_are_mixed_into_nobody(config, tmp_path):
    samples = [{"png": picture(seed, kind="PNG"), "cls": b"%d" % seed} for seed in range(16)]
    samples[3]["png"] = b"no image"
    del samples[9]["cls"]
    tar = write_tar(tmp_path / "some.tar", samples)
    build(replace(config, data=str(tar), on_bad_image="skip", views=4, **MIXED))
    cache = atcache.open(config.out)
    partners = set()
    for view in range(4):
        assert np.flatnonzero(cache.reader.status_VS[view] != Status.STORED).tolist() == [3, 9]
        for sample in set(range(16)) - {3, 9}:
            partners.add(cache.view(sample, view).partner)  # replays, and so proves
    assert {3, 9}.isdisjoint(partners)


def test_mixing_that_cannot_be_is_refused_before_anything_is_written(config):
    for fields, message in (
        ({"policy": "eval", "mixup": 0.8}, "views of policy eval are never mixed"),
        ({"mix_prob": 0.5}, r"mix_prob=0\.5 without mixup or cutmix"),
        ({"cutmix": 1.0, "samples_per_shard": 1}, "a shard takes one sample only, so there is nobody to mix it with"),
    ):
        with pytest.raises(ConfigError, match=message):
            build(replace(config, **fields))
    assert not config.out.exists()


@pytest.mark.parametrize(("images", "codec", "expected"), [("noise", "int8", ZSTD), ("digits", "exact", BLOSC)])
def test_codes_are_compressed_by_what_makes_them_smaller(config, tmp_path, images, codec, expected):
    noise = write_tar(tmp_path / "noise.tar", [{"png": picture(seed, kind="PNG"), "cls": b"0"} for seed in range(24)])
    build(replace(config, codec=codec, data=str(noise) if images == "noise" else config.data))
    reader = atcache.open(config.out).reader
    layouts = {compressor: replace(reader.layout, compressor=compressor) for compressor in COMPRESSORS}
    codes = [reader.read_codes(0, sample) for sample in range(24)]
    nbytes = {name: sum(len(b"".join(encode_view(layout, c))) for c in codes) for name, layout in layouts.items()}
    assert reader.layout.compressor == expected
    # A near tie goes to zstd, which is faster to read.
    assert (nbytes[BLOSC] < 0.99 * nbytes[ZSTD]) == (expected == BLOSC)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"codec": "int8"},
        {"codec": "exact"},
        {"policy": "randaug", "views": 2},
        {"policy": "eval", "pixels": "store"},
        {"policy": "randaug", "codec": "transform:target_kl=0.1", **MIXED},
    ],
    ids=["transform", "int8", "exact", "two views", "pixels", "mixed"],
)
def test_the_plan_tells_the_size_within_5_percent(config, fields):
    plans = []
    summary = build(replace(config, samples_per_shard=16, calibration_samples=12, **fields), plans.append)
    assert summary.complete is not None
    shards = re.compile(r"(attention/codes|pixels/rgb|views/\w+)/c/")
    written = sum(len(data) for name, data in files(config.out).items() if shards.match(name))
    assert summary.complete["nbytes"] == written
    assert plans[0].nbytes_per_view == pytest.approx(written / summary.complete["num_stored"], rel=0.05)
    assert plans[0].remaining_nbytes == pytest.approx(written, rel=0.05)
    assert plans[0].map_nbytes_per_view == 2 * 2 * 2 * 17 * 17


@pytest.mark.parametrize(("codec", "most_kl"), [("transform", 0.005), ("int8", 1e-3)])
def test_the_quality_that_was_planned_is_the_quality_that_is_recorded(config, codec, most_kl, capsys):
    summary = build(replace(config, codec=codec))
    assert summary.plan is not None
    assert summary.complete is not None
    assert 0 < summary.plan.row_kl_nats < most_kl
    assert 0 < summary.plan.injected_error < 0.05
    recorded = summary.complete["quality"]["row_kl_nats"]
    assert recorded["mean"] == pytest.approx(summary.plan.row_kl_nats, rel=0.5)
    assert recorded["mean"] <= recorded["max"]
    assert summary.complete["num_checked"] == 6 * (2 + 2), "of the first and of the last batch of each task"
    assert (summary.row_kl_nats, summary.warning) == (recorded["mean"], None)
    assert "Warning" not in capsys.readouterr().err


def flat_then_textured(path: Path, num_flat: int, num_samples: int) -> Path:
    """A tar whose first images are of one colour each and whose others are noise."""
    samples = []
    for number in range(num_samples):
        png = io.BytesIO()
        Image.new("RGB", (8, 8), (number, 100, 200)).save(png, format="PNG")
        data = png.getvalue() if number < num_flat else picture(number, kind="PNG")
        samples.append({"png": data, "cls": b"0"})
    return write_tar(path, samples)


WARNING = (
    r"Warning: decoded maps have a row KL of [\d.e-]+ nats on average, over 1.5 times the 0.005 of the codec's target"
)


@pytest.mark.parametrize("samples_per_shard", [8, 48], ids=["many tasks", "one task"])
def test_images_unlike_those_of_calibration_are_warned_of(config, tmp_path, samples_per_shard):
    """One calibration sample is the first one, which is flat."""
    tar = flat_then_textured(tmp_path / "unlike.tar", 12, 48)
    config = replace(config, data=str(tar), samples_per_shard=samples_per_shard)
    result = run_cli(config, calibration_samples="1")
    assert result.exit_code == 0, result.output
    record = json.loads(result.stdout)
    assert record["plan"]["row_kl_nats"] <= 0.005
    assert record["row_kl_nats"] > 1.5 * 0.005
    assert re.match(WARNING, record["warning"])
    warnings = [line for line in result.stderr.splitlines() if line.startswith("Warning")]
    assert len(warnings) == 2, "once as soon as it shows, once at the end"
    assert warnings[1] == record["warning"]
    # Asked again, the finished cache is no better.
    again = run_cli(config, calibration_samples="1")
    assert json.loads(again.stdout)["warning"] == record["warning"]
    assert [line for line in again.stderr.splitlines() if line.startswith("Warning")] == [record["warning"]]


def test_calibration_that_saw_both_kinds_of_images_is_not_warned_of(config, tmp_path):
    tar = flat_then_textured(tmp_path / "both.tar", 24, 48)
    result = run_cli(replace(config, data=str(tar)))
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["warning"] is None
    assert "Warning" not in result.stderr


@pytest.mark.parametrize(
    ("codec", "row_kl_nats", "num_views", "sentence"),
    [
        (TransformCodec(target_kl=0.02), 0.031, 12, "KL of 0.031 nats on average, over 1.5 times the 0.02 of"),
        (TransformCodec(target_kl=0.02), 0.029, 12, None),
        (TransformCodec(target_kl=0.02), 0.031, 11, None),
        (TransformCodec(target_nbytes=1000), 0.016, 12, "over 1.5 times the 0.01 measured in calibration"),
        (Int8Codec(), 0.016, 12, "over 1.5 times the 0.01 measured in calibration"),
        (Int8Codec(), 0.014, 12, None),
        (Int8Codec(), float("nan"), 12, "KL of nan nats"),
    ],
)
def test_the_limit_is_that_of_the_target_where_there_is_one(codec, row_kl_nats, num_views, sentence):
    warning = Expectation.of(codec, 0.01, torch.float32).warn(row_kl_nats, num_views)
    assert (warning is None) == (sentence is None)
    assert warning is None or sentence in warning


def test_next_to_nothing_is_no_reason_to_warn():
    exact = parse_codec("exact")
    assert Expectation.of(exact, 1e-9, torch.float32).warn(9e-7, 12) is None
    assert Expectation.of(exact, 1e-9, torch.bfloat16).warn(1.9e-4, 12) is None
    assert Expectation.of(exact, 1e-9, torch.float32).warn(2e-6, 12) is not None


# Stopping and going on


def test_a_build_killed_at_20_moments_equals_one_in_one_go(config, tmp_path):
    config = replace(config, views=2, pixels="store", out=tmp_path / "whole.zarr", **MIXED)
    in_a_child(config)  # the first one also starts the server
    shutil.rmtree(config.out)
    start_s = time.monotonic()
    assert in_a_child(config) == 0
    whole_s = time.monotonic() - start_s
    moments, num_kills, num_partly_done, started = random.Random(0), 0, 0, 0
    # Kills that hit no half-built cache would prove nothing; on a busy machine few of them do.
    while num_kills < 20 or num_partly_done < 3:
        killed = replace(config, out=tmp_path / "killed" / f"{started}.zarr")
        exit_code = in_a_child(killed, kill_after_s=moments.uniform(0, whole_s))
        num_kills += exit_code == -signal.SIGKILL
        num_partly_done += 0 < len(list_commits(killed.out)) < 12
        if exit_code == 0:
            assert differences(killed.out, config.out) == []
            started += 1
    build(killed)
    for path in (tmp_path / "killed").iterdir():
        assert path.suffix == ".zarr", "temp folders are left"
        assert differences(path, config.out) == []


def in_a_child(config, kill_after_s=None):
    """Exit code of a build in a process of its own, killed after a while if it still runs."""
    child = CHILDREN.Process(target=build, args=(config,))
    child.start()
    child.join(kill_after_s)
    child.kill()
    child.join()
    return child.exitcode


def test_ctrl_c_says_one_sentence_and_the_next_build_continues(config, tmp_path):
    config = replace(config, views=20, samples_per_shard=48, workers=2)
    arguments = [
        *("--teacher", config.teacher, "--weights", str(config.weights), "--data", config.data),
        *("--out", str(config.out), "--views", "20", "--samples-per-shard", "48", "--batch-size", "3"),
        *("--workers", "2", "--device", "cpu", "--precision", "fp32"),
    ]
    process = subprocess.Popen(
        [sys.executable, "-m", "atcache.cli.main", "build", *arguments],
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
        # Whoever runs the tests in the background may have had it ignored.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    while len(list_commits(config.out)) < 3 and process.poll() is None:
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: workers get it too
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 130, stderr
    assert "Traceback" not in stderr
    assert stderr.splitlines()[-1] == "Stopped. What was stored stays; type the same command again to continue."
    assert stdout == ""
    num_done = len(list_commits(config.out))
    assert 3 <= num_done < 20
    assert not [name for name in files(config.out) if name.endswith(".partial")]
    summary = build(config)
    assert summary.plan is not None
    assert summary.plan.num_done_tasks == num_done
    build(replace(config, out=tmp_path / "whole.zarr"))
    assert differences(config.out, tmp_path / "whole.zarr") == []


def test_a_finished_cache_asked_for_again_is_left_alone(config):
    first = build(config)
    before = {file: file.stat().st_mtime_ns for file in config.out.rglob("*")}
    again = build(config)
    assert again.plan is None
    assert again.num_built_views == 0
    assert again.complete == first.complete
    assert {file: file.stat().st_mtime_ns for file in config.out.rglob("*")} == before


def test_a_dry_run_writes_nothing(config, tmp_path):
    before = sorted(tmp_path.rglob("*"))
    summary = build(replace(config, dry_run=True))
    assert summary.plan is not None
    assert (summary.plan.num_tasks, summary.plan.num_done_tasks, summary.complete) == (6, 0, None)
    assert sorted(tmp_path.rglob("*")) == before


def test_going_on_with_other_parameters_names_each_difference(config):
    config = replace(config, codec="int8")
    build(config)
    before = files(config.out)
    other = replace(config, codec="exact", views=2, seed=1, layers="0", samples_per_shard=16, on_bad_image="skip")
    with pytest.raises(CacheMismatchError, match=r"cache.zarr exists and is another cache") as caught:
        build(other)
    message = str(caught.value)
    for difference in (
        "codec.name is 'int8' there and 'exact' here",
        "codec.dtype is None there and 'float16' here",
        "views.num_views is 1 there and 2 here",
        "views.policy.seed is 0 there and 1 here",
        "selection.layers is [0, 1] there and [0] here",
        "samples_per_shard is 8 there and 16 here",
    ):
        assert difference in message
    assert message.count(" there and ") == 6
    assert files(config.out) == before


def test_the_same_layers_written_otherwise_are_the_same_cache(config):
    build(config)
    for written in ("0-1", "0,1"):
        assert build(replace(config, layers=written)).num_built_views == 0


def test_going_on_with_other_weights_or_images_is_refused(config, digits_tars, tmp_path):
    build(config)
    with pytest.raises(CacheMismatchError, match=r"source.fingerprint is '\w+' there .* source.num_samples is 48 "):
        build(replace(config, data=str(digits_tars[0])))
    model = create_student(parse_model_name(config.teacher), num_classes=10)
    torch.save(model.state_dict(), tmp_path / "other.pth")
    with pytest.raises(CacheMismatchError, match=r"another cache: teacher.weights_sha256 is '\w+' there and '\w+' her"):
        build(replace(config, weights=tmp_path / "other.pth"))


# Damage, and disks that are full


def test_a_damaged_shard_is_named_and_rebuilt_as_it_was(config, tmp_path):
    build(config)
    shutil.copytree(config.out, tmp_path / "before.zarr")
    shard = config.out / "attention/codes/c/0/2/0/0/0"
    data = bytearray(shard.read_bytes())
    data[len(data) // 3] ^= 0x10
    shard.write_bytes(data)
    with pytest.raises(CorruptCacheError, match=r"codes/c/0/2/0/0/0, sample \d+ is damaged: .* Delete \S*b000002.json"):
        atcache.open(config.out).maps(layer=0)[0, 16:24].compute()
    (config.out / "commits/v0000-b000002.json").unlink()
    assert not atcache.open(config.out).reader.is_complete
    summary = build(config)
    assert summary.num_built_views == 8
    assert differences(config.out, tmp_path / "before.zarr") == []


def test_a_lost_shard_is_built_again_unasked(config, tmp_path):
    build(config)
    shutil.copytree(config.out, tmp_path / "before.zarr")
    (config.out / "commits/v0000-b000000.json").unlink()
    (config.out / "attention/codes/c/0/4/0/0/0").unlink()
    assert build(config).num_built_views == 16
    assert differences(config.out, tmp_path / "before.zarr") == []


def test_a_full_disk_loses_nothing_that_was_stored(config, small_disk, tmp_path):
    config = replace(config, codec="int8")  # the larger files
    whole = build(replace(config, out=tmp_path / "whole.zarr"))
    config = replace(config, out=small_disk / "cache.zarr")
    ballast = small_disk / "ballast"

    def fill_disk(_):
        # All but enough for the metadata and about three tasks; the plan has already looked at the free space.
        ballast.write_bytes(bytes(shutil.disk_usage(small_disk).free - 260 * 1024))

    with pytest.raises(DiskFullError, match=r"No space left on device.*command again to continue"):
        build(config, fill_disk)
    commits = read_commits(config.out)
    layout = atcache.open(config.out).reader.layout
    assert 0 < len(commits) < 6
    assert all(check_commit(config.out, commit, layout, deep=True) == [] for commit in commits.values())
    assert not [name for name in files(config.out) if name.endswith(".partial")]
    ballast.unlink()
    summary = build(config)
    assert summary.plan is not None
    assert summary.plan.num_done_tasks == len(commits)
    assert summary.complete == whole.complete
    assert differences(config.out, tmp_path / "whole.zarr") == []


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 2 MiB."""
    folder = tmp_path / "small"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(folder)], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"a small file system cannot be mounted here: {mounted.stderr.decode().strip()}")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def test_a_write_that_is_refused_loses_nothing_that_was_stored(config, tmp_path):
    config = replace(config, codec="int8")  # the larger files
    build(config)
    shutil.copytree(config.out, tmp_path / "before.zarr")
    for task in (1, 3, 4):
        (config.out / f"commits/v0000-b{task:06d}.json").unlink()
    with largest_file(nbytes=4096), pytest.raises(DiskFullError, match=r"File too large.*make room"):
        build(config)
    assert len(list_commits(config.out)) == 3
    build(config)
    assert differences(config.out, tmp_path / "before.zarr") == []


@contextmanager
def largest_file(*, nbytes: int):
    """The operating system refuses longer files: what a full disk does, without privileges."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_what_cannot_fit_is_refused_before_anything_is_written(config, small_disk):
    with pytest.raises(DiskFullError, match=r"\d+ MiB are still to be written, 2 MiB are free.*smaller --budget or"):
        build(replace(config, out=small_disk / "cache.zarr", views=30, codec="int8"))
    assert list(small_disk.iterdir()) == []


# Bad images


def bad_tar(folder: Path) -> Path:
    samples = [{"jpg": picture(seed), "cls": b"3"} for seed in range(12)]
    samples[4]["jpg"] = b"\xff\xd8\xff\xe0 this is no JPEG"
    del samples[7]["cls"]
    del samples[9]["jpg"]
    samples[10]["__key__"] = "sample-000"
    return write_tar(folder / "bad.tar", samples)


def test_skipped_images_are_recorded_counted_and_left_out(config, tmp_path):
    config = replace(config, data=str(bad_tar(tmp_path)), on_bad_image="skip", pixels="store", samples_per_shard=5)
    summary = build(config)
    assert summary.complete is not None
    assert (summary.complete["num_stored"], summary.complete["num_bad"]) == (8, 4)
    cache = atcache.open(config.out)
    expected = {4: Status.UNDECODABLE, 7: Status.NO_LABEL, 9: Status.NO_IMAGE, 10: Status.DUPLICATE_KEY}
    assert {s: status for s, status in enumerate(cache.reader.status_VS[0]) if status != Status.STORED} == expected
    maps = cache.maps(layer=0)[0].compute()
    assert [int(s) for s in np.flatnonzero(np.isnan(maps).all(axis=(1, 2, 3)))] == sorted(expected)
    for sample, reason in ((4, "undecodable"), (7, "no label"), (9, "no image"), (10, "duplicate key")):
        with pytest.raises(CacheMissError, match=f"of sample {sample} .* is not stored in .*: {reason}"):
            cache.view(sample)
    description = cache.describe()
    assert (description["num_bad"], description["is_complete"]) == (4, True)


def test_skipping_changes_nothing_for_good_images(config, tmp_path):
    build(config)
    build(replace(config, on_bad_image="skip", out=tmp_path / "skip.zarr"))
    assert differences(tmp_path / "skip.zarr", config.out) == []


@pytest.mark.parametrize("workers", [0, 2])
def test_an_undecodable_image_stops_the_build_with_one_sentence(config, tmp_path, workers):
    samples = [{"jpg": picture(seed), "cls": b"3"} for seed in range(12)]
    samples[8]["jpg"] = b"\xff\xd8\xff\xe0 this is no JPEG"
    tar = write_tar(tmp_path / "bad.tar", samples)
    config = replace(config, data=str(tar), workers=workers, calibration_samples=1, samples_per_shard=4)
    with pytest.raises(BadImageError, match=r"^\S*bad.tar: key 'sample-008': the image cannot be decoded: [^\n]*$"):
        build(config)
    assert "v0000-b000000" in list_commits(config.out)
    build(replace(config, on_bad_image="skip"))
    build(replace(config, on_bad_image="skip", out=tmp_path / "skipped.zarr"))
    assert differences(config.out, tmp_path / "skipped.zarr") == []


def test_a_bad_sample_the_headers_show_stops_the_build_before_the_teacher_is_loaded(config, tmp_path):
    samples = [{"jpg": picture(0), "cls": b"1"}, {"jpg": picture(1)}]
    with pytest.raises(SourceError, match=r"nolabel.tar: key 'sample-001'"):
        build(replace(config, data=str(write_tar(tmp_path / "nolabel.tar", samples)), teacher="no_such_teacher"))
    assert not config.out.exists()


def test_a_source_without_one_good_image_is_refused(config, tmp_path):
    tar = write_tar(tmp_path / "bad.tar", [{"jpg": b"nothing", "cls": b"1"}])
    with pytest.raises(ConfigError, match="none of 1 calibration images can be read"):
        build(replace(config, data=str(tar), on_bad_image="skip"))
    assert not config.out.exists()


# Memory

MEASURE_PEAKS = """
import os, sys
from pathlib import Path
import torch
from atcache.pipelines.build.config import BuildConfig
from atcache.pipelines.build.run import build
import timm, zarr
torch.set_num_threads(1)
_, teacher, weights, out, *sources = sys.argv
for number, source in enumerate(sources):
    config = BuildConfig(teacher=teacher, weights=Path(weights), data=source, out=Path(out) / f"{number}.zarr",
                         codec="exact:dtype=float32", device="cpu", precision="fp32", batch_size=16,
                         calibration_samples=16, samples_per_shard=50, workers=0)
    child = os.fork()
    if child == 0:
        build(config)
        os._exit(0)
    _, status, usage = os.wait4(child, 0)
    assert status == 0
    print(usage.ru_maxrss)
"""


def test_memory_does_not_grow_with_the_dataset(tmp_path):
    """Peak resident memory with 8 times the samples, each of 130 KB of codes, is within 32 MiB: a leak makes 90."""
    teacher = "vit_tiny_patch16_224:img_size=32,patch_size=4,depth=2,num_classes=10"
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=4, depth=2, num_classes=10)
    torch.save(model.state_dict(), tmp_path / "weights.pth")
    for name, num_tars in (("few", 1), ("many", 8)):
        (tmp_path / name).mkdir()
        for number in range(num_tars):
            samples = [{"png": picture(seed, side=32, kind="PNG"), "cls": b"0"} for seed in range(100)]
            write_tar(tmp_path / name / f"{number}.tar", samples)
    arguments = [teacher, tmp_path / "weights.pth", tmp_path, tmp_path / "few", tmp_path / "many"]
    done = subprocess.run([sys.executable, "-c", MEASURE_PEAKS, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    few_kib, many_kib = (int(line) for line in done.stdout.split())
    written = sum(len(data) for data in files(tmp_path / "1.zarr").values())
    assert written > 90 * 2**20
    assert many_kib - few_kib < 32 * 2**10, (few_kib, many_kib)


# The command line


def run_cli(config: BuildConfig, **options: str):
    """`atcache build` as the config says; `options` replace or add."""
    names = ("teacher", "weights", "data", "out", "workers", "device", "precision", "samples_per_shard", "batch_size")
    given = {**{name: getattr(config, name) for name in names}, **options}
    arguments = [text for name, value in given.items() for text in (f"--{name.replace('_', '-')}", str(value))]
    return CliRunner().invoke(cli, ["build", *arguments])


def test_the_command_prints_its_plan_and_one_line_of_json(config):
    result = run_cli(config)
    assert result.exit_code == 0, result.output
    record = json.loads(result.stdout)
    assert record["complete"]["num_stored"] == record["num_built_views"] == 48
    assert "48 samples x 1 views, 2 layers x 2 heads x 17 tokens" in result.stderr
    assert f"{config.out} is complete: 48 views stored, 0 bad" in result.stderr


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"data": "nowhere/x.tar"}, r"nowhere/x\.tar' matches no file"),
        ({"data": "nowhere/x-{0000..0003}.tar"}, r"nowhere/x-\{0000\.\.0003\}\.tar' matches no file"),
        ({"teacher": "vit_tinny_patch16_224"}, r"vit_tinny_patch16_224.*vit_tiny_patch16_224"),
        ({"weights": "nowhere.safetensors"}, r"nowhere\.safetensors"),
        ({"codec": "int9"}, r"int9.*int8"),
        ({"layers": "0-9"}, r"layer 2 does not exist: the model has 2"),
        ({"heads": "2"}, r"head 2 does not exist: the model has 2"),
        ({"policy": "eval", "views": "2"}, r"views=2: policy eval is the same every time"),
        ({"device": "tpu"}, r"tpu"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_bad_input_is_answered_with_a_sentence_and_exit_code_1(config, options, sentence):
    result = run_cli(config, **options)
    assert result.exit_code == 1
    last = result.stderr.splitlines()[-1]
    assert last.startswith("Error: ")
    assert "Traceback" not in result.output
    assert result.stdout == ""
    assert re.search(sentence, last), last
    assert not config.out.exists()


def test_an_out_that_is_no_cache_is_refused(config, tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.jpg").write_bytes(b"cat")
    result = run_cli(config, out=str(tmp_path / "photos"))
    assert result.exit_code == 1
    assert "photos exists and is no cache. Give another --out, or remove it." in result.stderr
    assert (tmp_path / "photos" / "cat.jpg").read_bytes() == b"cat"


def test_other_parameters_are_refused_at_the_command_line(config):
    assert run_cli(config).exit_code == 0
    result = run_cli(config, seed="7")
    assert result.exit_code == 1
    assert "views.policy.seed is 0 there and 7 here" in result.stderr
