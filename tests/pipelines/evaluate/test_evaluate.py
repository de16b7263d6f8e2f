"""Evaluation of one run gives what training validated, whatever the batch size; what does not fit is refused."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from evaluating import config_of, plain_logits, score_by_hand, softmax

from atcache.cli.main import cli
from atcache.errors import CacheMismatchError, CacheMissError, ConfigError
from atcache.pipelines.evaluate.run import evaluate
from atcache.pipelines.running.run_record import load_run
from atcache.pipelines.train.config import TrainConfig
from atcache.pipelines.train.run import train


@pytest.mark.parametrize("name", ["copy", "copy-1", "distill", "scratch"])
def test_a_run_scores_what_its_training_validated_whatever_the_batch_size(name, runs, val_cache):
    folder, validation = runs[name]
    # Equal batches, equal to the bit; other ones to rounding.
    assert evaluate(config_of(folder, cache=val_cache, batch_size=24)).score == validation
    for batch_size in (1, 7, 100):
        score = evaluate(config_of(folder, cache=val_cache, batch_size=batch_size)).score
        assert (score.top1, score.top5, score.num_samples) == (validation.top1, validation.top5, 48)
        assert score.loss == pytest.approx(validation.loss, rel=1e-5)


def test_scores_are_those_of_the_plain_model_computed_by_hand(runs, val_cache):
    score = evaluate(config_of(runs["distill"][0], cache=val_cache)).score
    logits_SC, label_S = plain_logits(runs["distill"][0], val_cache)
    top1, top5, loss, _ = score_by_hand(softmax(logits_SC), label_S)
    assert (score.top1, score.top5) == pytest.approx((top1, top5))
    assert score.loss == pytest.approx(loss, rel=1e-5)


def test_copying_runs_of_different_layers_go_together(runs, val_cache):
    folders = [runs[name][0] for name in ("copy", "copy-1", "scratch")]
    together = evaluate(config_of(*folders, cache=val_cache)).score
    again = evaluate(config_of(*folders[::-1], cache=val_cache)).score
    assert together.loss == pytest.approx(again.loss, rel=1e-9)
    alone = [evaluate(config_of(folder, cache=val_cache)).score.loss for folder in folders]
    assert together.loss < np.mean(alone)  # the logarithm is concave: Jensen


def test_a_live_teacher_gives_what_the_exact_cache_gives(runs, val_cache, tiny_weights, digits_tars):
    for name in ("copy", "copy-1"):
        folder, validation = runs[name]
        live = {"live_teacher": True, "weights": tiny_weights}
        from_cache = evaluate(config_of(folder, cache=val_cache, **live)).score
        from_tars = evaluate(config_of(folder, data=str(digits_tars[0].parent), **live)).score
        for score in (from_cache, from_tars):
            assert (score.top1, score.num_samples) == (validation.top1, 48)
            assert score.loss == pytest.approx(validation.loss, rel=1e-4)


def test_students_with_their_own_attention_are_evaluated_on_tars(runs, digits_tars):
    folder, validation = runs["scratch"]
    assert evaluate(config_of(folder, data=str(digits_tars[0].parent), batch_size=24)).score == validation
    assert evaluate(config_of(folder, data=str(digits_tars[0]), workers=1)).score.num_samples == 16


def test_what_does_not_fit_is_refused(runs, val_cache, tiny_cache, digits_tars, tmp_path):
    copy, scratch = runs["copy"][0], runs["scratch"][0]
    with pytest.raises(ConfigError, match="no run to evaluate: name the folder of a finished"):
        config_of(cache=val_cache)
    with pytest.raises(ConfigError, match="nothing to evaluate on: give --cache or --data"):
        config_of(copy)
    with pytest.raises(ConfigError, match=r"batch_size=0: expected at least 1"):
        config_of(copy, cache=val_cache, batch_size=0)
    with pytest.raises(ConfigError, match="workers=-1: expected at least 0"):
        config_of(copy, cache=val_cache, workers=-1)
    with pytest.raises(ConfigError, match=r"weights=mine\.pt is for a live teacher only\. Give --live-teacher too"):
        config_of(copy, cache=val_cache, weights=Path("mine.pt"))
    with pytest.raises(ConfigError, match="a copying student needs the teacher's maps to predict"):
        evaluate(config_of(copy, data=str(digits_tars[0])))
    with pytest.raises(ConfigError, match="--live-teacher: none of these runs copies attention"):
        evaluate(config_of(scratch, cache=val_cache, live_teacher=True))
    with pytest.raises(ConfigError, match=r"missing is not a run's folder: it does not exist\. Give the folder"):
        evaluate(config_of(tmp_path / "missing", cache=val_cache))
    with pytest.raises(ConfigError, match=r"is not a run's folder: it is a cache\. Give the folder of a finished"):
        evaluate(config_of(val_cache, cache=val_cache))
    with pytest.raises(ConfigError, match=r"\.tar is not a run's folder: it is a file\. Give the folder of a"):
        evaluate(config_of(digits_tars[0], cache=val_cache))
    with pytest.raises(CacheMissError, match=r"is not a cache: it is the folder of a run\. `atcache maps .* --out"):
        evaluate(config_of(copy, cache=scratch))
    with pytest.raises(CacheMismatchError, match="has no maps of layer 0, which the student copies"):
        evaluate(config_of(copy, cache=tiny_cache(policy="eval", layers="1")))
    unfinished = tmp_path / "unfinished"
    unfinished.mkdir()
    (unfinished / "run.json").write_bytes((copy / "run.json").read_bytes())
    with pytest.raises(ConfigError, match=r"unfinished is not finished: model\.safetensors is missing\. Run its"):
        evaluate(config_of(unfinished, cache=val_cache))
    (unfinished / "model.safetensors").write_bytes((scratch / "model.safetensors").read_bytes())
    with pytest.raises(ConfigError, match=r"model\.safetensors does not hold this run's weights"):
        evaluate(config_of(unfinished, cache=val_cache))


def test_labels_without_a_class_and_students_of_other_sizes_are_refused(runs, digits_tars, tiny_vit, tmp_path):
    nine = train(
        TrainConfig(
            mode="scratch",
            data=str(tar_of_labels(tmp_path, range(9))),
            student=tiny_vit,
            out=tmp_path / "nine",
            steps=1,
            device="cpu",
        )
    )
    tars = str(digits_tars[0].parent)
    with pytest.raises(ConfigError, match="digit-00009 has the label 9, but the student has 9 classes, from 0"):
        evaluate(config_of(Path(nine.out), data=tars))
    with pytest.raises(ConfigError, match=r"are \(8, 8, 10\) and \(8, 8, 9\)\. Evaluate them one by one"):
        evaluate(config_of(runs["scratch"][0], Path(nine.out), data=tars))


def test_runs_that_see_other_views_of_the_tars_are_refused_and_share_a_caches(
    runs, digits_tars, tiny_vit, val_cache, tmp_path
):
    tars = str(digits_tars[0].parent)
    place = {"out": tmp_path / "cropped", "steps": 1, "batch_size": 24, "device": "cpu"}
    cropped = train(TrainConfig(mode="scratch", data=tars, student=f"{tiny_vit},crop_pct=0.5", **place))
    together = (runs["scratch"][0], Path(cropped.out))
    with pytest.raises(
        ConfigError, match=r"bicubic and shows 0\.9 of an image, another with bicubic and 0\.5\. Give a"
    ):
        evaluate(config_of(*together, data=tars))
    assert evaluate(config_of(*together, cache=val_cache)).score.num_samples == 48


def tar_of_labels(folder: Path, labels) -> Path:
    import io

    import webdataset
    from PIL import Image

    png = io.BytesIO()
    Image.new("RGB", (8, 8)).save(png, format="PNG")
    with webdataset.TarWriter(str(folder / "few.tar")) as writer:
        for label in labels:
            writer.write({"__key__": f"image-{label}", "png": png.getvalue(), "cls": str(label)})
    return folder / "few.tar"


def test_the_command_prints_one_line_of_json(runs, val_cache):
    copy, scratch = str(runs["copy"][0]), str(runs["scratch"][0])
    place = ["--cache", str(val_cache), "--device", "cpu", "--precision", "fp32", "--batch-size", "24"]
    done = CliRunner().invoke(cli, ["eval", copy, *place])
    assert done.exit_code == 0, done.output
    summary = json.loads(done.stdout)
    assert summary["runs"] == [copy]
    assert summary["sets"][0]["runs"][0]["loss"] == runs["copy"][1].loss
    done = CliRunner().invoke(cli, ["eval", copy, scratch, *place])
    assert json.loads(done.stdout)["modes"] == ["copy", "scratch"]
    refused = CliRunner().invoke(cli, ["eval", *place])
    assert refused.exit_code == 1
    assert "Error: no run to evaluate" in refused.stderr


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_classes": "10"}, r"\"num_classes\" is '10', expected a whole number"),
        ({"mode": "copied"}, r"\"mode\" is 'copied', expected one of copy"),
        ({"teacher": {"name": "vit"}}, r'has no "teacher\.weights_sha256"'),
        ({"pairing": {"layers": [[0]]}}, r'"pairing\.layers\[0\]" is \[0\], expected a list of 2'),
    ],
)
def test_a_damaged_record_of_a_run_is_refused_in_a_sentence(tmp_path, change, message):
    record = {"mode": "scratch", "student": "vit", "num_classes": 10, "pairing": None, "teacher": None}
    (tmp_path / "run.json").write_text(json.dumps({"record": {**record, **change}}))
    with pytest.raises(ConfigError, match=rf"is not a run's folder: run\.json cannot be read \(.*{message}"):
        load_run(tmp_path, torch.device("cpu"))
