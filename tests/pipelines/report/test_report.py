"""A report says of a run what other ways to look at it say."""

from __future__ import annotations

import html
import io
import itertools
import json
import logging
import os
import re
import shlex
import shutil
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from click.testing import CliRunner
from made_tars import encoded, member, picture, write_tar
from reported_runs import HOSTILE, PLACE, commands_of, words_of
from safetensors.torch import load_file, save_file

import atcache
from atcache.cache.record import CacheRecord
from atcache.cli.main import cli
from atcache.errors import CacheMismatchError, ConfigError, SourceError
from atcache.files.location import parse_location
from atcache.images.tars import expand_tars
from atcache.pipelines.evaluate.config import EvaluateConfig
from atcache.pipelines.evaluate.run import evaluate
from atcache.pipelines.pages.charts import thinned
from atcache.pipelines.report.after_training import train, train_sweep
from atcache.pipelines.report.config import ReportConfig
from atcache.pipelines.report.looking import in_time
from atcache.pipelines.report.repeat import build_command, data_of
from atcache.pipelines.report.run import report
from atcache.pipelines.running.metrics import read_metrics
from atcache.pipelines.train.config import TrainConfig
from atcache.store.reader import CacheReader
from atcache.teachers.inputs import normalise_images

SIZES = {"img_size": 8, "patch_size": 2, "embed_dim": 32, "depth": 2, "num_heads": 2}


def reported(run, tmp_path, **fields):
    """The summary of a report beside the run's own, and its page."""
    page = tmp_path / "page.html"
    return report(ReportConfig(run=run, out=page, **{**PLACE, **fields})), page


# What the page says


def test_a_run_ends_with_a_report_that_says_its_result(run_of):
    run = run_of("distill")
    words = words_of(run / "report.html")
    top1 = json.loads((run / "summary.json").read_text())["validation"]["top1"]
    assert f"names the class of {top1:.1f} % of 48 validation images correctly, after 30 steps on 48 images" in words
    last = read_metrics(run, "train")[-1]
    assert f"labels from {read_metrics(run, 'train')[0]['label_loss']:.3g} to {last['label_loss']:.3g}" in words
    headings = ("Curves", "Accuracy", "Agreement with the teacher", "Worst classes", "Pictures", "Make it again")
    places = [words.index(heading) for heading in headings]
    assert places == sorted(places)


def test_predictions_are_those_of_eval(run_of, named_caches, tmp_path):
    for mode in ("copy", "scratch"):
        run = run_of(mode)
        summary, page = reported(run, tmp_path)
        scored = json.loads(json.dumps(evaluate(EvaluateConfig(runs=(run,), cache=named_caches[1], **PLACE)).to_json()))
        top1, loss, ece = (_first_value(scored, name) for name in ("top1", "loss", "ece"))
        assert summary.num_predicted == 48
        assert f"for this page 48 of 48 {top1:.2f}" in words_of(page)
        assert f"{loss:.4g} {ece:.2f}" in words_of(page)


def _first_value(values, name: str) -> float:
    """The first value of a name, however deep: the same for one score and for those of several sets."""
    if isinstance(values, dict):
        if name in values:
            return values[name]
        values = list(values.values())
    below = (_first_value(value, name) for value in values if isinstance(value, (dict, list)))
    return next((value for value in below if value is not None), None)


def test_the_worst_classes_are_those_of_a_slow_count(run_of, named_caches, tmp_path):
    run = run_of("scratch")
    _, page = reported(run, tmp_path)
    cache = atcache.open(named_caches[1])
    views = [cache.view(sample) for sample in range(48)]
    predicted = predictions_of(run, np.stack([view.image for view in views]))
    right = {
        label: 100 * np.mean([got == label for view, got in zip(views, predicted, strict=True) if view.label == label])
        for label in {view.label for view in views}
    }
    worst = min(right, key=lambda label: (right[label], -sum(view.label == label for view in views)))
    (name, *_), share = row_after(page, "most often taken for"), right[worst]
    names = [HOSTILE, 'a "quoted" & odd one', *(f"digit {number}" for number in range(2, 10))]
    assert name == names[worst]
    assert f"{share:.1f}" in row_after(page, "most often taken for")


def row_after(page, heading: str) -> list[str]:
    """The cells of the first row of the table that has a heading."""
    table = page.read_text().partition(heading)[2].partition("</table>")[0]
    row = re.findall(r"<tr>(.*?)</tr>", table.partition("<tbody>")[2], re.DOTALL)[0]
    return [html.unescape(cell) for cell in re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row, re.DOTALL)]


def plain_student(run) -> torch.nn.Module:
    """Second opinion: the weights that the run saved, in a plain model of timm."""
    model = timm.create_model("vit_tiny_patch16_224", **SIZES, num_classes=10)
    model.load_state_dict(load_file(run / "model.safetensors"))
    return model.eval()


def inputs_of(model, pixels_BHWC: np.ndarray) -> torch.Tensor:
    mean, std = model.pretrained_cfg["mean"], model.pretrained_cfg["std"]
    return normalise_images(torch.from_numpy(pixels_BHWC), mean, std, torch.device("cpu"))


def predictions_of(run, pixels_BHWC: np.ndarray) -> list[int]:
    model = plain_student(run)
    with torch.no_grad():
        return model(inputs_of(model, pixels_BHWC)).argmax(1).tolist()


def test_the_agreement_is_that_of_a_slow_formula(run_of, named_caches, tmp_path):
    run = run_of("distill")
    summary, page = reported(run, tmp_path)
    assert summary.num_compared == 48
    cache, model = atcache.open(named_caches[1]), plain_student(run)
    views = [cache.view(sample) for sample in range(48)]
    own = []
    for block in model.blocks:
        block.attn.qkv.register_forward_hook(lambda _, __, out: own.append(out))
    with torch.no_grad():
        model(inputs_of(model, np.stack([view.image for view in views])))
    for layer, qkv in enumerate(own):
        q, k, _ = qkv.double().reshape(48, 17, 3, 2, 16).permute(2, 0, 3, 1, 4)
        ours = (q @ k.mT / 4).softmax(-1).numpy()
        theirs = np.stack([view.maps_LHQK[layer] for view in views]).astype(np.float64)
        kl_SHQ = (theirs * np.log(np.maximum(theirs, 1e-7) / np.maximum(ours, 1e-7))).sum(-1)
        moved = np.abs(theirs - ours).sum(-1).mean() / 2
        expected = f"{layer} {kl_SHQ.mean():.3g} {kl_SHQ.mean((0, 2)).max():.3g} {100 * moved:.1f}"
        assert expected in words_of(page)


def test_a_copying_student_agrees_by_construction(run_of):
    words = words_of(run_of("copy") / "report.html")
    assert "the two agree by construction in the 2 layers and 2 heads that are copied" in words
    assert "uses no attention of a teacher" in words_of(run_of("scratch") / "report.html")


def test_names_and_keys_are_text_not_marks(run_of):
    page = run_of("scratch") / "report.html"
    text = page.read_text()
    assert "<script" not in text.lower()
    assert HOSTILE in html.unescape(text)
    assert "a &quot;quoted&quot; &amp; odd one" in text
    assert "digits-0000.tar/digit-000" in text or "digits-0001.tar/digit-000" in text


def test_the_commands_make_the_same_run_and_the_same_caches(run_of, named_caches, tmp_path):
    run = run_of("distill")
    commands = commands_of(run / "report.html")
    assert [words[1] for words in commands] == ["build", "build", "train", "eval", "report"]
    (training,) = (words for words in commands if words[1] == "train")
    parsed = cli.get_command(None, "train").make_context("train", training[2:]).params
    parsed.pop("sweep")
    again = TrainConfig(**{**parsed, "out": tmp_path / "again"})
    assert again.settings() == TrainConfig(**{**parsed, "out": run}).settings()
    assert json.loads(json.dumps(again.settings())) == json.loads((run / "run.json").read_text())["settings"]
    train(again)
    assert all(
        torch.equal(tensor, load_file(run / "model.safetensors")[name])
        for name, tensor in load_file(tmp_path / "again/model.safetensors").items()
    )


@pytest.mark.parametrize(
    "fields",
    [
        {"codec": "transform", "target_mb_per_view": 0.001},
        {"codec": "transform:dct=false,target_kl=0.02", "decoding": "reduced"},
        {"codec": "logmap", "policy": "eval", "corrupt": "fog:2", "tars": 2},
        {"codec": "int8", "mixup": 0.8, "seed": 3, "tars": 1, "layers": "1"},
        {"codec": "exact", "heads": "0", "views": 2, "max_samples": 20},
    ],
)
def test_the_command_of_a_cache_builds_its_like(fields, tiny_cache, digits_tars, tiny_weights, tmp_path, monkeypatch):
    monkeypatch.chdir(tiny_weights.parent)  # a cache records no more of its weights than the name of their file
    names = [str(tar) for tar in digits_tars[: fields.get("tars", 3)]]
    options = {name: value for name, value in fields.items() if name != "tars"}
    first = tiny_cache(**options, data=names[0] if len(names) == 1 else f"{{{','.join(names)}}}")
    words = shlex.split(build_command(first, tmp_path / "again.zarr"))
    again = CliRunner().invoke(cli, [*words[1:], "--device", "cpu"])
    assert again.exit_code == 0, again.output
    identities = [CacheRecord.of(CacheReader(path)).identity for path in (first, tmp_path / "again.zarr")]
    assert identities[0] == identities[1]
    samples = [atcache.open(path).samples.sample_key.values.tolist() for path in (first, tmp_path / "again.zarr")]
    assert samples[0] == samples[1]


def test_a_cache_that_left_out_bad_images_is_built_so_again(tiny_cache, digits_tars, tmp_path):
    shutil.copy(digits_tars[0], tmp_path / "digits.tar")
    with tarfile.open(tmp_path / "digits.tar", "a") as tar:
        for info, data in (member("bad.png", b"no image"), member("bad.cls", b"1")):
            tar.addfile(info, io.BytesIO(data))
    path = tiny_cache(data=str(tmp_path / "digits.tar"), on_bad_image="skip")
    words = shlex.split(build_command(path, tmp_path / "again.zarr"))
    assert words[words.index("--on-bad-image") + 1] == "skip"
    assert "--on-bad-image" not in build_command(tiny_cache(), tmp_path / "again.zarr")


def test_no_command_builds_from_a_class_in_python(tiny_cache, tmp_path):
    shutil.copytree(tiny_cache(), tmp_path / "own.zarr")
    root = json.loads((tmp_path / "own.zarr/zarr.json").read_text())
    edited = json.dumps(root).replace(
        json.dumps(CacheRecord.of(CacheReader(tiny_cache())).identity.teacher), '"own:Net@12"'
    )
    (tmp_path / "own.zarr/zarr.json").write_text(edited)
    assert build_command(tmp_path / "own.zarr", tmp_path / "again.zarr") is None


def test_tars_are_typed_as_shortly_as_names_no_others(tmp_path):
    tars = [tmp_path / f"train-{number:03d}.tar" for number in range(12)]
    for tar in tars:
        tar.touch()
    urls = [parse_location(f"s3://bucket/{name}.tar") for name in ("a/x", "b/y")]
    assert data_of(tars) == str(tmp_path)
    assert data_of(tars[:1]) == str(tars[0])
    assert data_of(tars[8:11]) == f"{tmp_path}/train-{{008..010}}.tar"
    assert data_of(tars[1:4:2]) == f"{tmp_path}/{{train-001.tar,train-003.tar}}"
    assert data_of([Path("a/x.tar"), Path("b/y.tar")]) == "{a/x.tar,b/y.tar}"
    assert data_of(urls) == "s3://bucket/{a/x.tar,b/y.tar}"
    with pytest.raises(SourceError, match=r"s3://bucket/a/x.tar and s3://other/y.tar are on two servers"):
        data_of([urls[0], parse_location("s3://other/y.tar")])
    for chosen in (tars[8:11], tars[1:4:2], tars, urls):
        assert list(expand_tars(data_of(chosen))) == chosen


def test_commands_hold_where_the_training_was_typed(named_caches, tmp_path, monkeypatch):
    """Also if the report is written in another folder: build and train have paths of the first."""
    (tmp_path / "elsewhere").mkdir()
    for name, cache in zip(("train.zarr", "val.zarr"), named_caches, strict=True):
        shutil.copytree(cache, tmp_path / name)
    monkeypatch.chdir(tmp_path)
    places = {"cache": Path("train.zarr"), "val_cache": Path("val.zarr"), "out": Path("run")}
    train(TrainConfig(mode="scratch", steps=3, batch_size=24, **places, **PLACE))
    monkeypatch.chdir(tmp_path / "elsewhere")
    report(ReportConfig(run=Path("../run"), **PLACE))
    *_, evaluation, reporting = commands_of(tmp_path / "run/report.html")
    monkeypatch.chdir(tmp_path)
    for words in (evaluation, reporting):
        assert Path(words[2]).samefile("run")
        assert [Path(word).name for word in words if word.endswith(".zarr") and Path(word).exists()] == ["val.zarr"]


def test_runs_of_other_kinds_have_a_page_too(run_of, named_caches, tiny_cache, digits_tars, tmp_path):
    headless = run_of("distill", attention_only=True, val_cache=None, steps=3)
    summary, page = reported(headless, tmp_path, val_cache=named_caches[1])
    assert (summary.num_predicted, summary.num_compared) == (0, 48)
    assert "No class was predicted" in words_of(page)
    words = words_of(run_of("copy", what="q", steps=3) / "report.html")
    assert "copies q of the teacher and computes the rest itself" in words
    tars = str(digits_tars[0].parent)
    summary, page = reported(run_of("scratch", val_cache=None, val_data=tars, steps=3), tmp_path)
    assert summary.num_predicted == 48
    assert "Where it looks" in words_of(page)
    summary, page = reported(run_of("copy", val_cache=None, steps=3), tmp_path, val_data=tars)
    assert summary.num_predicted == 0
    assert "A student that copies needs the teacher's maps to predict" in words_of(page)
    rows = tiny_cache(queries="cls", policy="eval", codec="logmap")
    summary, page = reported(run_of("distill", cache=rows, val_cache=rows, steps=3), tmp_path)
    assert summary.num_compared == 48
    assert "what the class token attends to" in words_of(page)


def test_tars_that_have_moved_are_read_with_the_maps_of_the_cache(run_of, named_caches, tmp_path):
    moved = tmp_path / "moved"
    shutil.copytree(CacheReader(named_caches[1]).samples.tars[0].parent, moved)
    summary, _ = reported(run_of("copy"), tmp_path, val_data=str(moved))
    assert summary.num_predicted == 48, "a copying student predicts with maps"


def test_a_folder_whose_name_is_no_utf8_has_a_page(run_of, tmp_path):
    run = tmp_path / os.fsdecode(b"run-\xff")
    shutil.copytree(run_of("copy"), run)
    _, page = reported(run, tmp_path)
    assert "run-?" in words_of(page)


# When it is written


def test_no_report_writes_none_and_a_sweep_one_for_each_run(named_caches, tmp_path):
    common = {"cache": named_caches[0], "steps": 2, "batch_size": 24, **PLACE}
    train(TrainConfig(mode="copy", out=tmp_path / "without", report=False, **common))
    assert not (tmp_path / "without/report.html").exists()
    train_sweep([TrainConfig(mode="copy", out=tmp_path / name, seed=1, **common) for name in ("a", "b")])
    assert (tmp_path / "a/report.html").exists()
    assert "no validation data" in words_of(tmp_path / "b/report.html")


def test_a_report_that_fails_does_not_fail_the_run(named_caches, tmp_path, caplog):
    config = {"mode": "copy", "cache": named_caches[0], "steps": 2, "batch_size": 24, "out": tmp_path / "run", **PLACE}
    first = train(TrainConfig(**config, report=False))
    with (tmp_path / "run/metrics.jsonl").open("a") as file:
        file.write("no JSON\n")
    with caplog.at_level(logging.WARNING):
        assert train(TrainConfig(**config)) == first
    (message,) = [record.message for record in caplog.records if record.name.startswith("atcache")]
    assert message.startswith("NOTE: the run is finished and whole, but its report was not written: CorruptCacheError")
    assert not (tmp_path / "run/report.html").exists()


def test_validation_data_that_are_gone_leave_a_page_without_them(named_caches, tmp_path):
    shutil.copytree(named_caches[1], tmp_path / "val.zarr")
    common = {"cache": named_caches[0], "val_cache": tmp_path / "val.zarr", "steps": 2, "batch_size": 24, **PLACE}
    train(TrainConfig(mode="scratch", out=tmp_path / "run", report=False, **common))
    shutil.rmtree(tmp_path / "val.zarr")
    summary, page = reported(tmp_path / "run", tmp_path)
    assert summary.num_predicted == 0
    assert "The validation data of this run could not be looked at" in words_of(page)
    assert "No class was predicted" in words_of(page)


def test_moved_tars_have_their_labels_where_the_run_had_them(tmp_path, named_caches):
    """Also if there are others, in .cls files."""
    members = []
    for seed in range(6):
        members += [member(f"{seed}.png", encoded(picture(seed))), member(f"{seed}.cls", b"1")]
        members.append(member(f"{seed}.json", json.dumps({"id": 5 + seed % 3}).encode()))
    for name in ("before.tar", "moved.tar"):
        write_tar(tmp_path / name, members)
    common = {"cache": named_caches[0], "steps": 2, "batch_size": 24, "report": False, **PLACE}
    validation = {"val_data": str(tmp_path / "before.tar"), "label_key": "id"}
    train(TrainConfig(mode="scratch", out=tmp_path / "run", **validation, **common))
    (tmp_path / "before.tar").unlink()
    summary, page = reported(tmp_path / "run", tmp_path, val_data=str(tmp_path / "moved.tar"))
    assert summary.num_predicted == 6
    assert all("--label-key id" in " ".join(words) for words in commands_of(page) if words[1] in ("eval", "report"))
    evaluation = EvaluateConfig(
        runs=(tmp_path / "run",), data=str(tmp_path / "moved.tar"), label_key="id", device="cpu"
    )
    score = evaluate(evaluation).score
    assert f"for this page 6 of 6 {score.top1:.2f} {score.top5:.2f} {score.loss:.4g}" in words_of(page)


def test_a_place_that_was_typed_in_another_folder_is_found(named_caches, tmp_path, monkeypatch):
    (tmp_path / "there").mkdir()
    monkeypatch.chdir(tmp_path / "there")
    shutil.copytree(named_caches[1], "val.zarr")
    common = {"cache": named_caches[0], "val_cache": "val.zarr", "steps": 2, "batch_size": 24, **PLACE}
    train(TrainConfig(mode="copy", out="run", report=False, **common))
    monkeypatch.chdir(tmp_path)
    summary, page = reported(tmp_path / "there/run", tmp_path)
    assert summary.num_predicted == 48
    training = next(words for words in commands_of(page) if words[1] == "train")
    assert training[training.index("--val-cache") + 1] == "val.zarr"
    assert f"typed in {tmp_path / 'there'}" in words_of(page)


# Bad input


def test_a_folder_without_a_finished_run_is_refused(tmp_path, named_caches):
    with pytest.raises(ConfigError, match=r"is not a run's folder: it holds no run\.json"):
        report(ReportConfig(run=tmp_path, **PLACE))


@pytest.mark.parametrize(("out", "message"), [(".", "is a folder"), ("s3://bucket/page.html", "s3://bucket/page.html")])
def test_a_page_that_could_not_be_written_is_refused_at_once(out, message, run_of, tmp_path, monkeypatch):
    run = run_of("distill")
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(cli, ["report", str(run), "--out", out])
    assert result.exit_code != 0
    assert message in " ".join(result.output.split())
    assert list(tmp_path.iterdir()) == []


def test_a_label_key_without_tars_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"label_key=id says where labels are .* give --val-data alone"):
        ReportConfig(run=tmp_path, label_key="id")


def test_a_cache_of_another_teacher_is_refused(run_of, tiny_cache, tiny_vit, tmp_path):
    torch.manual_seed(1)
    save_file(timm.create_model("vit_tiny_patch16_224", **SIZES, num_classes=10).state_dict(), tmp_path / "w")
    other = tiny_cache(weights=tmp_path / "w", policy="eval")
    with pytest.raises(CacheMismatchError, match="holds maps of a teacher with other weights"):
        report(ReportConfig(run=run_of("distill"), val_cache=other, out=tmp_path / "x.html", **PLACE))
    assert not (tmp_path / "x.html").exists()
    # A run may have been validated on such a cache: then only the comparison is left out.
    validated = run_of("distill", val_cache=other)
    written = report(ReportConfig(run=validated, out=tmp_path / "y.html", **PLACE))
    assert (written.num_predicted, written.num_compared) == (48, 0)
    (note,) = written.notes
    assert note.startswith("The maps were not compared with the teacher's: ")


# Small parts


def test_a_pass_stops_when_its_time_is_over():
    def endless():
        for number in itertools.count():
            yield number
            time.sleep(0.01)

    assert list(in_time(endless(), 0.0)) == [0]
    found = list(in_time(endless(), 0.1))
    assert found == list(range(len(found)))
    assert list(in_time(iter(range(5)), 60.0)) == [0, 1, 2, 3, 4]


def test_long_curves_are_thinned_to_means_that_keep_their_level():
    steps = np.arange(10_000)
    x, y = thinned(steps, 2.0 * steps)
    assert len(x) == 300
    assert np.allclose(y, 2 * x)
    assert thinned([1, 2], [3, 4])[1].tolist() == [3, 4]


def test_the_command_writes_the_page_and_prints_where(run_of, named_caches, tmp_path):
    words = ["report", str(run_of("distill")), "--out", str(tmp_path / "new/x.html"), "--samples", "10"]
    words += ["--map-samples", "3", "--device", "cpu", "--precision", "fp32"]
    result = CliRunner().invoke(cli, words, catch_exceptions=False)
    summary = json.loads(result.stdout)
    assert (summary["num_predicted"], summary["num_compared"]) == (10, 3)
    assert (tmp_path / "new/x.html").stat().st_size == summary["nbytes"]
    assert "for this page 10 of 48" in words_of(tmp_path / "new/x.html")
