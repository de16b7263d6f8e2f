"""A disk that is full, read-only or another user's is one sentence that names the file, and what was saved stays."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from disks import largest_file, mounted, without_permission
from PIL import Image
from torch import nn

import atcache
from atcache.errors import DiskFullError, NotWritableError
from atcache.files.durable import check_can_write, disk_errors_explained, make_folder, write_file
from atcache.pipelines.build.config import BuildConfig
from atcache.pipelines.build.run import build
from atcache.pipelines.pretrain.config import PretrainConfig
from atcache.pipelines.pretrain.run import pretrain
from atcache.pipelines.running.checkpoint import load_checkpoint, save_checkpoint
from atcache.pipelines.running.metrics import MetricsLog, read_metrics
from atcache.pipelines.running.run_files import save_weights
from atcache.pipelines.train.run import train, train_sweep

STATE = {"model": {f"{number}": torch.zeros(1000) for number in range(2000)}, "step": 3}  # 8 MB
LARGE = nn.Linear(1000, 1000)


def write_metrics(path):
    with MetricsLog(path.parent, first_step=0) as metrics:
        for step in range(10_000):
            metrics.write("train", step, {f"loss {number}": 0.5 for number in range(100)})


WRITERS = {
    "checkpoint.pt": lambda path: save_checkpoint(path, STATE),
    "model.safetensors": lambda path: save_weights(path, LARGE),
    "metrics.jsonl": write_metrics,
    "summary.json": lambda path: write_file(path, bytes(3 * 2**20)),
}


@pytest.mark.parametrize("name", WRITERS)
def test_a_full_disk_is_a_sentence_for_everything_that_a_run_writes(name, tmp_path):
    with mounted(tmp_path / "small", "size=2m"):
        file = tmp_path / "small" / name
        with pytest.raises(DiskFullError, match=rf"small(/{name})? cannot be written: No space left.*Free some space"):
            WRITERS[name](file)
        # Lines that were written before stay; a file that is written as a whole is not there.
        assert [path.name for path in file.parent.iterdir() if "tfevents" not in path.name] in ([], ["metrics.jsonl"])


@pytest.mark.parametrize("name", WRITERS)
def test_a_file_that_may_not_grow_is_the_same_sentence(name, tmp_path):
    with largest_file(nbytes=2**20), pytest.raises(DiskFullError, match="cannot be written: File too large"):
        WRITERS[name](tmp_path / name)


def test_a_checkpoint_that_cannot_be_replaced_stays(tmp_path):
    file = tmp_path / "checkpoint.pt"
    save_checkpoint(file, {"step": 1})
    with largest_file(nbytes=2**20), pytest.raises(DiskFullError):
        save_checkpoint(file, STATE)
    assert load_checkpoint(file) == {"step": 1}
    assert list(tmp_path.iterdir()) == [file]


def test_a_run_whose_disk_fills_up_says_so_and_continues(config_for, tmp_path):
    config = config_for("scratch", checkpoint_every=5)
    whole = train(replace(config, out=tmp_path / "whole"))
    with (
        largest_file(nbytes=100_000),
        pytest.raises(DiskFullError, match=r"checkpoint\.pt cannot be written: File too large.* same command again"),
    ):
        train(config)
    assert read_metrics(config.out) == [] or read_metrics(config.out)[-1]["step"] < 20
    assert train(config).loss == whole.loss


def test_a_student_whose_disk_is_full_costs_the_others_of_its_sweep_no_step(config_for, tmp_path):
    before, full, after = (
        config_for("scratch", out=tmp_path / "sweep" / name, order_seed=0, checkpoint_every=5, **fields)
        for name, fields in {
            "before": {"optimizer": "sgd"},
            "full": {"ema": 0.9},  # four copies of the weights, where SGD has two
            "after": {"optimizer": "sgd"},
        }.items()
    )
    wholes = [train(replace(config, out=tmp_path / config.out.name)) for config in (before, full, after)]
    weights_nbytes = (tmp_path / "before" / "model.safetensors").stat().st_size
    with largest_file(nbytes=3 * weights_nbytes), pytest.raises(DiskFullError, match=r"full/checkpoint\.pt"):
        train_sweep([before, full, after])
    assert load_checkpoint(before.out / "checkpoint.pt")["step"] == 5
    assert load_checkpoint(after.out / "checkpoint.pt")["step"] == 4, "its turn in the fifth step had not come"
    assert not (full.out / "checkpoint.pt").exists()
    results = train_sweep([before, full, after])
    assert [result.summary.loss for result in results] == [whole.loss for whole in wholes]


def test_no_command_works_for_long_before_it_finds_that_it_may_not_write(config_for, digits_tars, tiny_vit, tmp_path):
    out = tmp_path / "others"
    (tmp_path / "images/a").mkdir(parents=True)
    out.mkdir()
    Image.new("RGB", (4, 4)).save(tmp_path / "images/a/0.png")
    data = str(digits_tars[0])
    commands = {
        "pack": lambda: atcache.pack(data=tmp_path / "images", out=out / "new"),
        "build": lambda: build(BuildConfig(teacher=tiny_vit, data=data, out=out / "new")),
        "train": lambda: train(config_for("scratch", out=out / "new")),
        "pretrain": lambda: pretrain(PretrainConfig(model=tiny_vit, data=data, out=out / "new", steps=1)),
    }
    configured = config_for("scratch", out=out / "new")
    commands["train"] = lambda: train(configured)
    for command in commands.values():
        with without_permission(out), pytest.raises(NotWritableError, match=r"others(/new)? cannot be written: .*"):
            command()


def test_a_disk_that_is_read_only_or_fails_is_a_sentence(tmp_path):
    with mounted(tmp_path / "disk", "ro"):
        new = tmp_path / "disk" / "new"
        for write in (
            lambda: check_can_write(new / "er"),
            lambda: make_folder(new),
            lambda: write_file(new, b"x"),
            lambda: save_checkpoint(new, STATE),
            lambda: save_weights(new, LARGE),
        ):
            with pytest.raises(NotWritableError, match=r"/disk/new.* cannot be written: .*[Rr]ead-only"):
                write()
    sentence = r"x cannot be written: Input/output error.*Check the permissions"
    with pytest.raises(NotWritableError, match=sentence), disk_errors_explained(tmp_path / "x"):
        raise OSError(5, "Input/output error")


def test_other_errors_stay_as_they_are(tmp_path):
    for error in (ValueError("ours"), FileNotFoundError(2, "no"), RuntimeError("torch's"), DiskFullError("said")):
        with pytest.raises(type(error)) as found, disk_errors_explained(tmp_path):
            raise error
        assert found.value is error
