"""The demo: its commands are what it ran, its numbers what the runs say, its students what the paper says."""

from __future__ import annotations

import json

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from atcache.cli.main import cli
from atcache.errors import ConfigError
from atcache.pipelines.demo.config import DemoConfig
from atcache.pipelines.demo.run import PRETRAIN, demo
from atcache.pipelines.pretrain.config import PretrainConfig

# The demo takes a minute or two; on a machine that does much else, five.
pytestmark = pytest.mark.timeout(900)


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """The demo itself, as typed: about a minute."""
    folder = tmp_path_factory.mktemp("demo")
    result = CliRunner().invoke(
        cli, ["demo", "--out", str(folder / "out"), "--json", str(folder / "d.json")], catch_exceptions=False
    )
    assert result.exit_code == 0, result.output
    return folder, result


def test_the_demo_prints_its_table_and_every_command(ran):
    folder, result = ran
    commands = (folder / "out" / "commands.sh").read_text().splitlines()
    assert [line[2:] for line in result.stderr.splitlines() if line.startswith("$ ")] == commands
    for mode in ("scratch", "finetune", "copy", "distill"):
        assert mode in result.stdout


def test_attention_closes_a_good_part_of_the_gap(ran):
    modes = json.loads((ran[0] / "d.json").read_text())["modes"]
    scratch, finetune = modes["scratch"]["top1"], modes["finetune"]["top1"]
    assert finetune > scratch + 10
    # 0.6 on the mean of three seeds is what `atcache demo --seeds 3` must reach; one seed scatters.
    assert modes["copy"]["gap_closed"] > 0.45
    assert modes["distill"]["top1"] > scratch + 5


def test_the_numbers_are_those_of_the_runs(ran):
    folder = ran[0]
    summary = json.loads((folder / "d.json").read_text())
    result = CliRunner().invoke(
        cli, ["eval", str(folder / "out/runs/copy-0"), "--cache", str(folder / "out/val.zarr")], catch_exceptions=False
    )
    assert json.loads(result.stdout)["score"]["top1"] == summary["modes"]["copy"]["top1"]
    files = [path for path in (folder / "out/train.zarr").glob("**/c/**/*") if path.is_file()]
    of_tasks = sum(path.stat().st_size for path in files if not {"samples", "state"} & set(path.parts))
    assert summary["cache_nbytes_per_view"] * 1297 == pytest.approx(of_tasks)


def test_the_picture_shows_images_and_maps(ran):
    pixels = np.asarray(Image.open(ran[0] / "out/maps.png").convert("RGB"))
    assert min(pixels.shape[:2]) > 300
    # An inferno map over a grey digit has colours; an empty or grey picture has not.
    assert (pixels.max(axis=2).astype(int) - pixels.min(axis=2) > 60).mean() > 0.05


def test_a_folder_of_somebody_else_is_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(ConfigError, match=r"exists and was not made by `atcache demo`. Give another --out"):
        demo(DemoConfig(out=tmp_path))
    assert (tmp_path / "thesis.tex").exists()


def test_pretraining_config_of_the_shipped_teacher_is_complete():
    assert isinstance(PRETRAIN, PretrainConfig)
    assert PRETRAIN.model == "demo-mae"
