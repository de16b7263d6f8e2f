"""The study of the paper's table, on digits and a toy teacher: whole, killed and continued, cut short; its numbers."""

from __future__ import annotations

import json
import math
import re
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
MAPS = "transform-target_kl-0.005-2"
COMMON = ["--labels", "40", "--val-samples", "50", "--held-out", "30", "--views", "2", "--view-counts", "1", "2"]
COMMON += ["--epochs", "4", "--batch-size", "20", "--device", "cpu", "--precision", "fp32"]
COMMON += ["--codecs", "exact", "transform:target_kl=0.005", "transform:target_kl=0.5"]

KILLED = """
import os, signal, sys, threading, time
from pathlib import Path

def kill_this_process_when_two_students_are_finished(out):
    while len(list(out.glob("runs/*/*/summary.json"))) < 2:
        time.sleep(0.0005)
    os.kill(os.getpid(), signal.SIGKILL)

out = Path(sys.argv[1 + sys.argv.index("--out")])
threading.Thread(target=kill_this_process_when_two_students_are_finished, args=(out,), daemon=True).start()
import paper
paper.main()
"""


@pytest.fixture(autouse=True, scope="module")
def benchmarks():
    """The benchmarks' folder importable, as it is when one is run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        yield


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """The options that name a toy teacher, and tars of digits."""
    from atcache.pipelines.demo.run import write_digits

    train, val = write_digits(tmp_path_factory.mktemp("digits"))
    return ["--teacher", "demo-mae", "--data", str(train), "--val-data", str(val), *COMMON]


@pytest.fixture(scope="module")
def study(digits, tmp_path_factory):
    """The folder of a whole study, which was killed once, and the files that the killed process had finished."""
    from paper import main

    out = tmp_path_factory.mktemp("study")
    options = ["--out", str(out), *digits, "--minutes", "10", "--seeds", "2", "--shift", f"again={digits[5]}"]
    options += ["--corrupt", "fog:5", "--tune", "--base-lr", "0.02", "0.06", "--init-values", "0.1"]
    options += ["--finetune-lr", "0.05"]
    killed = subprocess.run(
        [sys.executable, "-c", KILLED, *options],
        env={"PYTHONPATH": str(BENCHMARKS), "OMP_NUM_THREADS": "1", "PATH": ""},
        capture_output=True,
        check=False,
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()
    finished = {path: path.stat().st_mtime_ns for path in _results(out)}
    main(options)
    return out, finished


def _results(out):
    """The weights of finished runs; a run's summary is the last that it writes."""
    return [path.with_name("model.safetensors") for path in out.rglob("summary.json") if "timing" not in path.parts]


def test_a_killed_study_continues_and_has_every_row(study, capsys):
    out, finished = study
    assert 4 + 2 <= len(finished) < len(_results(out))  # four were trained to tune
    assert {path: path.stat().st_mtime_ns for path in finished} == finished
    report = json.loads((out / "paper.json").read_text())
    assert (report["missing"], report["left_out"]) == ([], [])
    text = (out / "paper.md").read_text()
    assert "not run" not in text
    from paper import main

    exact = out / "caches/exact-train-2.zarr"
    exact.rename(out / "deleted")  # by somebody who needs its room
    main(["--out", str(out), "--report"])
    (out / "deleted").rename(exact)
    assert re.search(r"exact \([\d,]+ bytes a view\)", text)
    assert capsys.readouterr().out.strip() == text.strip() == (out / "paper.md").read_text().strip()
    lines = [line for line in text.splitlines() if line.startswith("|")]
    assert len(lines) == 2 + len(report["rows"])
    steps = [row["row"]["step"] for row in report["rows"]]
    counts = {step: steps.count(step) for step in steps}
    expected = {"modes": 6, "ensemble": 2, "codecs": 3, "views": 2, "layers": 6, "heads": 2, "what": 3, "finetuned": 2}
    assert counts == {**expected, "shift": 8}
    assert list(counts) == list(dict.fromkeys(steps))
    assert (out / "paper.png").read_bytes().startswith(b"\x89PNG")


def test_every_number_is_what_a_command_wrote(study):
    out, _ = study
    rows = {
        (row["row"]["step"], row["row"]["label"]): row for row in json.loads((out / "paper.json").read_text())["rows"]
    }

    def read(pattern):
        return [json.loads((out / pattern.format(seed)).read_text()) for seed in range(2)]

    for mode in ("scratch", "copy", "distill", "finetune"):
        found = [summary["validation"]["top1"] for summary in read(f"runs/{MAPS}/{mode}-{{}}/summary.json")]
        row = rows["modes", mode]
        assert list(row["top1_by_seed"].values()) == found
        assert row["top1"] == pytest.approx(np.mean(found))
        of_images = np.mean([math.sqrt(top1 * (100 - top1) / 50) for top1 in found])
        assert row["standard_error"] == pytest.approx(max(of_images, abs(found[0] - found[1]) / 2))
        assert row["num_samples"] == 50
    assert rows["modes", "scratch"]["top1"] < rows["modes", "finetune"]["top1"]
    assert (rows["modes", "scratch"]["gap"], rows["modes", "finetune"]["gap"]) == (0, 1)
    one = rows["codecs", "exact"]  # of one seed
    assert one["standard_error"] == pytest.approx(math.sqrt(one["top1"] * (100 - one["top1"]) / 50))
    # The test images under another name give the same numbers, by a cache of their own.
    for mode in ("scratch", "copy", "distill", "finetune"):
        assert rows["shift", f"again: {mode}"]["top1_by_seed"] == rows["modes", mode]["top1_by_seed"]
        assert rows["shift", f"again: {mode}"]["gap"] == rows["modes", mode]["gap"]
        foggy = [evaluation["sets"][0]["runs"][0]["top1"] for evaluation in read(f"evaluations/fog-5-{mode}-{{}}.json")]
        assert list(rows["shift", f"fog:5: {mode}"]["top1_by_seed"].values()) == foggy
    kept = rows["shift", "fog:5: finetune"]["top1"] / rows["modes", "finetune"]["top1"]
    assert re.search(
        rf"fog:5: top-1 as a share of that on the usual.* finetune {kept:.0%}", (out / "paper.md").read_text()
    )


def test_live_students_are_scored_with_their_teacher_and_ensembles_together(study):
    from atcache.pipelines.evaluate.config import EvaluateConfig
    from atcache.pipelines.evaluate.run import evaluate

    out, _ = study
    rows = json.loads((out / "paper.json").read_text())["rows"]
    top1s = {
        (row["row"]["step"], row["row"]["label"]): row["top1_by_seed"]["1"]
        for row in rows
        if row["row"]["step"] in ("modes", "ensemble")
    }
    runs, cache = out / "runs" / MAPS, out / "caches" / f"{MAPS.removesuffix('-2')}-test.zarr"
    live = evaluate(EvaluateConfig(runs=(runs / "copy-live-1",), cache=cache, live_teacher=True, device="cpu"))
    assert top1s["modes", "copy, live teacher"] == live.score.top1
    both = evaluate(EvaluateConfig(runs=(runs / "distill-1", runs / "finetune-1"), cache=cache, device="cpu"))
    assert top1s["ensemble", "finetune + distill"] == both.score.top1


def test_recipes_are_the_best_on_images_that_no_student_gets(study):
    out, _ = study
    labelled, held_out = ((out / name).read_text().splitlines() for name in ("labels.txt", "held-out.txt"))
    assert (len(set(labelled)), len(set(held_out))) == (40, 30)
    assert not set(labelled) & set(held_out)
    report, text = json.loads((out / "paper.json").read_text()), (out / "paper.md").read_text()
    for mode in ("scratch", "copy"):
        scores = {}
        for base_lr in (0.02, 0.06):
            summary = json.loads((out / "tuning" / f"{mode}-lr-{base_lr:g}-init-0.1" / "summary.json").read_text())
            assert summary["validation"]["num_samples"] == 30
            scores[base_lr] = summary["validation"]["top1"]
        assert scores[report["recipes"][mode]["base_lr"]] == max(scores.values())
        tried = ", ".join(f"base-lr {lr:g}, LayerScale from 0.1: {top1:.1f}" for lr, top1 in scores.items())
        assert f"- {mode} was tuned on 30 held-out training images: {tried}." in text
        for seed in range(2):
            settings = json.loads((out / "runs" / MAPS / f"{mode}-{seed}" / "run.json").read_text())["settings"]
            assert settings["base_lr"] == report["recipes"][mode]["base_lr"]
            assert "init_values=0.1" in settings["student"]
    assert report["recipes"]["distill"] == report["recipes"]["copy"]
    assert report["recipes"]["finetune"] == {"base_lr": 0.05, "init_values": None}
    assert "- finetune was not tuned." in text


def test_too_few_minutes_leave_steps_out_and_say_so(digits, tmp_path, capsys):
    from paper import main

    options = ["--out", str(tmp_path / "short"), *digits]
    main([*options, "--minutes", "0.00001"])
    assert "Left out, because --minutes was too short" in capsys.readouterr().out
    assert [path.name for path in (tmp_path / "short" / "caches").iterdir()] == [
        f"{MAPS.removesuffix('-2')}-train-2.zarr"
    ]
    left_out = json.loads((tmp_path / "short" / "paper.json").read_text())["left_out"]
    assert [one["name"] for one in left_out] == [f"caches/{MAPS.removesuffix('-2')}-test.zarr"]
    # Each call does at least one command.
    main([*options, "--minutes", "0.00001"])
    text = capsys.readouterr().out
    assert text.count("| not run |") == 6 + 2 + 3 + 2 + 6 + 2 + 3 + 2
    left_out = json.loads((tmp_path / "short" / "paper.json").read_text())["left_out"]
    assert left_out[0]["name"] == f"runs/{MAPS}/scratch-0"
    assert left_out[0]["seconds"] is None  # nothing was trained yet
    assert f"{len(left_out)} commands, first runs/{MAPS}/scratch-0" in text
    before = sorted(tmp_path.rglob("*"))
    main(["--out", str(tmp_path / "short"), "--report"])
    assert sorted(tmp_path.rglob("*")) == before
    assert "| not run |" in capsys.readouterr().out


def test_all_students_get_views_of_the_policy_that_is_asked_for(digits, tmp_path, capsys):
    from paper import main

    import atcache

    options = ["--out", str(tmp_path), *digits, "--policy", "randaug", "--mixup", "0.8", "--cutmix", "1"]
    main([*options, "--minutes", "0.00001"])
    (cache,) = (tmp_path / "caches").iterdir()
    policy = atcache.open(cache).describe()["views"]["policy"]
    assert policy["name"] == "randaug"
    assert (policy["mixing"]["mixup_alpha"], policy["mixing"]["cutmix_alpha"]) == (0.8, 1)
    assert "2 views of each image (randaug, mixup 0.8, cutmix 1)" in capsys.readouterr().out
    with pytest.raises(SystemExit, match=r"holds another study: mixup is 0.8 there and 0.0 here"):
        main(["--out", str(tmp_path), *digits, "--policy", "randaug", "--cutmix", "1", "--minutes", "0.00001"])


def test_another_study_in_the_folder_is_refused(digits, tmp_path):
    from paper import main

    options = ["--out", str(tmp_path), *digits, "--minutes", "0.00001", "--shift", f"again={digits[5]}"]
    main(options)
    with pytest.raises(SystemExit, match=r"holds another study: base_lrs is \[0.002\] there and \[0.5\] here"):
        main([*options, "--base-lr", "0.5"])
    with pytest.raises(SystemExit, match="holds another study: shift is"):
        main([*options[:-1], f"again={digits[3]}"])
    with pytest.raises(SystemExit, match="nothing-there"):  # before anything is run
        main([*options[:-1], "other=nothing-there.tar"])
    with pytest.raises(SystemExit, match="nothing-there is not the folder of an earlier study"):
        main(["--report", "--out", str(tmp_path / "nothing-there")])


def test_a_study_that_could_not_begin_is_begun_with_other_options(digits, tmp_path, capsys):
    from paper import main

    options = ["--out", str(tmp_path), *digits, "--minutes", "0.00001"]
    with pytest.raises(
        SystemExit, match=r"1297 images have labels, but 5000 for students and 0 held-out ones are 5000"
    ):
        main([*options, "--labels", "5000"])
    main([*options, "--labels", "30", "--teacher", "no-such-teacher"])
    assert re.search(r"- Failed: caches/\S+: .*no-such-teacher", capsys.readouterr().out)
    main(options)
    assert len((tmp_path / "labels.txt").read_text().splitlines()) == 40
    with pytest.raises(SystemExit, match=r"holds another study: labels is 40 there and 30 here"):
        main([*options, "--labels", "30"])


def test_a_learning_rate_that_is_too_high_is_tried_once_and_not_taken(digits, tmp_path, capsys):
    from paper import Clock, Runner, _rows, main, parse
    from paper_steps import Maps, cache_jobs, jobs_of, tuning_folder
    from paper_study import keep_study
    from paper_tuning import choose_recipes, given_up, tuning_jobs
    from rich.console import Console

    options = ["--tune", "--base-lr", "0.02", "1e30", "--epochs", "2", "--minutes", "600"]
    study, limit_s = parse(["--out", str(tmp_path), *digits, *options])
    keep_study(study)
    clock = Clock(file=tmp_path / "times.json", limit_s=limit_s)
    runner = Runner(study=study, clock=clock, console=Console(stderr=True))
    assert runner.run(cache_jobs(study, Maps(study.views, study.codec)))
    assert [job.config.base_lr for job in tuning_jobs(study)[1:]] == [0.02, 1e30] * 2, "of scratch and of copy"
    runner.run(tuning_jobs(study))
    (in_vain,) = given_up(study, "scratch")
    assert in_vain.base_lr == 1e30
    tried = {path: path.stat().st_mtime_ns for path in tuning_folder(study, "scratch", in_vain).iterdir()}
    recipes = choose_recipes(study)
    assert recipes["scratch"].base_lr == 0.02

    capsys.readouterr()
    main(["--out", str(tmp_path), "--report"])
    assert re.search(
        r"scratch was tuned on 30 .*base-lr 0.02: [\d.]+\. The loss became NaN or infinite with base-lr 1e\+30\.",
        capsys.readouterr().out,
    )
    # What was given up is not trained again, and the rows are made with the other one.
    row = next(row for row in _rows(study) if {student.mode for student in row.students} == {"scratch"})
    assert runner.run(tuning_jobs(study))
    assert runner.run(list(jobs_of(study, row, 0, recipes)))
    assert {path: path.stat().st_mtime_ns for path in tried} == tried
    runs = [json.loads(path.read_text())["settings"] for path in tmp_path.glob("runs/*/scratch-*/run.json")]
    assert {run["base_lr"] for run in runs} == {0.02}


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ([], "--minutes is missing. Give it, or only --out and --report."),
        (["--report"], "give no other option"),
        (["--minutes", "1", "--base-lr", "1", "2"], "are for --tune, of scratch and copy alike"),
        (["--minutes", "1", "--tune", "copy", "--init-values", "1", "2"], "are for --tune, of scratch and copy alike"),
        (["--minutes", "1", "--tune", "--finetune-lr", "1", "2"], "--tune scratch copy finetune"),
        (["--minutes", "1", "--shift", "test=x"], "does not begin with train, test"),
        (["--minutes", "1", "--shift", "train-8=x"], "does not begin with train, test"),
        (["--minutes", "1", "--shift", "fog-3=x"], "or the name of a corruption"),
        (["--minutes", "1", "--shift", "noise=x"], "or the name of a corruption"),
        (["--minutes", "1", "--shift", "a:b=x"], "expected NAME=TARS"),
        (["--minutes", "1", "--shift", "a=x", "a=y"], "comes once"),
    ],
)
def test_options_that_do_not_fit_are_refused(options, sentence, capsys):
    from paper import parse

    with pytest.raises(SystemExit):
        parse(["--out", "o", "--teacher", "t", "--data", "d", "--val-data", "v", *options])
    assert sentence in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize("own", [38.0, 51.0, 76.0, 90.0])
def test_the_error_of_a_share_of_the_gap_is_that_of_a_simulation(own):
    from paper_results import gap_closed

    ends = [(own, 1.6), (38.0, 1.5), (76.0, 1.3)]
    share, error = gap_closed(*ends)
    assert share == pytest.approx((own - 38) / 38)
    rng = np.random.default_rng(0)
    own_N, scratch_N, finetune_N = (rng.normal(mean, deviation, 200_000) for mean, deviation in ends)
    assert error == pytest.approx(((own_N - scratch_N) / (finetune_N - scratch_N)).std(), rel=0.02)
    assert gap_closed((own, 1.0), (76.0, 1.0), (76.0, 1.0)) is None


def _accuracy(top1, error):
    from paper_results import Accuracy
    from paper_steps import Row

    return Accuracy(row=Row("codecs", "c", ()), top1_by_seed={0: top1}, top1=top1, standard_error=error, num_samples=1)


def test_seeds_that_are_alike_do_not_make_the_test_images_more():
    from paper_results import standard_error

    from atcache.pipelines.train.scores import Score

    def score(top1):
        error = math.sqrt(top1 * (100 - top1) / 400)
        return Score(top1=top1, top1_error=error, top5=100.0, loss=1.0, ece=1.0, num_samples=400)

    assert standard_error([[score(50.0)]]) == standard_error([[score(50.0)], [score(50.0)]]) == 2.5
    assert standard_error([[score(50.0)], [score(50.0)], [score(80.0)]]) == pytest.approx(10)
    # The same images, corrupted in two ways, are as uncertain as each.
    assert standard_error([[score(50.0), score(50.0)]]) == 2.5


def test_the_cheapest_codec_is_within_one_standard_error_of_the_first():
    from paper_results import cheapest_codec

    rows = [("exact", 900.0, _accuracy(50.0, 1.5)), ("fine", 90.0, _accuracy(48.6, 9.0))]
    rows += [("rough", 9.0, _accuracy(48.4, 9.0))]
    assert cheapest_codec(rows, "exact") == "fine"
    assert cheapest_codec([*rows, ("tiny", 1.0, _accuracy(55.0, 1.0))], "exact") == "tiny"
    assert cheapest_codec(rows[:1], "exact") is None
    assert cheapest_codec(rows[1:], "exact") is None


def test_cached_and_live_are_compared_seed_by_seed():
    from paper_results import difference

    cached = replace(_accuracy(42.0, 1.0), top1_by_seed={0: 40.0, 1: 44.0})
    live = replace(_accuracy(41.0, 1.0), top1_by_seed={0: 39.0, 1: 43.0})
    assert difference(cached, live) == (1.0, 0.0)
    assert difference(cached, _accuracy(41.0, 1.0)) == (1.0, math.sqrt(2))


def test_times_of_jobs_are_estimated_from_those_measured(tmp_path):
    from paper import Clock
    from paper_steps import Job

    from atcache.pipelines.build.config import BuildConfig
    from atcache.pipelines.train.config import TrainConfig

    building = Job(tmp_path, BuildConfig(teacher="t", data="d", out=tmp_path), 10)
    config = TrainConfig(mode="copy", cache=tmp_path, out=tmp_path)
    copying, living = Job(tmp_path, config, 100), Job(tmp_path, replace(config, live_teacher=True), 100)
    clock = Clock(file=tmp_path / "times.json", limit_s=60)
    assert clock.seconds_of(copying) is None
    assert clock.allows(None)  # the first command of a call
    clock.has_begun = True
    assert not clock.allows(None)
    clock.keep("build transform", 5, 2.0)
    assert clock.seconds_of(building) == pytest.approx(4)  # no other build was timed
    clock.keep("build given codec", 100, 3.0)
    assert clock.seconds_of(building) == pytest.approx(1.5)  # a tenth of the images, but not of the time
    assert clock.seconds_of(copying) is None
    clock.keep("train copy", 50, 20.0)
    assert clock.seconds_of(copying) == pytest.approx(40)
    assert clock.seconds_of(living) == pytest.approx(60)  # a teacher runs, too
    assert clock.allows(40)
    assert not clock.allows(55)
