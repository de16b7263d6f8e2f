"""The commands of docs/start.md, from a folder of images to a trained student, run as printed."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image
from sklearn.datasets import load_digits

from atcache.cli.main import cli

START = (Path(__file__).parent.parent.parent / "docs" / "start.md").read_text(encoding="utf-8")


def write_photos(folder: Path, samples: range) -> None:
    """Digits as one folder a class, in place of the reader's photos."""
    digits = load_digits()
    for sample in samples:
        file = folder / f"class-{digits.target[sample]}" / f"{sample}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray((digits.images[sample] * 15).astype(np.uint8)).save(file)


def test_the_way_from_photos_to_a_student_runs_as_printed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    write_photos(tmp_path / "photos" / "train", range(100))
    write_photos(tmp_path / "photos" / "val", range(100, 150))
    Path("atcache.toml").write_text("[build]\nworkers = 0\n[train]\nsteps = 2\nbatch-size = 16\n")
    blocks = re.findall(r"^```sh\n(.*?)^```", START, re.DOTALL | re.MULTILINE)
    commands = [line for block in blocks for line in block.splitlines() if line.startswith("atcache")]
    commands = [command for command in commands if "demo" not in command]  # the demo has tests of its own
    names_of_commands = " ".join(shlex.split(command)[1] for command in commands)
    assert names_of_commands == "pack pack build build train eval train train"
    scores: list[int] = []
    for command in commands:
        words = ["demo-mae" if word == "mae-vit-b" else word for word in shlex.split(command)]
        result = CliRunner().invoke(cli, words[1:], catch_exceptions=False)
        assert result.exit_code == 0, result.output
        if words[1] == "eval":
            scores.append(json.loads(result.stdout.splitlines()[-1])["sets"][0]["runs"][0]["num_samples"])
    assert scores == [50]
    run_files = {path.name for path in Path("runs/copy").iterdir()}
    named = re.findall(r"^\| `([a-z.]+)` \|", START, re.MULTILINE)
    assert len(named) == 5
    assert set(named) <= run_files
    (code,) = re.findall(r"^```python\n(.*?)^```", START, re.DOTALL | re.MULTILINE)
    names: dict[str, object] = {}
    exec(code.replace("atcache-demo/train.zarr", "train.zarr"), names)
    assert names["view"].maps_LHQK.shape == (4, 4, 16, 16)
