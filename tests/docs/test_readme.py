"""The README's commands and its Python run as printed, on small data in place of ImageNet."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from atcache.cli.main import cli
from atcache.pipelines.demo.run import write_digits

README = (Path(__file__).parent.parent.parent / "README.md").read_text(encoding="utf-8")
# What stands for what: ImageNet and the MAE ViT-L cannot be had in a test.
STAND_INS = {
    "train-{000000..001281}.tar": "digits/train-{000000..000000}.tar",
    "val-{00..49}.tar": "digits/val-{000000..000000}.tar",
    "mae-vit-l": "demo-mae",
}


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.DOTALL | re.MULTILINE)


def run(command):
    words = [STAND_INS.get(word, word) for word in shlex.split(command)]
    assert words[0] == "atcache"
    result = CliRunner().invoke(cli, words[1:], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("readme")
    write_digits(path / "digits")
    return path


@pytest.fixture
def _in_folder(folder, monkeypatch):
    monkeypatch.chdir(folder)
    # The README's recipe is for ImageNet; the file of defaults is the place to make it short.
    Path("atcache.toml").write_text("[build]\nworkers = 0\n[train]\nsteps = 4\nbatch-size = 16\nsubset = 64\n")


@pytest.mark.usefixtures("_in_folder")
def test_the_real_thing_runs_as_printed():
    (commands,) = (block for block in blocks("sh") if "atcache build" in block)
    ran = [run(line) for line in commands.splitlines() if line.startswith("atcache")]
    score = json.loads(ran[-1].stdout.splitlines()[-1])["sets"][0]["runs"][0]
    assert score["num_samples"] == 500
    assert Path("runs/copy/model.safetensors").exists()
    assert "complete" in run("atcache info in1k.zarr").stdout


@pytest.mark.usefixtures("_in_folder")
def test_the_python_runs_as_printed():
    (code,) = blocks("python")
    names: dict[str, object] = {}
    exec(code.replace("layer=5", "layer=3"), names)
    assert names["maps"].shape == (1000, 4, 16, 16)
    np.testing.assert_allclose(names["maps"][:2].sum(-1).compute(), 1, rtol=1e-5)
    assert names["entropy_bits"].shape == (4,)
    assert (names["entropy_bits"] > 0).all()
    assert (names["entropy_bits"] < 4).all()  # log2 of 16 keys
    assert names["view"].maps_LHQK.shape == (4, 4, 16, 16)


@pytest.mark.usefixtures("_in_folder")
def test_short_commands_work_with_the_printed_file_of_defaults():
    (defaults,) = blocks("toml")
    for printed, stand_in in STAND_INS.items():
        defaults = defaults.replace(printed, stand_in)
    # The printed tables, with this test's short recipe added to them and folders of its own.
    defaults = defaults.replace("[build]", "[build]\nworkers = 0").replace("in1k.zarr", "short.zarr")
    defaults = defaults.replace("[train]", "[train]\nsteps = 4\nbatch-size = 16").replace("runs/copy", "runs/short")
    Path("atcache.toml").write_text(defaults)
    run("atcache build --teacher mae-vit-l")
    run("atcache train --mode copy")
    assert Path("runs/short/model.safetensors").exists()
