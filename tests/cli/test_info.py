"""`atcache info`: what a cache holds and what is missing, without waiting for torch."""

from __future__ import annotations

import io
import json
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import webdataset
from click.testing import CliRunner
from counting import bytes_read, opened_below
from made_records import made_attributes
from made_store import LAYOUT, make_index
from PIL import Image

from atcache.attention.geometry import FactorGeometry
from atcache.attention.tokens import TokenLayout
from atcache.cli.main import cli
from atcache.cli.options import compare_sizes
from atcache.images.source import SampleIndex
from atcache.pipelines.build.config import BuildConfig
from atcache.pipelines.build.run import build
from atcache.store.layout import Status, StoreLayout
from atcache.store.manifest import delete_commits
from atcache.store.writer import TaskWriter, create_cache, encode_view, finish_cache
from atcache.views.policy import PARAMETER_NAMES, ViewPolicy


@pytest.fixture
def tar(tmp_path) -> Path:
    """20 noise images: one without a label, one that is no image."""
    path = tmp_path / "noise.tar"
    with path.open("wb") as file, webdataset.TarWriter(file) as writer:
        for number in range(20):
            png = io.BytesIO()
            pixels = np.random.default_rng(number).integers(0, 256, (8, 8, 3), np.uint8)
            Image.fromarray(pixels).save(png, format="PNG")
            sample = {"__key__": f"noise-{number:02d}", "png": png.getvalue(), "cls": b"1"}
            if number == 3:
                del sample["cls"]
            if number == 15:
                sample["png"] = b"\x89PNG\r\n\x1a\n and no more"
            writer.write(sample)
    return path


@pytest.fixture
def cache(tar, tiny_vit, tiny_weights, tmp_path) -> Path:
    config = BuildConfig(
        teacher=tiny_vit,
        weights=tiny_weights,
        data=str(tar),
        out=tmp_path / "noise.zarr",
        views=2,
        on_bad_image="skip",
        samples_per_shard=8,
        workers=0,
        device="cpu",
        precision="fp32",
    )
    build(config)
    return config.out


def show(*arguments: object):
    return CliRunner().invoke(cli, ["info", *map(str, arguments)])


def test_text_says_what_a_cache_holds(cache, tiny_vit):
    result = show(cache)
    assert result.exit_code == 0, result.output
    summary, _, _ = result.stdout.partition("\n\n")
    lines = {line[:10].strip(): line[11:] for line in summary.splitlines()}
    assert list(lines) == [
        *("cache", "teacher", "licence", "samples", "views", "attention", "codec", "size"),
        *("held back", "decoding", "row KL", "state", "bad"),
    ]
    assert lines["cache"] == f"{cache} (format 1)"
    assert lines["teacher"].startswith("vit_tiny_patch16_224:")
    assert lines["samples"] == "20 x 2 views"
    assert lines["views"] == "crop-flip, seed 0, 8 x 8 pixels, replayed from the tars"
    assert lines["attention"] == "2 layers (0-1) x 2 heads (0-1) x 17 tokens"
    assert lines["codec"] == "transform (dct True, predict True, target_kl 0.005)"
    assert "than float16 maps" in lines["size"]
    assert "nats on average" in lines["row KL"]
    assert re.fullmatch(r"q and k of a view take \d+% of the teacher's operations", lines["decoding"])
    assert lines["state"] == "complete, 36 views stored"
    assert lines["bad"] == "4 views left out: 2 no label, 2 undecodable"


@pytest.mark.parametrize("codec", ["transform", "int8"])
def test_the_codecs_card_says_what_each_layer_takes_and_loses(tiny_cache, codec):
    path = tiny_cache(codec=codec)
    calibration = json.loads(show(path, "--json").stdout)["calibration"]
    text = show(path).stdout
    summary, _, card = text.partition("\n\n")
    (held_back,) = [line[11:] for line in summary.splitlines() if line.startswith("held back")]
    target = " (target 0.005)" if codec == "transform" else ""
    assert held_back == (
        f"row KL {calibration['row_kl_nats']:.2g} nats{target}, features off by {calibration['injected_error']:.2g} "
        "with decoded maps; on 6 views before the build"
    )
    assert 0 < calibration["row_kl_nats"] < 0.0051
    assert 0 < calibration["injected_error"] < 0.5
    title, *rows = card.splitlines()
    assert title.split("  ")[0].strip() == "layer"
    assert [row.split() for row in rows] == [
        [f"{layer}", f"{row['nbytes']:.0f}", f"{row['row_kl_nats']:.2g}", f"{row['injected_error']:.2g}"]
        for layer, row in enumerate(calibration["layers"])
    ]
    assert len({len(line) for line in (title, *rows)}) == 1, "columns line up"
    nbytes = json.loads(show(path, "--json").stdout)["codes_nbytes_per_view"]
    # Shards have an index, too: 16 bytes a chunk.
    assert sum(row["nbytes"] for row in calibration["layers"]) == pytest.approx(nbytes - 16, rel=0.1)


def test_a_size_that_was_asked_for_is_shown_in_place_of_a_kl(tiny_cache):
    text = show(tiny_cache(codec=None, target_mb_per_view=0.0005)).stdout
    assert "target_nbytes 500)" in text
    assert "(target" not in text.partition("held back")[2]


def test_a_cache_that_recorded_less_is_shown_without_a_card():
    old = Path(__file__).parent.parent / "golden" / "format-1" / "int8-bias.zarr"
    result = show(old)
    assert result.exit_code == 0, result.output
    assert "held back  row KL" in result.stdout
    assert "\n\n" not in result.stdout


def test_json_is_one_line_and_says_the_same(cache):
    result = show(cache, "--json")
    assert result.exit_code == 0, result.output
    (line,) = result.stdout.splitlines()
    about = json.loads(line)
    shards = [file for folder in ("attention/codes", "views") for file in (cache / folder).rglob("c/*/*")]
    written = sum(file.stat().st_size for folder in shards for file in [folder, *folder.rglob("*")] if file.is_file())
    assert about["nbytes"] == written
    assert (about["num_stored"], about["num_bad"], about["bad"]) == (36, 4, {"no label": 2, "undecodable": 2})
    assert about["map_nbytes_per_view"] == 2 * 2 * 2 * 17**2
    assert about["times_smaller_than_float16_maps"] == pytest.approx(
        about["map_nbytes_per_view"] / about["codes_nbytes_per_view"], rel=0.01
    )
    assert about["is_complete"] is True


def test_a_large_cache_says_why_views_are_left_out_and_opens_no_shard(tmp_path):
    """150 tasks. Sample 7 was known to be bad, sample 9 turned out to be."""
    layout = replace(LAYOUT, num_samples=75, samples_per_shard=1, pixels=None, parameter_names=PARAMETER_NAMES)
    geometry = FactorGeometry(
        layers=tuple(range(4)),
        heads=(0, 1, 2),
        num_model_heads=3,
        num_kv_heads=3,
        head_dim=4,
        tokens=TokenLayout(num_prefix_tokens=1, grid_height=2, grid_width=2),
        scale=0.5,
    )
    policy, path, index = ViewPolicy(name="crop-flip", image_height=8, image_width=8), tmp_path / "c", make_index(75)
    create_cache(path, layout, made_attributes(layout, index, geometry, policy, {"name": "int8"}), index, {})
    for task in layout.tasks():
        writer = TaskWriter(path, layout, task)
        if task.start in (7, 9):
            writer.add(task.start, status=Status.UNDECODABLE)
        else:
            codes_LTC = np.zeros((4, 5, 24), np.int8)
            chunks = encode_view(layout, codes_LTC)
            parameters_P = np.zeros(len(PARAMETER_NAMES), np.float32)
            writer.add(task.start, status=Status.STORED, parameters_P=parameters_P, pixel_hash=1, chunks=chunks)
        writer.commit({"row_kl_nats": 0.1}, 1)
    finish_cache(path)
    with opened_below(path / "views") as opened:
        result = show(path, "--json")
    assert result.exit_code == 0, result.output
    assert opened == []
    assert json.loads(result.stdout)["bad"] == {"undecodable": 2, "other reasons": 2}
    assert "4 views left out: 2 undecodable, 2 other reasons" in show(path).stdout
    delete_commits(path, ["v0000-b000007", "v0001-b000020"])
    assert json.loads(show(path, "--json").stdout)["bad"] == {"undecodable": 1, "other reasons": 2}


def test_an_unfinished_cache_says_what_is_missing_and_what_to_type(cache):
    for name in ("v0000-b000001", "v0001-b000002"):
        (cache / "commits" / f"{name}.json").unlink()
    result = show(cache)
    assert "incomplete: 2 of 6 tasks missing, 25 views stored. Type the same `atcache build` or" in result.stdout
    about = json.loads(show(cache, "--json").stdout)
    assert (about["is_complete"], about["num_tasks"], about["num_tasks_done"]) == (False, 6, 4)


def test_a_cache_with_no_task_done_can_be_looked_at(cache):
    shutil.rmtree(cache / "commits")
    (cache / "commits").mkdir()
    result = show(cache)
    assert result.exit_code == 0, result.output
    assert "incomplete: 6 of 6 tasks missing, 0 views stored" in result.stdout
    assert "than float16 maps" not in result.stdout


def test_what_is_no_cache_is_said_in_a_sentence(tmp_path):
    result = show(tmp_path / "nothing.zarr")
    assert result.exit_code == 1
    assert "nothing.zarr is not a cache" in result.stderr


def test_info_does_not_wait_for_torch(cache):
    script = "import sys; from atcache.cli.main import cli\ncli(['info', sys.argv[1]], standalone_mode=False)\n"
    script += "sys.exit(', '.join({'torch', 'timm', 'zarr', 'dask'} & set(sys.modules)) or None)"
    done = subprocess.run([sys.executable, "-c", script, cache], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "complete" in done.stdout


def test_a_cache_as_large_as_imagenet_opens_in_a_moment(tmp_path):
    """1.3 million samples, 24 layers: only metadata and the sample table exist, as at the start of a build."""
    num_samples = 1_300_000
    index = SampleIndex(
        tars=(tmp_path / "train.tar",),
        tar_nbytes=(2**40,),
        keys_S=np.array([f"n{number:08d}" for number in range(num_samples)], dtype="S"),
        tar_S=np.zeros(num_samples, np.int32),
        offset_S=np.arange(num_samples, dtype=np.int64) * 110_000,
        nbytes_S=np.full(num_samples, 100_000, np.int64),
        label_S=np.arange(num_samples, dtype=np.int64) % 1000,
        problem_S=np.zeros(num_samples, np.uint8),
    )
    layout = StoreLayout(
        num_views=10,
        num_samples=num_samples,
        num_layers=24,
        num_tokens=197,
        num_components=2112,
        codes_dtype="int8",
        samples_per_shard=178,
        layers_per_chunk=1,
        parameter_names=PARAMETER_NAMES,
    )
    geometry = FactorGeometry(
        layers=tuple(range(24)),
        heads=tuple(range(16)),
        num_model_heads=16,
        num_kv_heads=16,
        head_dim=64,
        tokens=TokenLayout(num_prefix_tokens=1, grid_height=14, grid_width=14),
        scale=0.125,
    )
    policy = ViewPolicy(name="crop-flip", image_height=224, image_width=224)
    attributes = made_attributes(layout, index, geometry, policy, {"name": "int8"})
    create_cache(tmp_path / "large.zarr", layout, attributes, index, {})
    before = bytes_read()
    with opened_below(tmp_path) as opened:
        result = show(tmp_path / "large.zarr")
    assert len(opened) < 30, "it does not grow with the tasks"
    assert bytes_read() - before < 1_000_000
    assert "incomplete: 73040 of 73040 tasks missing" in result.stdout


def test_sizes_are_compared_in_words_that_are_true():
    assert compare_sizes(3.04) == "3.0x smaller"
    assert compare_sizes(0.5) == "2.0x larger"


def test_names_from_a_cache_cannot_move_the_cursor(cache):
    root = json.loads((cache / "zarr.json").read_text())
    root["attributes"]["atcache"]["teacher"]["licence"] = "\x1b[2Kmit\nstate      complete"
    (cache / "zarr.json").write_text(json.dumps(root))
    lines = show(cache).stdout.splitlines()
    assert "licence    ?[2Kmit state      complete" in lines


def test_codes_that_are_far_larger_than_their_maps_are_told_so(cache):
    root = json.loads((cache / "zarr.json").read_text())
    complete = root["attributes"]["atcache"]["complete"]
    complete["codes_nbytes"] = complete["nbytes"] = 10**9
    (cache / "zarr.json").write_text(json.dumps(root))
    result = show(cache)
    assert result.exit_code == 0, result.output
    assert re.search(r"; codes are \d+\.\dx larger than float16 maps", result.stdout)
