"""`atcache compare`: numbers against the maps themselves, and caches that cannot be compared."""

from __future__ import annotations

import csv
import json
import shutil

import numpy as np
import pytest
import zarr
from builds import MIXED
from click.testing import CliRunner
from made_teachers import tiny_teacher

import atcache
from atcache import stats
from atcache.cli.main import cli
from atcache.errors import CacheMismatchError
from atcache.pipelines.compare.config import CompareConfig
from atcache.pipelines.compare.run import KL_FLOOR, compare

MEASURES = {
    "kl_nats": lambda a, b: stats.kl_divergence(a, b, floor=KL_FLOOR),
    "js_nats": stats.js_divergence,
    "total_variation": stats.total_variation,
    "cosine": stats.cosine_similarity,
    "largest_overlap": lambda a, b: stats.largest_overlap(a, b, 10),
}


def maps_of(path, layer: int) -> np.ndarray:
    return atcache.open(path).maps(layer).compute().astype(np.float64)


def test_the_numbers_are_those_of_the_maps(tiny_cache):
    a, b = tiny_cache(views=2), tiny_cache(views=2, codec="int8")
    summary = compare(CompareConfig(a=a, b=b, sample=96, workers=2))
    assert (summary.num_views, summary.layers, summary.layers_b, summary.heads) == (96, (0, 1), (0, 1), (0, 1))
    assert summary.heads_b == ((0, 1), (0, 1))
    assert summary.notes == ()
    for position, layer in enumerate(summary.layers):
        ours, theirs = maps_of(a, layer), maps_of(b, layer)
        for name, measure in MEASURES.items():
            views_NH = measure(ours, theirs).mean(axis=-1).reshape(96, 2)
            np.testing.assert_allclose(getattr(summary, name)[position], views_NH.mean(axis=0), rtol=1e-6)
            error_H = views_NH.std(axis=0, ddof=1) / np.sqrt(96)
            np.testing.assert_allclose(summary.standard_errors[name][position], error_H, rtol=1e-4, atol=1e-12)
    assert 0 < summary.mean["kl_nats"] < 0.01
    assert summary.mean["kl_nats"] == pytest.approx(np.mean(summary.kl_nats))


def test_the_kl_of_a_codec_is_what_its_build_measured(tiny_cache):
    """A second opinion that shares no code: the build compares with the live teacher, in float64 from the factors."""
    path = tiny_cache(codec="int8", samples_per_shard=8)
    measured = atcache.open(path).record.complete.quality["row_kl_nats"].mean
    found = compare(CompareConfig(a=tiny_cache(samples_per_shard=8), b=path, sample=48)).mean["kl_nats"]
    assert found == pytest.approx(measured, rel=0.3)  # the build looks at some of the views only


def test_a_cache_agrees_with_itself(tiny_cache):
    summary = compare(CompareConfig(a=tiny_cache(), b=tiny_cache(), sample=4, match_heads=True))
    assert summary.heads_b == ((0, 1), (0, 1))
    for name, value in (("kl_nats", 0), ("js_nats", 0), ("total_variation", 0), ("cosine", 1), ("largest_overlap", 1)):
        assert summary.mean[name] == pytest.approx(value, abs=1e-12)


def test_samples_are_known_by_their_key_not_by_their_row(tiny_cache, digits_tars):
    whole, part = tiny_cache(), tiny_cache(data=str(digits_tars[1]))
    summary = compare(CompareConfig(a=part, b=whole, sample=48))
    assert summary.num_views == 16
    assert summary.mean["total_variation"] < 1e-6
    assert all(view.sample_key.startswith("digits-0001.tar/") for view in summary.worst)


def test_views_that_only_one_cache_has_are_left_out(tiny_cache):
    summary = compare(CompareConfig(a=tiny_cache(views=2), b=tiny_cache(), sample=1000))
    assert summary.num_views == 48
    assert {view.view for view in summary.worst} == {0}


def test_the_worst_views_come_first(tiny_cache):
    summary = compare(CompareConfig(a=tiny_cache(), b=tiny_cache(codec="int8"), sample=48, worst=3))
    ours, theirs = (
        np.stack([maps_of(path, layer)[0] for layer in (0, 1)]) for path in (tiny_cache(), tiny_cache(codec="int8"))
    )
    kl_S = MEASURES["kl_nats"](ours, theirs).mean(axis=(0, 2, 3))
    keys = atcache.open(tiny_cache()).samples.sample_key.values[np.argsort(-kl_S)[:3]]
    assert [view.sample_key for view in summary.worst] == keys.tolist()
    assert summary.worst[0].kl_nats == pytest.approx(kl_S.max())


# Other teachers


def test_heads_are_matched_by_what_they_look_at(tiny_cache, tiny_weights, tmp_path):
    """The same teacher with its two heads exchanged in each layer: heads match across, and agree then."""
    from safetensors.torch import load_file, save_file

    weights = load_file(tiny_weights)
    for name in [name for name in weights if "qkv" in name]:
        parts = weights[name].reshape(3, 2, 16, *weights[name].shape[1:])
        weights[name] = parts.flip(1).reshape(weights[name].shape).contiguous()
    for name in [name for name in weights if "attn.proj.weight" in name]:
        weights[name] = weights[name].reshape(32, 2, 16).flip(1).reshape(32, 32).contiguous()
    save_file(weights, tmp_path / "exchanged.safetensors")
    other = tiny_cache(weights=tmp_path / "exchanged.safetensors")
    by_number = compare(CompareConfig(a=tiny_cache(), b=other, sample=8))
    matched = compare(CompareConfig(a=tiny_cache(), b=other, sample=8, match_heads=True))
    assert matched.heads_b == ((1, 0), (1, 0))
    assert matched.mean["total_variation"] < 1e-4 < by_number.mean["total_variation"]


def test_teachers_of_other_depth_and_heads_are_compared_by_place_and_likeness(tiny_cache, tmp_path):
    other = tiny_cache(**tiny_teacher(tmp_path, depth=3, num_heads=4))
    with pytest.raises(CacheMismatchError, match=r"layers have 2 heads in A and 4 in B.*--match-heads"):
        compare(CompareConfig(a=tiny_cache(), b=other))
    summary = compare(CompareConfig(a=tiny_cache(), b=other, sample=4, match_heads=True))
    assert (summary.layers, summary.layers_b) == ((0, 1), (0, 2))
    assert any("2 layers and B's has 3" in note and "0 with 0, 1 with 2" in note for note in summary.notes)
    ours, theirs = maps_of(tiny_cache(), 1)[0], maps_of(other, 2)[0]
    chosen = [(2 * number + 1) * 48 // 8 for number in range(4)]
    js_AB = [[stats.js_divergence(ours[chosen, a], theirs[chosen, b]).mean() for b in range(4)] for a in range(2)]
    assert summary.heads_b[1] == tuple(np.argmin(js_AB, axis=1).tolist())
    np.testing.assert_allclose(summary.js_nats[1], np.min(js_AB, axis=1), rtol=1e-6)


def test_two_models_are_compared_by_number_with_a_note(tiny_cache, tmp_path):
    other = tiny_cache(**tiny_teacher(tmp_path, seed=1, mlp_ratio=2))
    summary = compare(CompareConfig(a=tiny_cache(), b=other, sample=2))
    assert summary.mean["total_variation"] > 0.01
    assert any("trained apart have nothing to do with each other by number" in note for note in summary.notes)


def test_rows_that_both_caches_have_are_compared(tiny_cache):
    rows = tiny_cache(codec="logmap", queries="cls")
    summary = compare(CompareConfig(a=tiny_cache(), b=rows, sample=3))
    assert summary.num_queries == 1
    assert "only 1 rows" in summary.notes[0]
    assert 0 < summary.mean["kl_nats"] < 0.1


def test_layers_and_heads_that_both_store(tiny_cache):
    part = tiny_cache(layers="1", heads="1")
    summary = compare(CompareConfig(a=tiny_cache(), b=part, sample=2))
    assert (summary.layers, summary.heads, summary.mean["total_variation"]) == ((1,), (1,), pytest.approx(0, abs=1e-6))
    assert [note[: note.index(" of A are left out")] for note in summary.notes] == ["note: layers 0", "note: heads 0"]
    with pytest.raises(CacheMismatchError, match=r"layers 0 of A stand for layers 0 of B, none of which is stored"):
        compare(CompareConfig(a=tiny_cache(), b=part, layers="0"))
    with pytest.raises(CacheMismatchError, match=r"heads 0 of A are not stored in .*has heads 1\..*--match-heads"):
        compare(CompareConfig(a=tiny_cache(), b=part, heads="0"))


# Caches that cannot be compared


def test_other_tokens_are_refused_with_both_layouts(tiny_cache, tmp_path):
    other = tiny_cache(**tiny_teacher(tmp_path, patch_size=4))
    with pytest.raises(CacheMismatchError, match=r"1 prefix tokens and 4 x 4 patches, and .* of 1 .*2 x 2 patches"):
        compare(CompareConfig(a=tiny_cache(), b=other))


def test_views_drawn_in_another_way_are_refused_by_name(tiny_cache):
    with pytest.raises(
        CacheMismatchError, match=r"view 0 of sample 'digits-0000.tar/.*of the parameters, crop_.*in A and"
    ):
        compare(CompareConfig(a=tiny_cache(), b=tiny_cache(seed=1)))
    with pytest.raises(CacheMismatchError, match="is not the same in both caches"):
        compare(CompareConfig(a=tiny_cache(), b=tiny_cache(**MIXED)))


def test_caches_without_a_common_sample_are_refused_with_examples(tiny_cache, digits_tars):
    caches = [tiny_cache(data=str(tar)) for tar in digits_tars[:2]]
    with pytest.raises(CacheMismatchError, match=r"no samples in common: 'digits-0000.tar/.*' and 'digits-0001.tar/"):
        compare(CompareConfig(a=caches[0], b=caches[1]))


def other_pixels(path, tmp_path, *, nbytes: int = 0):
    """A copy of a cache that recorded other pixels, as another version of an image library would make."""
    copy = shutil.copytree(path, tmp_path / f"other-{nbytes}.zarr")
    group = zarr.open_group(copy, mode="r+", use_consolidated=False)
    group["views/pixel_hash"][...] = group["views/pixel_hash"][...] + np.uint64(1)
    group["samples/nbytes"][...] = group["samples/nbytes"][...] + nbytes
    return copy


def test_pixels_of_another_library_are_compared_with_a_note(tiny_cache, tmp_path):
    summary = compare(CompareConfig(a=tiny_cache(), b=other_pixels(tiny_cache(), tmp_path), sample=4))
    assert "4 of 4 views have the same parameters but not quite the same pixels" in summary.notes[0]
    assert "name the same versions of image libraries, so the images may have been changed" in summary.notes[0]


def test_another_image_of_the_same_name_is_refused(tiny_cache, tmp_path):
    with pytest.raises(CacheMismatchError, match=r"is another image file in B: it has .* bytes in A and .* in B"):
        compare(CompareConfig(a=tiny_cache(), b=other_pixels(tiny_cache(), tmp_path, nbytes=1)))


# The command


def test_the_command_writes_what_it_prints(tiny_cache, tmp_path):
    arguments = ["compare", tiny_cache(), tiny_cache(codec="int8"), "--sample", 4, "--match-heads"]
    outputs = [word for name in ("c.csv", "c.png", "c.json") for word in ("--out", tmp_path / name)]
    done = CliRunner().invoke(cli, [*map(str, (*arguments, *outputs, "--per-view", tmp_path / "views.csv"))])
    assert done.exit_code == 0, done.stderr
    found = json.loads(done.stdout)
    assert json.loads((tmp_path / "c.json").read_text()) == found
    with (tmp_path / "c.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["layer"], row["layer_b"], row["head"], row["head_b"]) for row in rows[:2]] == [
        ("0", "0", "0", "0"),
        ("0", "0", "1", "1"),
    ]
    assert float(rows[3]["kl_nats"]) == found["kl_nats"][1][1]
    assert len((tmp_path / "views.csv").read_text().splitlines()) == 1 + 4 * 4
    assert (tmp_path / "c.png").read_bytes().startswith(b"\x89PNG")
    lines = done.stderr.splitlines()
    start = lines.index("head of B")
    assert lines[start + 1 : start + 3] == ["layer  head 0  head 1", "    0       0       1"]
    assert "views with the largest KL, mean over layers and heads, nats" in lines


def test_how_many_keys_count_as_the_largest_can_be_said(tiny_cache):
    a, b = tiny_cache(), tiny_cache(codec="int8")
    done = CliRunner().invoke(cli, ["compare", str(a), str(b), "--sample", "48", "--largest", "3"])
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert found["largest"] == 3
    expected_H = stats.largest_overlap(maps_of(a, 1), maps_of(b, 1), 3).mean(axis=(0, 1, 3))
    np.testing.assert_allclose(found["largest_overlap"][1], expected_H, rtol=1e-6)
