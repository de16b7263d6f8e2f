"""`~` is the home folder in every path, wherever it comes from: no folder called `~` is ever made."""

from __future__ import annotations

import json
from pathlib import Path

import click
import pytest
from click.testing import CliRunner
from PIL import Image

import atcache
from atcache.cli.main import COMMANDS, cli
from atcache.cli.paths import LocationType, PathType
from atcache.errors import ConfigError
from atcache.files.location import parse_location
from atcache.images.tars import expand_tars
from atcache.pipelines.evaluate.config import EvaluateConfig
from atcache.pipelines.pack.config import PackConfig
from atcache.pipelines.train.recipes import recipe_path


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home folder with an image folder, and another folder to work in."""
    for name in ("home/images/a", "work"):
        (tmp_path / name).mkdir(parents=True)
    Image.new("RGB", (4, 4)).save(tmp_path / "home/images/a/0.png")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path / "home"


def path_types() -> list[tuple[str, str, click.ParamType]]:
    """All parameters of all commands that take a path: command, name and type."""
    commands = {name: command.load() for name, command in COMMANDS.items()} | {"atcache": cli}
    found = [(name, parameter.name or "", parameter.type) for name in commands for parameter in commands[name].params]
    return [each for each in found if isinstance(each[2], (click.Path, click.File, LocationType))]


def test_every_path_of_every_command_expands_the_home_folder(home: Path):
    (home / "x").touch()
    names = {name for _, name, _ in path_types()}
    assert {"out", "weights", "cache", "config", "sweep", "report", "json_file", "codec_from"} <= names
    for command, name, kind in path_types():
        assert isinstance(kind, PathType | LocationType), (command, name)
        for given in ("~/x", Path("~/x")):
            assert kind.convert(given, None, None) == home / "x", (command, name)


def test_the_shell_and_the_file_of_defaults_mean_the_home_folder(home: Path):
    Path("atcache.toml").write_text('[pack]\ndata = "~/images"\nout = "~/by file"\n')
    for arguments, out in ([], "by file"), (["--out=~/by shell"], "by shell"):
        done = CliRunner().invoke(cli, ["pack", *arguments], catch_exceptions=False)
        assert json.loads(done.stdout)["tars"] == [str(home / out / "images-000000.tar")]
    assert sorted(path.name for path in Path().iterdir()) == ["atcache.toml"]


def test_functions_mean_the_home_folder(home: Path):
    for out in "~/by text", Path("~/by path"):
        atcache.pack(data="~/images", out=out)
    assert sorted(path.name for path in home.iterdir()) == ["by path", "by text", "images"]
    assert list(Path().iterdir()) == []
    assert EvaluateConfig(runs=("~/a", Path("~/b")), cache="~/c").runs == (home / "a", home / "b")
    with pytest.raises(atcache.CacheMissError, match=str(home / "none.zarr")):
        atcache.open("~/none.zarr")


def test_tars_and_recipes_are_found_in_the_home_folder(home: Path):
    atcache.pack(data="~/images", out="~/tars")
    (home / "own.toml").write_text("[train]\n")
    for pattern in "~/tars", "~/tars/*.tar", "~/tars/images-{000000..000000}.tar", Path("~/tars"), ["~/tars"]:
        assert expand_tars(pattern) == (home / "tars/images-000000.tar",)
    assert recipe_path("~/own.toml") == home / "own.toml"


def test_a_user_that_does_not_exist_is_named():
    for make in (lambda: parse_location("~nobody-here/x"), lambda: PackConfig(data="~nobody-here/x", out="out")):
        with pytest.raises(ConfigError, match=r"'~nobody-here/x' begins with ~, but there is no user 'nobody-here'"):
            make()
    done = CliRunner().invoke(cli, ["pack", "--data", "x", "--out", "~nobody-here/x"])
    assert done.exit_code == 2
    assert "there is no user 'nobody-here'" in done.output
