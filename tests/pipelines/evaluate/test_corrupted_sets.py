"""Scores under corruptions: made on the fly or read from a cache, the same images, and their mean in the report."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from disks import largest_file
from evaluating import config_of

from atcache.cli.main import cli
from atcache.errors import ConfigError
from atcache.pipelines.evaluate.run import evaluate

NOISE = ["gaussian_noise:4", "shot_noise:4", "impulse_noise:4"]


@pytest.fixture(scope="module")
def noisy(tiny_cache) -> Path:
    return tiny_cache(policy="eval", codec="exact:dtype=float32", corrupt="shot_noise:4")


@pytest.fixture(scope="module")
def data(digits_tars) -> str:
    return str(digits_tars[0].parent)


def test_a_set_made_of_tars_or_a_cache_is_the_set_that_a_build_stores(runs, val_cache, noisy, data):
    folder = runs["distill"][0]
    stored = evaluate(config_of(folder, cache=noisy)).sets[0]
    of_tars = evaluate(config_of(folder, data=data, corrupt=("noise:4",))).sets
    of_cache = evaluate(config_of(folder, cache=val_cache, corrupt=("shot_noise:4", "noise:4"), workers=2)).sets
    assert [each.name for each in of_tars] == ["val", *NOISE]
    assert [each.name for each in of_cache] == ["val", "shot_noise:4", "gaussian_noise:4", "impulse_noise:4"]
    by_name = [{each.name: each.runs for each in sets} for sets in (of_tars, of_cache)]
    assert by_name[0] == by_name[1]
    assert by_name[0]["shot_noise:4"] == stored.runs != by_name[0]["val"]
    assert [each.corrupt for each in of_tars] == [None, *NOISE]
    assert stored.corrupt == "shot_noise:4"


def test_a_copying_run_takes_a_cache_of_the_corruption_or_the_live_teacher(runs, val_cache, noisy, tiny_weights):
    folder = runs["copy"][0]
    with pytest.raises(
        ConfigError, match=r"maps of the corrupted images\. .*--corrupt shot_noise:4, and give it as --val-ca"
    ):
        evaluate(config_of(folder, cache=val_cache, corrupt=("shot_noise:4",)))
    with pytest.raises(ConfigError, match="eval --corrupt fog:1"):  # although a cache has one of the two
        evaluate(config_of(folder, cache=val_cache, val_cache=(f"s={noisy}",), corrupt=("shot_noise:4", "fog:1")))
    cached = evaluate(config_of(folder, cache=val_cache, val_cache=(f"shot={noisy}",), corrupt=("shot_noise:4",))).sets
    assert [(each.name, each.corrupt) for each in cached] == [("val", None), ("shot", "shot_noise:4")]
    live = evaluate(
        config_of(folder, cache=val_cache, corrupt=("shot_noise:4",), live_teacher=True, weights=tiny_weights)
    ).sets
    assert live[1].runs[0].loss == pytest.approx(cached[1].runs[0].loss, rel=1e-4)


def test_a_corrupted_cache_of_other_images_stands_for_no_set_of_these(runs, val_cache, tiny_cache, digits_tars):
    kept = {"policy": "eval", "codec": "exact:dtype=float32"}
    others = tiny_cache(data=str(digits_tars[0]), corrupt="shot_noise:4", **kept)
    place = {"val_cache": (f"others={others}",), "corrupt": ("shot_noise:4",)}
    sets = evaluate(config_of(runs["distill"][0], cache=val_cache, **place)).sets
    found = [(each.name, each.corrupt, each.runs[0].num_samples) for each in sets]
    assert found == [("val", None, 48), ("others", None, 16), ("shot_noise:4", "shot_noise:4", 48)]
    with pytest.raises(
        ConfigError, match=r"under shot_noise:4, but the set others, .* has other images or other class"
    ):
        evaluate(config_of(runs["copy"][0], cache=val_cache, **place))
    clean = tiny_cache(data=str(digits_tars[1]), **kept)
    with pytest.raises(ConfigError, match=r"not corrupted alike \(.*: shot_noise:4, .*: clean\)\. Give each"):
        evaluate(config_of(runs["distill"][0], cache=(others, clean)))


def test_the_report_has_the_mean_over_corruptions_relative_to_clean(runs, val_cache, noisy, tmp_path):
    names, report = ("distill", "scratch"), tmp_path / "corrupted.md"
    words = ["eval", *(str(runs[name][0]) for name in names), "--cache", str(val_cache), "--report", str(report)]
    words += ["--corrupt", "fog:2", "--corrupt", "fog:5", "--corrupt", "contrast:3", "--val-cache", f"shot={noisy}"]
    done = CliRunner().invoke(cli, [*words, "--device", "cpu", "--precision", "fp32"])
    assert done.exit_code == 0, done.output
    sets = {each["name"]: each for each in json.loads(done.stdout)["sets"]}
    top1s = {name: [run["top1"] for run in each["runs"]] for name, each in sets.items()}
    assert "corrupt" not in sets["val"]
    assert sets["shot"]["corrupt"] == "shot_noise:4"
    _, _, text = report.read_text().partition("## Corruptions")
    rows = {cells[1].strip(): [cell.strip() for cell in cells[2:4]] + cells[4:-1] for cells in map(split, table(text))}
    assert list(rows) == ["corruption", "---", "shot_noise", "fog", "contrast", "mean of 3"]
    assert rows["fog"][0] == "2, 5"
    expected = {
        "fog": np.mean([top1s["fog:2"], top1s["fog:5"]], axis=0),
        "shot_noise": np.array(top1s["shot"]),
        "contrast": np.array(top1s["contrast:3"]),
    }
    expected["mean of 3"] = np.mean(list(expected.values()), axis=0)
    for name, mean_R in expected.items():
        assert rows[name][1] == f"{mean_R[0]:.2f} ({100 * mean_R[0] / top1s['val'][0]:.1f})"
    assert f"mean of 3 corruptions: distill {expected['mean of 3'][0]:.2f} %, scratch" in done.stderr
    assert "robustness" not in report.read_text(), "all further sets are corrupted"


def test_one_corruption_has_no_mean_of_corruptions(runs, val_cache, tmp_path):
    report = tmp_path / "fog.md"
    words = ["eval", str(runs["scratch"][0]), "--cache", str(val_cache), "--report", str(report), "--corrupt", "fog"]
    done = CliRunner().invoke(cli, [*words, "--device", "cpu", "--precision", "fp32"])
    assert done.exit_code == 0, done.output
    top1s = [each["runs"][0]["top1"] for each in json.loads(done.stdout)["sets"][1:]]
    assert f"fog (severity 1, 2, 3, 4, 5): scratch {np.mean(top1s):.2f} %" in done.stderr
    assert "mean of" not in report.read_text()
    assert "The last row" not in report.read_text()


def test_a_report_that_the_disk_has_no_room_for_costs_no_scores(runs, val_cache, tmp_path):
    words = ["eval", str(runs["scratch"][0]), "--cache", str(val_cache), "--report", str(tmp_path / "report.md")]
    with largest_file(nbytes=200):
        done = CliRunner().invoke(cli, [*words, "--device", "cpu", "--precision", "fp32"])
    assert done.exit_code == 1, done.output
    assert json.loads(done.stdout)["sets"][0]["runs"][0]["num_samples"] == 48
    assert "report.md" in done.stderr
    assert not (tmp_path / "report.md").exists()


def table(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith("|")][:6]


def split(line: str) -> list[str]:
    return line.split("|")


def test_what_cannot_be_corrupted_is_refused(runs, tiny_cache, noisy, data):
    folder = runs["distill"][0]
    with pytest.raises(ConfigError, match="there is no 'smog'"):
        config_of(folder, data=data, corrupt=("smog",))
    with pytest.raises(
        ConfigError, match=r"corrupt=fog: the images of --data or --cache are corrupted\. Give one of them"
    ):
        config_of(folder, val_data=(f"other={data}",), corrupt=("fog",))
    with pytest.raises(ConfigError, match=r"the views of .* are corrupted by shot_noise:4 already"):
        evaluate(config_of(folder, cache=noisy, corrupt=("fog:1",)))
    with pytest.raises(ConfigError, match=r"are of policy crop-flip: only those of policy eval are corrupted"):
        evaluate(config_of(folder, cache=tiny_cache(codec="exact:dtype=float32"), corrupt=("fog:1",)))
