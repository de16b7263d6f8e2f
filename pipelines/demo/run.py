"""Demo: attention transfer end to end on real images, without a download, through the pipelines users run.

scikit-learn's 1,797 handwritten digits (8 x 8) are written as tars; the teacher is a small ViT, MAE-pre-trained on the
training digits without labels; the students get 100 labels. All that runs is also written down as commands.
"""

from __future__ import annotations

import io
import shutil
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch

from atcache.choices import MODES, Mode
from atcache.errors import ConfigError
from atcache.files.durable import disk_errors_explained, encode_json, make_folder, write_file

from ..build.config import BuildConfig
from ..build.run import build
from ..build.summary import BuildSummary
from ..evaluate.config import EvaluateConfig
from ..evaluate.run import evaluate
from ..pretrain.config import PretrainConfig
from ..pretrain.run import pretrain
from ..report.config import ReportConfig
from ..report.run import report
from ..running.commands import as_command
from ..train.config import TrainConfig
from ..train.run import train
from .config import DemoConfig
from .page import write_page
from .picture import draw_maps
from .summary import AVERAGED, DemoSummary, ModeResult

NUM_TRAIN = 1297
"""Digits the teacher sees, without labels; the other 500 validate."""
NUM_LABELS = 100
"""Labels the students get."""
TEACHER = "demo-mae"
"""A name whose weights ship with the package."""
PRETRAIN = PretrainConfig(model=TEACHER, data="", out=Path(), steps=3000, base_lr=2e-3, decoder_depth=1, policy="eval")
"""How these weights were made; data and out are filled in."""
_MARKER = ".made-by-atcache-demo"
"""The file a demo puts into its folder first. A folder without it was not made by a demo."""
_MADE = ("train.zarr", "val.zarr", "teacher", "maps.png", "commands.sh", "demo.json", "demo.html")
"""What a demo makes in its folder, beside the tars and the runs."""


def demo(config: DemoConfig, say: Callable[[str], None] = lambda _: None) -> DemoSummary:
    """Run the demo in one thread: such small operations gain little from more, and lose much on a busy machine.

    Args:
        config: what to run.
        say: called with each command before it runs.

    Raises:
        ConfigError: the folder exists and was not made by an earlier demo, or scikit-learn is not installed.
    """
    if find_spec("sklearn") is None:
        raise ConfigError(
            "`atcache demo` needs scikit-learn for its handwritten digits, which is not installed. Install it with "
            "pip install 'atcache[demo]'."
        )
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return _demo(config, say)
    finally:
        torch.set_num_threads(num_threads)


def _demo(config: DemoConfig, say: Callable[[str], None]) -> DemoSummary:
    start_s = time.monotonic()
    _make_room(config.out)
    commands: list[str] = []

    def announce(command: str) -> None:
        commands.append(command)
        say(command)

    train_tar, val_tar = write_digits(config.out / "digits")
    weights = _pretrain(config, train_tar, announce) if config.pretrain else None
    train_cache = _build(config, train_tar, weights, config.out / "train.zarr", announce)
    val_cache = _build(config, val_tar, weights, config.out / "val.zarr", announce)
    top1s: dict[str, list[float]] = {mode: [] for mode in (*MODES, AVERAGED)}
    seconds: dict[str, list[float]] = {mode: [] for mode in (*MODES, AVERAGED)}
    for seed in range(config.seeds):
        for mode in MODES:
            top1, mode_seconds = _train_and_evaluate(config, mode, seed, weights, announce)
            top1s[mode].append(top1)
            seconds[mode].append(mode_seconds)
        together = EvaluateConfig(
            runs=tuple(_run_folder(config, mode, seed) for mode in ("distill", "finetune")),
            cache=config.out / "val.zarr",
        )
        announce(as_command("eval", together))
        top1s[AVERAGED].append(evaluate(together).score.top1)
        seconds[AVERAGED].append(seconds["distill"][-1] + seconds["finetune"][-1])
    draw_maps(config.out / "val.zarr", config.out / "maps.png")
    complete = train_cache.complete
    assert complete is not None
    assert train_cache.plan is not None
    assert val_cache.complete is not None
    summary = DemoSummary(
        out=str(config.out),
        modes=_results(top1s, seconds),
        cache_nbytes_per_view=complete["nbytes"] / complete["num_stored"],
        map_nbytes_per_view=train_cache.plan.map_nbytes_per_view,
        num_views=complete["num_stored"] + val_cache.complete["num_stored"],
        seconds=time.monotonic() - start_s,
        commands=tuple(commands),
        page=str(config.out / "demo.html"),
    )
    write_file(config.out / "commands.sh", "".join(f"{command}\n" for command in commands).encode())
    write_file(config.out / "demo.json", encode_json(summary.to_json()))
    write_page(summary)
    return summary


def write_digits(folder: Path) -> tuple[Path, Path]:
    """Write scikit-learn's digits as WebDataset tars, in a fixed order; returns the training and the validation tar."""
    from PIL import Image
    from sklearn.datasets import load_digits
    from webdataset.writer import TarWriter

    digits = cast("Any", load_digits())
    order = np.random.RandomState(0).permutation(len(digits.target))
    tars = _digit_tars(folder)
    make_folder(folder)
    for tar, chosen in zip(tars, (order[:NUM_TRAIN], order[NUM_TRAIN:]), strict=True):
        with disk_errors_explained(tar), TarWriter(str(tar), mtime=0) as writer:
            for sample in chosen:
                buffer = io.BytesIO()
                grey_HW = (digits.images[sample] * (255 / 16)).round().astype(np.uint8)  # pixels are 0 to 16
                Image.fromarray(grey_HW).convert("RGB").save(buffer, "PNG")
                record = {"png": buffer.getvalue(), "cls": str(digits.target[sample])}
                writer.write({"__key__": f"digit-{sample:04d}", **record})
    return tars


def _digit_tars(folder: Path) -> tuple[Path, Path]:
    return folder / "train-000000.tar", folder / "val-000000.tar"


def _make_room(out: Path) -> None:
    """Make the folder, or remove what an earlier demo made in it; refuse a folder that no demo made."""
    if out.exists() and not out.is_dir():
        raise ConfigError(f"{out} is a file, expected a folder. Give another --out.")
    marker = out / _MARKER
    if out.exists() and any(out.iterdir()) and not marker.is_file():
        raise ConfigError(f"{out} exists and was not made by `atcache demo`. Give another --out.")
    make_folder(out)
    write_file(marker, b"")
    # Only files with a demo's names are removed: the user may have put other files there since.
    digits, runs = out / "digits", out / "runs"
    of_modes = [path for mode in MODES for path in runs.glob(f"{mode}-*") if path.name[len(mode) + 1 :].isdecimal()]
    for path in (*(out / name for name in _MADE), *_digit_tars(digits), *of_modes):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    for folder in (digits, runs):
        if folder.is_dir() and not folder.is_symlink() and not any(folder.iterdir()):
            folder.rmdir()


def _pretrain(config: DemoConfig, train_tar: Path, announce: Callable[[str], None]) -> Path:
    pretraining = replace(PRETRAIN, data=str(train_tar), out=config.out / "teacher")
    announce(as_command("pretrain", pretraining))
    return pretrain(pretraining).weights


def _build(
    config: DemoConfig, tar: Path, weights: Path | None, out: Path, announce: Callable[[str], None]
) -> BuildSummary:
    building = BuildConfig(
        teacher=TEACHER, weights=weights, data=str(tar), out=out, policy="eval", codec=config.codec, workers=0
    )
    announce(as_command("build", building))
    return build(building)


def student_config(config: DemoConfig, mode: Mode, seed: int, weights: Path | None) -> TrainConfig:
    """The config of a student of the demo; all modes are trained alike.

    Args:
        config: its `out` holds the training cache and will hold the run.
        mode: what the student does.
        seed: seed of its initial weights, its labelled digits and their order.
        weights: file of the teacher's weights, if the demo pre-trained it; used by finetune.
    """
    return TrainConfig(
        mode=mode,
        cache=config.out / "train.zarr",
        weights=weights if mode == "finetune" else None,
        out=_run_folder(config, mode, seed),
        subset=NUM_LABELS,
        steps=400,
        batch_size=64,
        base_lr=4e-3,
        label_smoothing=0.1,
        drop_path=0.1,
        seed=seed,
        report=False,  # the demo writes it, with validation images that are not seen in the training
    )


def _run_folder(config: DemoConfig, mode: str, seed: int) -> Path:
    return config.out / "runs" / f"{mode}-{seed}"


def _train_and_evaluate(
    config: DemoConfig, mode: Mode, seed: int, weights: Path | None, announce: Callable[[str], None]
) -> tuple[float, float]:
    """Validation accuracy of one student, and the seconds its training took."""
    training = student_config(config, mode, seed, weights)
    announce(as_command("train", training))
    seconds = train(training).seconds
    evaluation = EvaluateConfig(runs=(training.out,), cache=config.out / "val.zarr")
    announce(as_command("eval", evaluation))
    top1 = evaluate(evaluation).score.top1
    reporting = ReportConfig(run=training.out, val_cache=config.out / "val.zarr")
    announce(as_command("report", reporting))
    report(reporting)
    return top1, seconds


def _results(top1s: dict[str, list[float]], seconds: dict[str, list[float]]) -> dict[str, ModeResult]:
    means = {mode: statistics.fmean(values) for mode, values in top1s.items()}
    gap = means["finetune"] - means["scratch"]
    return {
        mode: ModeResult(
            top1=means[mode],
            top1_per_seed=tuple(values),
            gap_closed=(means[mode] - means["scratch"]) / gap if gap > 0 else None,
            seconds=statistics.fmean(seconds[mode]),
        )
        for mode, values in top1s.items()
    }
