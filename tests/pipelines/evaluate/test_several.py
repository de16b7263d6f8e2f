"""Several runs and several sets: averages, pairs, calibration, some of the classes, and the report."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace
from functools import partial
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from evaluating import config_of, plain_logits, score_by_hand, softmax
from processes import in_two_processes

from atcache.cli.main import cli
from atcache.errors import ConfigError
from atcache.images.class_names import ClassNames
from atcache.pipelines.evaluate.report import report_text
from atcache.pipelines.evaluate.run import evaluate
from atcache.pipelines.running.ranks import Ranks
from atcache.pipelines.running.run_record import load_run
from atcache.pipelines.train.kept_classes import read_kept_classes
from atcache.pipelines.train.scores import score_students
from atcache.pipelines.train.validation import open_validation
from atcache.store.reader import CacheReader

AVERAGES = ("mean of probabilities", "mean of logits")
KEPT = (1, 3, 4, 7, 8, 9)


@pytest.fixture(scope="module")
def folders(runs) -> tuple[Path, ...]:
    return tuple(runs[name][0] for name in ("distill", "scratch"))


def agrees(score, probability_SC, label_S) -> None:
    top1, top5, loss, ece = score_by_hand(probability_SC, label_S)
    assert (score.top1, score.top5, score.num_samples) == pytest.approx((top1, top5, len(label_S)))
    assert (score.loss, score.ece) == pytest.approx((loss, ece), rel=1e-4)
    assert score.top1_error == pytest.approx(math.sqrt(top1 * (100 - top1) / len(label_S)))


def test_each_run_and_their_averages_score_what_numpy_says(folders, val_cache):
    (found,) = evaluate(config_of(*folders, cache=val_cache, batch_size=7)).sets
    (a_SC, label_S), (b_SC, _) = (plain_logits(folder, val_cache) for folder in folders)
    agrees(found.runs[0], softmax(a_SC), label_S)
    agrees(found.runs[1], softmax(b_SC), label_S)
    agrees(found.mean_probabilities, (softmax(a_SC) + softmax(b_SC)) / 2, label_S)
    agrees(found.mean_logits, softmax((a_SC + b_SC) / 2), label_S)
    first_S, second_S = a_SC.argmax(1), b_SC.argmax(1)
    (pair,) = found.pairs
    assert pair.runs == (0, 1)
    assert pair.agreement == pytest.approx(100 * (first_S == second_S).mean())
    both_S, any_S = (first_S != label_S) & (second_S != label_S), (first_S != label_S) | (second_S != label_S)
    assert any_S.any()
    assert pair.shared_errors == pytest.approx(100 * both_S.sum() / any_S.sum())


def test_one_run_has_no_averages_and_twice_the_same_agrees_with_itself(folders, val_cache):
    (alone,) = evaluate(config_of(folders[0], cache=val_cache)).sets
    assert (alone.mean_probabilities, alone.mean_logits, alone.pairs) == (None, None, ())
    (twice,) = evaluate(config_of(folders[0], folders[0], cache=val_cache)).sets
    assert twice.mean_probabilities.top1 == twice.mean_logits.top1 == alone.runs[0].top1
    assert (twice.pairs[0].agreement, twice.pairs[0].shared_errors) == (100, 100)


def test_three_runs_have_three_pairs(folders, runs, val_cache):
    (found,) = evaluate(config_of(*folders, runs["copy"][0], cache=val_cache)).sets
    assert [pair.runs for pair in found.pairs] == list(combinations(range(3), 2))


def test_the_shares_of_two_ranks_add_up_to_the_whole(folders, val_cache, tmp_path):
    device = torch.device("cpu")
    students = [load_run(folder, device)[0] for folder in folders]
    readers = (CacheReader(val_cache),)
    data = open_validation(
        readers=readers,
        data=None,
        students=students,
        teacher=None,
        live_teacher=None,
        batch_size=8,
        workers=0,
        device=device,
    )
    whole = score_students(students, data, device, torch.float32)
    assert in_two_processes(partial(_score_and_keep, students, data, tmp_path)) == [0, 0]
    kept = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    assert kept[0] == kept[1]
    assert kept[0] == [pytest.approx(numbers, rel=1e-5) for numbers in _numbers_of(whole)]


def _score_and_keep(students, data, folder):
    """Score as one of several ranks, and keep what this rank returns."""
    ranks, device = Ranks.from_environment(), torch.device("cpu")
    with ranks.connected(device):
        found = score_students(students, data, device, torch.float32, ranks)
    (folder / f"{ranks.rank}.json").write_text(json.dumps(_numbers_of(found)))


def _numbers_of(found) -> list[list[float]]:
    """All numbers of all scores and pairs."""
    scores = [*found.runs, found.mean_probabilities, found.mean_logits]
    numbers = [[each.top1, each.top1_error, each.top5, each.loss, each.ece, each.num_samples] for each in scores]
    return [*numbers, *([pair.agreement, pair.shared_errors] for pair in found.pairs)]


def test_only_some_classes(folders, val_cache, tmp_path):
    kept = tmp_path / "classes"
    kept.write_text("# of ten\n\n" + "\n".join(map(str, KEPT)) + "\n")
    (found,) = evaluate(config_of(*folders, cache=val_cache, classes_of=(str(kept),))).sets
    (a_SC, label_S), (b_SC, _) = (plain_logits(folder, val_cache) for folder in folders)
    used_S, dropped = np.isin(label_S, KEPT), [label for label in range(10) if label not in KEPT]
    for logits_SC in (a_SC, b_SC):
        logits_SC[:, dropped] = -np.inf
    agrees(found.runs[0], softmax(a_SC)[used_S], label_S[used_S])
    agrees(found.mean_logits, softmax((a_SC + b_SC) / 2)[used_S], label_S[used_S])
    assert found.num_left_out == (~used_S).sum() > 0


def test_sets_by_name(folders, runs, val_cache, digits_tars, tmp_path):
    kept = tmp_path / "classes"
    kept.write_text("\n".join(map(str, KEPT)))
    config = config_of(
        *folders,
        cache=val_cache,
        val_data=(f"first={digits_tars[0]}", f"both={digits_tars[0]}", f"both={digits_tars[1]}"),
        val_cache=(f"again={val_cache}",),
        classes_of=(f"first={kept}",),
    )
    summary = evaluate(config)
    sets = {each.name: each for each in summary.sets}
    assert list(sets) == ["val", "again", "first", "both"]
    assert sets["again"].runs == sets["val"].runs
    assert summary.score == sets["val"].mean_probabilities
    assert [each.runs[0].num_samples for each in summary.sets if each.name != "first"] == [48, 48, 32]
    assert sets["first"].runs[0].num_samples + sets["first"].num_left_out == 16
    alone = evaluate(config_of(*folders, data=(str(digits_tars[0]), str(digits_tars[1])))).sets[0]
    assert alone.runs == sets["both"].runs
    assert "\nfirst: restricted to other classes than val, which changes" in report_text(config, summary)


def test_caches_of_one_set_whose_tars_have_moved_score_as_a_live_teacher_does(
    runs, val_cache, tiny_cache, tiny_weights, digits_tars, tmp_path
):
    (before := tmp_path / "before").mkdir()
    tars = [shutil.copy(tar, before) for tar in digits_tars[:2]]
    caches = [tiny_cache(policy="eval", codec="exact:dtype=float32", data=str(tar)) for tar in tars]
    after = before.rename(tmp_path / "after")
    folders = [runs[name][0] for name in ("copy", "distill", "copy-1")]
    moved = {"val_cache": tuple(f"moved={cache}" for cache in caches), "val_data": (f"moved={after}",)}
    stored = evaluate(config_of(*folders, cache=val_cache, workers=2, **moved)).sets
    named = {"val_data": (f"moved={after}",), "live_teacher": True, "weights": tiny_weights}
    live = evaluate(config_of(*folders, data=str(digits_tars[0].parent), **named)).sets
    for ours, theirs in zip(stored, live, strict=True):
        assert ours.name == theirs.name
        for score, other in zip(ours.runs, theirs.runs, strict=True):
            assert (score.top1, score.num_samples) == (other.top1, other.num_samples)
            assert score.loss == pytest.approx(other.loss, rel=1e-4)
    assert [each.score.num_samples for each in stored] == [48, 32]


def test_the_report_has_every_set_and_prediction(folders, val_cache, digits_tars, tmp_path):
    report = tmp_path / "shift.md"
    words = ["eval", *map(str, folders), "--cache", str(val_cache), "--val-data", f"one={digits_tars[0]}"]
    done = CliRunner().invoke(cli, [*words, "--report", str(report), "--by-class", "--device", "cpu"])
    assert done.exit_code == 0, done.output
    sets = json.loads(done.stdout)["sets"]
    text = report.read_text()
    for number, name in enumerate(("val", "one")):
        shown = rows_under(text, "Classes", name)
        assert shown[0] == ["label", "class", "samples", *(folder.name for folder in folders), *AVERAGES]
        scores = [*sets[number]["runs"], sets[number]["mean_probabilities"], sets[number]["mean_logits"]]
        of_label = [
            [str(each[0]["label"]), "", str(each[0]["num_samples"]), *(f"{one['top1']:.2f}" for one in each)]
            for each in zip(*(score["classes"] for score in scores), strict=True)
        ]
        assert sorted(shown[1:]) == sorted(of_label)
        assert [float(row[5]) for row in shown[1:]] == sorted(float(row[5]) for row in shown[1:])
    assert f"`atcache eval {folders[0]} {folders[1]} --cache {val_cache}" in text
    names = [*(folder.name for folder in folders), *AVERAGES]
    accuracy, robust, everything = (
        rows_under(text, title) for title in ("Accuracy and calibration", "Relative robustness", "All scores")
    )
    # The fixture names each folder by its mode, so no mode stands beside a name.
    assert accuracy[0] == ["set", "samples", *names]
    predictions = [[*each["runs"], each["mean_probabilities"], each["mean_logits"]] for each in sets]
    top1s = [[f"{score['top1']:.2f} ± {score['top1_error']:.2f}" for score in scores] for scores in predictions]
    for number, (each, scores) in enumerate(zip(sets, predictions, strict=True)):
        cells = [f"{top1} ({score['ece']:.2f})" for top1, score in zip(top1s[number], scores, strict=True)]
        assert accuracy[1 + number] == [each["name"], str(scores[0]["num_samples"]), *cells]
        for name, top1, score in zip(names, top1s[number], scores, strict=True):
            others = [f"{score['top5']:.2f}", f"{score['loss']:.4g}", f"{score['ece']:.2f}"]
            assert [each["name"], name, top1, *others] in everything
            assert name in done.stderr
    assert robust[1] == ["one", *map(ratio_by_hand, predictions[1], predictions[0])]
    (pair,) = (row for row in rows_under(text, "Pairs of runs") if row[0] == "one")
    assert pair[1:3] == [f"{names[0]} and {names[1]}", f"{sets[1]['pairs'][0]['agreement']:.1f}"]


def rows_under(text: str, title: str, set_name: str | None = None) -> list[list[str]]:
    """The cells of the table under a heading, and of a set if it is named, without the line below its head."""
    part = text.partition(f"\n## {title}\n")[2].partition("\n## ")[0]
    if set_name is not None:
        part = part.partition(f"\n### {set_name}\n")[2].partition("\n### ")[0]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in part.splitlines() if line[:1] == "|"]
    return [row for row in rows if row[0] != "---"]


def ratio_by_hand(score, base) -> str:
    """A ratio of two shares; its relative variance is the sum of both relative variances."""
    ratio = score["top1"] / base["top1"]
    relative = (score["top1_error"] / score["top1"]) ** 2 + (base["top1_error"] / base["top1"]) ** 2
    return f"{100 * ratio:.1f} ± {100 * ratio * math.sqrt(relative):.1f}"


def test_names_in_brackets_are_shown_as_they_are(folders, val_cache, tmp_path):
    copied = tmp_path / "[red]"
    shutil.copytree(folders[0], copied)
    words = ["eval", str(copied), str(folders[1]), "--cache", str(val_cache), "--by-class", "--device", "cpu"]
    done = CliRunner().invoke(cli, words)
    assert done.exit_code == 0, done.output
    assert done.stderr.count("[red]") == 3  # the scores, the pair, the classes


def test_runs_of_one_name_are_told_apart_and_their_modes_said(folders, val_cache):
    config = config_of(*folders, cache=val_cache)
    summary = replace(evaluate(config), runs=("a/last", "b/last"))
    text = report_text(config, summary)
    assert rows_under(text, "Accuracy and calibration")[0][2:4] == ["a/last (distill)", "b/last (scratch)"]
    assert "Relative robustness" not in text  # there is one set only


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"val_data": ("tars",)}, r"val_data='tars': expected NAME=TARS, .* For the main set, give --data tars\."),
        ({"val_cache": ("x.zarr",)}, r"expected NAME=CACHE, .* For the main set, give --cache x\.zarr\."),
        ({"val_data": ("im v2=x.tar",)}, r"val_data='im v2=x\.tar': .* A name has letters, digits, dots, - and _ only"),
        ({"val_cache": ("=x.zarr",)}, r"val_cache='=x\.zarr': expected NAME=CACHE, such as sketch=sketch\.zarr"),
        (
            {"classes_of": ("sketch=list",)},
            r"classes_of='sketch=list': no set is named 'sketch'\. The sets are val\. .*write \./sketch=list",
        ),
        ({"classes_of": ("a", "b")}, r"classes_of='b': a file is given for all sets already"),
        ({"classes_of": ("https://example.org/list",)}, "expected a file on this machine"),
    ],
)
def test_options_that_name_no_set_are_refused(fields, message):
    with pytest.raises(ConfigError, match=message):
        config_of(Path("run"), cache=Path("x.zarr"), **fields)


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (
            "1\n12",
            r"list, line 2: there is no class '12'\. Expected a number below 10; the classes of these runs",
        ),
        ("1\n\n1", r"list, line 3: class '1' stands in line 1 already"),
        ("cat", "there is no class 'cat'"),
        ("9" * 5000, "there is no class .99999"),
        ("# none", "list names no class"),
    ],
)
def test_lists_of_classes_that_do_not_fit_are_refused(lines, message, folders, val_cache, tmp_path):
    (tmp_path / "list").write_text(lines)
    with pytest.raises(ConfigError, match=message):
        evaluate(config_of(folders[0], cache=val_cache, classes_of=(str(tmp_path / "list"),)))


def test_a_list_of_classes_from_any_editor_and_of_names_that_two_classes_have(tmp_path):
    classes = ClassNames(("crane", "a\x85b", "crane", "7"), "the run")
    file = tmp_path / "list"
    file.write_bytes("\ufeffa\x85b\r\n7\r\n0".encode())
    assert read_kept_classes(file, classes, 10).tolist() == [0, 1, 3]
    file.write_text("7\ncrane")
    with pytest.raises(ConfigError, match=r"list, line 2: 'crane' is the name of the classes 0, 2\. Write the numbers"):
        read_kept_classes(file, classes, 10)


def test_a_report_that_cannot_be_written_and_a_set_without_maps_are_refused_at_once(
    folders, runs, val_cache, digits_tars, tmp_path
):
    with pytest.raises(ConfigError, match=r"report='.*': there is no folder .*missing\. Make it first"):
        evaluate(config_of(folders[0], cache=val_cache, report=tmp_path / "missing" / "shift.md"))
    with pytest.raises(ConfigError, match="list cannot be read"):
        evaluate(config_of(folders[0], cache=val_cache, classes_of=(str(tmp_path / "list"),)))
    with pytest.raises(
        ConfigError, match=r"set sketch: a copying student needs the teacher's maps .* `atcache build --policy"
    ):
        evaluate(config_of(runs["copy"][0], cache=val_cache, val_data=(f"sketch={digits_tars[0]}",)))
