"""`atcache train` takes every field of the config and prints the summary."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

from click.testing import CliRunner

from atcache.cli.main import cli
from atcache.pipelines.train.config import TrainConfig


def test_every_field_of_the_config_is_an_option_of_the_command():
    options = {parameter.name for parameter in cli.get_command(None, "train").params}
    assert options == {field.name for field in dataclasses.fields(TrainConfig)} | {"sweep"}


def test_epochs_and_steps_are_not_typed_together(tiny_cache, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arguments = ["train", "--mode", "copy", "--cache", str(tiny_cache()), "--out", "run", "--batch-size", "24"]
    refused = CliRunner().invoke(cli, [*arguments, "--epochs", "3", "--steps", "4"])
    assert refused.exit_code == 2
    assert "--epochs and --steps both say how long to train. Leave one out." in refused.stderr
    Path("atcache.toml").write_text("[train]\nepochs = 3\n")
    done = CliRunner().invoke(cli, [*arguments, "--steps", "1", "--device", "cpu", "--precision", "fp32"])
    assert done.exit_code == 0, done.output


def test_the_command_prints_the_summary(tiny_cache, tmp_path):
    arguments = ["train", "--mode", "copy", "--cache", str(tiny_cache()), "--out", str(tmp_path / "run")]
    arguments += ["--val-cache", str(tiny_cache(policy="eval")), "--steps", "4", "--batch-size", "24"]
    done = CliRunner().invoke(cli, [*arguments, "--device", "cpu", "--precision", "fp32"])
    assert done.exit_code == 0, done.output
    summary = json.loads(done.stdout)
    assert (summary["mode"], summary["steps"], summary["validation"]["num_samples"]) == ("copy", 4, 48)
    refused = CliRunner().invoke(cli, [*arguments, "--device", "cpu", "--precision", "fp32", "--seed", "1"])
    assert refused.exit_code == 1
    assert "--seed is 0 there and 1 here" in refused.stderr
