"""Recipes are the papers' numbers, and stand between the command line and atcache.toml."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from atcache.cli.defaults import read_defaults
from atcache.cli.main import cli
from atcache.errors import ConfigError
from atcache.pipelines.build.config import BuildConfig
from atcache.pipelines.train.config import TrainConfig
from atcache.pipelines.train.data import open_training_data
from atcache.pipelines.train.recipes import TABLES, read_recipe, recipe_names, recipe_path
from atcache.store.reader import CacheReader

# The numbers of the papers, once more: a typing mistake in a file has to be made twice to pass.
PAPERS = {
    "copy-vit-l": {"mode": "copy", "epochs": 100, "base_lr": 1e-3, "layer_decay": 0.75, "weight_decay": 0.05,
                   "beta2": 0.999, "drop_path": 0.0, "ema": 0.9999, "warmup_epochs": 5, "batch_size": 2048},
    "distill-vit-l": {"mode": "distill", "epochs": 200, "base_lr": 1e-4, "layer_decay": 1.0, "weight_decay": 0.3,
                      "beta2": 0.95, "drop_path": 0.2, "ema": 0.9999, "warmup_epochs": 20, "attention_weight": 3.0,
                      "min_lr": 1e-6, "batch_size": 2048},
    "finetune-vit-l": {"mode": "finetune", "epochs": 50, "base_lr": 1e-3, "layer_decay": 0.75, "weight_decay": 0.05,
                       "beta2": 0.999, "drop_path": 0.2, "warmup_epochs": 5, "batch_size": 1024, "min_lr": 1e-6},
    "scratch-vit-l": {"mode": "scratch", "epochs": 200, "base_lr": 1e-4, "weight_decay": 0.3, "beta2": 0.95,
                      "drop_path": 0.2, "ema": 0.9999, "warmup_epochs": 20, "batch_size": 4096},
}  # fmt: skip


def run(*arguments):
    return CliRunner().invoke(cli, [*map(str, arguments), "--device", "cpu", "--precision", "fp32"])


def settings_of(folder: Path):
    return json.loads((folder / "run.json").read_text())["settings"]


@pytest.mark.parametrize("name", PAPERS)
def test_the_recipes_of_the_package_are_the_papers(name):
    recipe = read_recipe(name)
    assert {key: recipe["train"][key] for key in PAPERS[name]} == PAPERS[name]
    assert recipe["train"]["label_smoothing"] == 0.1
    assert recipe["build"] == {"policy": "randaug", "mixup": 0.8, "cutmix": 1.0}
    # Both tables make configs, and every key is an option.
    config = TrainConfig(**recipe["train"], out=Path("run"), cache=Path("c.zarr"))
    assert config.ema == PAPERS[name].get("ema")
    BuildConfig(**recipe["build"], teacher="mae-vit-l", data="tars", out=Path("c.zarr"))
    for table in TABLES:
        command = cli.get_command(None, table)
        assert read_defaults(recipe_path(name), table, command, all_commands=TABLES) == recipe[table]


def test_there_are_no_other_recipes():
    assert set(recipe_names()) == set(PAPERS)


def test_options_win_over_the_recipe_and_the_recipe_over_the_defaults_file(tiny_cache, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("atcache.toml").write_text("[train]\nweight-decay = 0.01\nkeep-mib = 1\nbatch-size = 12\nsteps = 2\n")
    recipe = ["train", "--recipe", "copy-vit-l", "--cache", tiny_cache(), "--out", "run"]
    done = run(*recipe, "--batch-size", "24", "--drop-path", "0.1")
    assert done.exit_code == 0, done.output
    settings = settings_of(Path("run"))
    chosen = {name: settings[name] for name in ("mode", "weight_decay", "layer_decay", "batch_size", "drop_path")}
    expected = {"mode": "copy", "weight_decay": 0.05, "layer_decay": 0.75, "batch_size": 24, "drop_path": 0.1}
    assert chosen == expected
    assert settings["steps"] == 2
    # Its name is not part of the run: a file of the same settings goes on with it.
    Path("mine.toml").write_text(recipe_path("copy-vit-l").read_text())
    recipe[2] = "mine.toml"
    again = run(*recipe, "--batch-size", "24", "--drop-path", "0.1")
    assert again.stdout == done.stdout


def test_the_defaults_file_can_name_the_recipe(tiny_cache, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("atcache.toml").write_text('[train]\nrecipe = "distill-vit-l"\n')
    done = run("train", "--cache", tiny_cache(), "--out", "run", "--steps", "1", "--batch-size", "24")
    assert done.exit_code == 0, done.output
    assert (settings_of(Path("run"))["mode"], settings_of(Path("run"))["beta2"]) == ("distill", 0.95)


def test_a_build_draws_the_recipes_views_and_training_on_others_says_so(
    tiny_cache, tiny_vit, tiny_weights, digits_tars, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    tars = digits_tars[0].parent
    building = ["build", "--recipe", "copy-vit-l", "--teacher", tiny_vit, "--weights", tiny_weights, "--data", tars]
    done = run(*building, "--out", "theirs.zarr", "--cutmix", "0.5", "--workers", "0")
    assert done.exit_code == 0, done.output
    policy = CacheReader(Path("theirs.zarr")).attributes["views"]["policy"]
    mixing = policy["mixing"]
    assert (policy["name"], mixing["mixup_alpha"], mixing["cutmix_alpha"]) == ("randaug", 0.8, 0.5)

    def notes(cache, recipe="copy-vit-l"):
        common = {"mode": "copy", "out": Path("run"), "batch_size": 24, "epochs": 5}
        config = TrainConfig(**common, cache=cache, recipe=recipe)
        return open_training_data([config], torch.device("cpu"))[0].notes

    (note,) = notes(tiny_cache())
    expected = (
        r"are not those of recipe copy-vit-l: policy is 'crop-flip', not 'randaug'; mixup is 0.0, not 0.8; cutmix is"
    )
    assert expected in note
    (note,) = notes(Path("theirs.zarr"))
    assert "are not those of recipe copy-vit-l: cutmix is 0.5, not 1.0. A cache's views are fixed;" in note
    Path("mine.toml").write_text('[train]\nmode = "copy"\n[build]\nmixup = 0.8\n')
    assert notes(Path("theirs.zarr"), "mine.toml") == ()


def test_a_run_without_a_cache_draws_the_recipes_views_itself(digits_tars, tiny_vit, tmp_path):
    plain = ["train", "--recipe", "scratch-vit-l", "--data", digits_tars[0].parent, "--student", tiny_vit]
    common = ["--steps", "1", "--batch-size", "24"]
    assert run(*plain, *common, "--out", tmp_path / "a").exit_code == 0
    assert run(*plain, *common, "--out", tmp_path / "b", "--policy", "crop-flip", "--mixup", "0").exit_code == 0
    drawn = [json.loads((tmp_path / name / "run.json").read_text())["data"]["views"]["policy"] for name in "ab"]
    assert [policy["name"] for policy in drawn] == ["randaug", "crop-flip"]
    assert [policy["mixing"]["mixup_alpha"] for policy in drawn] == [0.8, 0.0]
    assert [policy["mixing"]["cutmix_alpha"] for policy in drawn] == [1.0, 1.0]


def test_a_recipes_own_train_table_wins_over_its_build_table(digits_tars, tiny_vit, tmp_path):
    recipe = tmp_path / "mine.toml"
    recipe.write_text(
        '[train]\nmode = "scratch"\nmixup = 0.3\n[build]\npolicy = "randaug"\nmixup = 0.8\nmix-prob = 0.5\n'
    )
    plain = ["train", "--recipe", recipe, "--data", digits_tars[0].parent, "--student", tiny_vit]
    done = run(*plain, "--steps", "1", "--batch-size", "24", "--out", tmp_path / "run")
    assert done.exit_code == 0, done.output
    drawn = json.loads((tmp_path / "run" / "run.json").read_text())["data"]["views"]["policy"]
    assert (drawn["name"], drawn["mixing"]["mixup_alpha"], drawn["mixing"]["prob"]) == ("randaug", 0.3, 0.5)


def test_a_sweep_of_a_recipe_may_say_itself_what_to_train_on(tiny_cache, digits_tars, tiny_vit, tmp_path):
    def drawn(name, **student):
        values = "\n".join(f"{key} = {json.dumps(str(value))}" for key, value in student.items())
        (tmp_path / "sweep.toml").write_text(f'[[student]]\nname = "{name}"\nmode = "scratch"\n{values}\n')
        common = ["--recipe", "scratch-vit-l", "--sweep", tmp_path / "sweep.toml", "--out", tmp_path]
        done = run("train", *common, "--steps", "1", "--batch-size", "24")
        assert done.exit_code == 0, done.output
        return json.loads((tmp_path / name / "run.json").read_text())["data"]["views"]["policy"]["name"]

    assert drawn("cached", cache=tiny_cache()) == "crop-flip"
    tars = {"data": digits_tars[0].parent, "student": tiny_vit}
    assert drawn("fresh", **tars) == "randaug"
    assert drawn("own", **tars, policy="crop-flip") == "crop-flip"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[train]\nepoch = 3", r"mine.toml: [train] epoch is not an option of 'atcache train'; did you mean epochs?"),
        ("[train]\nepochs = true", "mine.toml: [train] epochs = True, but --epochs takes a number."),
        ('[build]\nmixup = "much"', "mine.toml: [build] mixup = 'much', but --mixup takes a number."),
        ("[build]\nmixin = 0.8", "mine.toml: [build] mixin is not an option of 'atcache build'; did you mean mix"),
        ("[eval]\nbatch-size = 3", "mine.toml: 'eval' is not a command of atcache; expected one of build, train."),
        ("epochs = 3", "mine.toml: 'epochs' is not a command"),
        ("[train", "mine.toml is not valid TOML"),
    ],
)
def test_a_recipe_that_cannot_be_used_is_one_sentence(text, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("mine.toml").write_text(text)
    done = run("train", "--recipe", "mine.toml", "--cache", "c.zarr", "--out", "run")
    assert done.exit_code == 1
    (line,) = done.stderr.splitlines()
    assert message in line


def test_a_recipe_that_does_not_exist_is_refused_with_those_that_do():
    with pytest.raises(
        ConfigError, match=r"recipe 'copy-vit-b': there is no such file, .* copy-vit-l, distill-vit-l, "
    ):
        read_recipe("copy-vit-b")


def test_a_file_with_other_tables_is_no_recipe(tmp_path):
    (tmp_path / "mine.toml").write_text("epochs = 3")
    with pytest.raises(
        ConfigError, match=r"'epochs' is not a table of a recipe\. Expected only \[train\] and \[build\]"
    ):
        read_recipe(str(tmp_path / "mine.toml"))
