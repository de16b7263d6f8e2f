"""Caches of corrupted views: the teacher sees the corrupted images, and whoever reads the cache sees the same ones."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from builds import differences, run_cli
from click.testing import CliRunner

import atcache
from atcache.attention.capture import FactorCapture
from atcache.cache.record import CacheRecord
from atcache.cli.main import cli
from atcache.errors import CacheMismatchError, ConfigError
from atcache.feed.sample_views import CachedViews, FreshViews
from atcache.images.source import Source, index_source
from atcache.pipelines import api
from atcache.pipelines.build.run import build
from atcache.teachers.run import TeacherRun

SNOW = {"policy": "eval", "corrupt": "snow:3"}
ON_CPU = {"device": "cpu", "precision": "fp32"}


@pytest.fixture(scope="module")
def snowy(tiny_cache):
    return atcache.open(tiny_cache(**SNOW, seed=4))


@pytest.fixture(scope="module")
def clean(tiny_cache):
    return atcache.open(tiny_cache(policy="eval", seed=4))


def test_the_images_are_the_clean_ones_corrupted(snowy, clean):
    for sample in range(48):
        key = snowy.reader.samples.sample_key(sample)
        expected = atcache.corrupt(clean.image(sample), "snow:3", seed=4, sample_key=key)
        assert np.array_equal(snowy.image(sample), expected)
        assert not np.array_equal(expected, clean.image(sample))


def test_the_maps_are_those_of_the_corrupted_images(snowy, clean, tiny_vit, tiny_weights):
    run = TeacherRun.load(tiny_vit, tiny_weights, device="cpu", precision="fp32")
    capture = FactorCapture(run.teacher.model, *run.select(None, None))
    pixels_BHWC = torch.from_numpy(np.stack([snowy.image(sample) for sample in range(5)]))
    factors = run.factors(capture, pixels_BHWC)[1]
    logits_BHQK = factors.scale * factors.q_BHTD @ factors.k_BHTD.transpose(-1, -2)
    expected = torch.softmax(logits_BHQK, dim=-1).numpy()
    found = snowy.maps(layer=1)[0, :5].compute()
    assert np.allclose(found, expected, atol=2e-3)
    assert not np.allclose(clean.maps(layer=1)[0, :5].compute(), expected, atol=2e-2)


def test_views_that_are_drawn_anew_are_those_of_the_cache(snowy, digits_tars):
    source = Source(index_source(str(digits_tars[0].parent)))
    fresh = FreshViews(source, snowy.record.identity.input.view_policy("eval", 4, corrupt="snow:3"))
    cached = CachedViews(snowy.reader, source, code_layers=None)
    for sample in (47, 0, 20):
        assert np.array_equal(fresh.read(sample, 0).pixels_HWC, cached.read(sample, 0).pixels_HWC)


def test_the_record_says_it_and_a_clean_cache_is_another(snowy, clean):
    policies = [cache.attributes["views"]["policy"] for cache in (snowy, clean)]
    assert policies[0] == {**policies[1], "spec": 4, "corrupt": "snow:3"}
    assert CacheRecord.of(snowy.reader).policy.corrupt == "snow:3"
    assert snowy.reader.layout.parameter_names[-1] == "corrupt_seed"
    told = CliRunner().invoke(cli, ["info", str(snowy.path)], catch_exceptions=False).stdout
    assert "eval corrupted by snow:3, seed 4, 8 x 8 pixels" in told
    assert "(eval, snow:3)" in snowy._repr_html_()
    assert "corrupted" not in CliRunner().invoke(cli, ["info", str(clean.path)], catch_exceptions=False).stdout


def test_verify_makes_every_image_again(snowy):
    assert api.verify(cache=str(snowy.path), all=True).problems == ()


def test_processes_and_batches_change_nothing(snowy, digits_build):
    config = replace(digits_build, codec="exact", seed=4, samples_per_shard=20, **SNOW)
    build(replace(config, workers=2, batch_size=7))
    # Commit records and metadata hold times.
    assert [name for name in differences(config.out, snowy.path) if not name.endswith(".json")] == []


@pytest.mark.parametrize("other", ["snow:4", None])
def test_another_corruption_is_not_continued(snowy, digits_build, other):
    config = replace(digits_build, codec="exact", seed=4, samples_per_shard=20, **{**SNOW, "corrupt": other})
    with pytest.raises(CacheMismatchError, match=rf"views.policy.corrupt is 'snow:3' there and {other!r} here"):
        build(replace(config, out=snowy.path))


def test_another_cache_takes_these_views_as_they_are(snowy, digits_build):
    config = replace(digits_build, codec="int8", views_from=snowy.path)
    build(config)
    cache = atcache.open(config.out)
    assert cache.policy.corrupt == "snow:3"
    assert np.array_equal(cache.image(9), snowy.image(9))
    with pytest.raises(ConfigError, match=r"views_from=.* and corrupt=fog:3: .* Leave out --corrupt"):
        replace(config, corrupt="fog:3")


def test_stored_pixels_are_corrupted_too(tiny_cache, snowy):
    cache = atcache.open(tiny_cache(**SNOW, seed=4, pixels="store"))
    assert np.array_equal(cache.image(30), snowy.image(30))


def test_a_copying_student_is_scored_on_the_corrupted_images(snowy, clean, tmp_path):
    out = str(tmp_path / "run")
    common = {"workers": 0, **ON_CPU}
    api.train(mode="copy", cache=str(clean.path), out=out, steps=30, batch_size=16, **common)
    scores = [api.evaluate(runs=out, cache=str(cache.path), **ON_CPU).score for cache in (clean, snowy)]
    assert scores[1].loss > scores[0].loss
    validated = api.train(
        mode="copy",
        cache=str(clean.path),
        out=str(tmp_path / "again"),
        steps=30,
        batch_size=16,
        val_cache=str(snowy.path),
        **common,
    )
    assert validated.validation == scores[1]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"corrupt": "smog:3", "policy": "eval"}, "corruption 'smog:3': there is no 'smog'"),
        (
            {"corrupt": "fog", "policy": "eval"},
            "corruption 'fog' stands for 5 corruptions, expected one, such as fog:1",
        ),
        ({"corrupt": "fog:9", "policy": "eval"}, "the severity is '9', expected 1 to 5"),
        ({"corrupt": "fog:3"}, "corrupt=fog:3 and policy=crop-flip: only views of policy eval are corrupted"),
    ],
)
def test_what_cannot_be_built_is_refused_before_the_teacher_is_loaded(digits_build, fields, message):
    with pytest.raises(ConfigError, match=message):
        replace(digits_build, **fields)
    result = run_cli(digits_build, **fields)
    assert result.exit_code != 0
    assert message in result.output.replace("\n", " ")
