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


def stand_in(text, *changes):
    """A text with each (printed, what stands for it, how often it is printed) replaced."""
    for printed, other, count in changes:
        assert text.count(printed) == count, f"{printed!r} is printed {text.count(printed)} times"
        text = text.replace(printed, other)
    return text


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("readme")
    write_digits(path / "digits")
    return path


@pytest.fixture(scope="module")
def ran(folder):
    """What the printed commands printed, one after another in the folder."""
    (commands,) = (block for block in blocks("sh") if "atcache build" in block)
    for printed in STAND_INS:
        assert printed in shlex.split(commands)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        # The README's recipe is for ImageNet; the file of defaults is the place to make it short.
        Path("atcache.toml").write_text("[build]\nworkers = 0\n[train]\nsteps = 4\nbatch-size = 16\nsubset = 64\n")
        return [run(line) for line in commands.splitlines() if line.startswith("atcache")]


@pytest.fixture
def _in_folder(folder, ran, monkeypatch):
    monkeypatch.chdir(folder)


@pytest.mark.usefixtures("_in_folder")
def test_the_real_thing_runs_as_printed(ran):
    score = json.loads(ran[-1].stdout.splitlines()[-1])["sets"][0]["runs"][0]
    assert score["num_samples"] == 500
    assert Path("runs/copy/model.safetensors").exists()
    assert "complete" in run("atcache info in1k.zarr").stdout


@pytest.mark.usefixtures("_in_folder")
def test_the_python_runs_as_printed():
    (code,) = blocks("python")
    names: dict[str, object] = {}
    exec(stand_in(code, ("layer=5", "layer=3", 1)), names)
    assert names["maps"].shape == (1000, 4, 16, 16)
    np.testing.assert_allclose(names["maps"][:2].sum(-1).compute(), 1, rtol=1e-5)
    assert names["entropy_bits"].shape == (4,)
    assert (names["entropy_bits"] > 0).all()
    assert (names["entropy_bits"] < 4).all()  # log2 of 16 keys
    assert names["view"].maps_LHQK.shape == (4, 4, 16, 16)


def test_short_commands_work_with_the_printed_file_of_defaults(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "digits").symlink_to(folder / "digits")
    (defaults,) = blocks("toml")
    # The printed tables, with this test's short recipe added to them.
    changes = [("[build]", "[build]\nworkers = 0", 1), ("[train]", "[train]\nsteps = 4\nbatch-size = 16", 1)]
    tars = "train-{000000..001281}.tar"
    Path("atcache.toml").write_text(stand_in(defaults, (tars, STAND_INS[tars], 1), *changes))
    run("atcache build --teacher mae-vit-l")
    # What is typed wins.
    run("atcache build --teacher mae-vit-l --data val-{00..49}.tar --out in1k-val.zarr --policy eval --views 1")
    run("atcache train --mode copy")
    assert Path("runs/copy/model.safetensors").exists()
