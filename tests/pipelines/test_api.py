"""The functions of the public API do what their commands do."""

from __future__ import annotations

import json

import pytest
from click.testing import CliRunner

from atcache.cli.main import cli
from atcache.errors import ConfigError
from atcache.pipelines import api


def test_a_chain_of_calls_gives_what_the_commands_give(digits_tars, tiny_vit, tiny_weights, tmp_path):
    data, cache = str(digits_tars[0].parent), str(tmp_path / "c.zarr")
    common = {"workers": 0, "device": "cpu", "precision": "fp32"}
    built = api.build(teacher=tiny_vit, weights=str(tiny_weights), data=data, out=cache, codec="exact", **common)
    assert built.complete["num_stored"] == 48
    assert api.verify(cache=cache).problems == ()
    run = tmp_path / "run"
    trained = api.train(mode="copy", cache=cache, out=str(run), steps=4, batch_size=16, val_cache=cache, **common)
    score = api.evaluate(runs=str(run), cache=cache, device="cpu", precision="fp32").score
    assert score == trained.validation
    words = ["eval", str(run), "--cache", cache, "--device", "cpu", "--precision", "fp32"]
    printed = CliRunner().invoke(cli, words, catch_exceptions=False)
    assert json.loads(printed.stdout)["sets"][0]["runs"][0]["loss"] == score.loss


def test_a_recipe_gives_what_is_not_passed(tiny_cache, tmp_path):
    (tmp_path / "own.toml").write_text('[train]\nmode = "copy"\nsteps = 3\nbatch-size = 16\nbase-lr = 0.01\n')
    common = {"cache": tiny_cache(), "device": "cpu", "precision": "fp32"}
    api.train(recipe=str(tmp_path / "own.toml"), out=tmp_path / "run", base_lr=0.02, **common)
    settings = json.loads((tmp_path / "run" / "run.json").read_text())["settings"]
    assert (settings["mode"], settings["steps"], settings["base_lr"]) == ("copy", 3, 0.02)
    (tmp_path / "wrong.toml").write_text("[train]\nstep = 3\n")
    with pytest.raises(ConfigError, match=r"\[train\] step is not an option of `atcache train`"):
        api.train(recipe=str(tmp_path / "wrong.toml"), mode="copy", out=tmp_path / "other", **common)
    with pytest.raises(ConfigError, match=r"no table \[build\]"):
        api.build(recipe=str(tmp_path / "own.toml"), teacher="demo-mae", data="a.tar", out=tmp_path / "c.zarr")


def test_a_sweep_is_the_students_of_single_calls(tiny_cache, tmp_path):
    common = {"mode": "copy", "cache": tiny_cache(), "steps": 4, "batch_size": 16, "device": "cpu", "precision": "fp32"}
    results = api.train_sweep({"a": {}, "b": {"base_lr": 0.02}}, out=tmp_path / "runs", **common)
    alone = api.train(out=tmp_path / "alone", base_lr=0.02, **common)
    assert [result.name for result in results] == ["a", "b"]
    assert results[1].summary.label_loss == alone.label_loss != results[0].summary.label_loss
    with pytest.raises(ConfigError, match="student c: base_rl is not an option of `atcache train`"):
        api.train_sweep({"c": {"base_rl": 0.02}}, out=tmp_path / "wrong", **common)


def test_a_call_without_what_is_needed_is_pythons_own_error():
    with pytest.raises(TypeError, match=r"missing .* required keyword-only argument.*'out'"):
        api.pack(data="images")
