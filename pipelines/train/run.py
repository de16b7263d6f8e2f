"""Train: students from a cache (copy, distill), or the runs they are compared with (scratch, finetune).

One run is one folder: run.json (its settings), metrics.jsonl and TensorBoard events, checkpoint.pt while it runs,
model.safetensors when it is done. Typing the same command again continues from the checkpoint, exactly.

Several students can share one stream of batches (a sweep). Each comes out as if it were trained alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from atcache.errors import ConfigError
from atcache.files.durable import check_can_write
from atcache.teachers.devices import resolve_device

from ..running.ranks import Ranks
from ..running.run_files import RUN_FILE, WEIGHTS_FILE
from ..running.run_folder import (
    GIVEN_UP_FILE,
    keep_record,
    read_record,
    read_saved_record,
    run_folder,
    settle_precision,
)
from .config import TrainConfig
from .data import TrainingData, open_training_data
from .loop import train_to_the_end
from .student_run import DivergedError, TrainingRun
from .summary import SweepResult, TrainSummary, read_finished


def train(config: TrainConfig) -> TrainSummary:
    """Train a student, or continue a run that was stopped.

    Raises:
        AtcacheError: something does not fit; always one of its children. A saved checkpoint stays valid.
    """
    (result,) = _train_together([config], alone=True)
    if result.summary is None:
        raise DivergedError(f"{config.out} was given up by a sweep: {result.problem} Delete it to train it again.")
    return result.summary


def train_sweep(configs: Sequence[TrainConfig]) -> list[SweepResult]:
    """Train several students from one stream of batches: data is read once for all of them.

    Each student is bit for bit the one that `train` makes from its config. A student whose loss is NaN or infinite is
    given up; the others continue.

    Args:
        configs: one per student, all with the same `stream()`, each with its own folder.

    Raises:
        ConfigError: the configs differ in their stream, or two have the same folder.
        AtcacheError: as `train`.
    """
    Ranks.from_environment().refuse_several("`atcache train --sweep`")
    _check_one_stream(configs)
    return _train_together(configs, alone=False)


def _check_one_stream(configs: Sequence[TrainConfig]) -> None:
    if not configs:
        raise ConfigError("the sweep has no students: name at least one.")
    first, *others = [config.stream() for config in configs]
    for other in others:
        if differing := [name for name, value in first.items() if other[name] != value]:
            name = differing[0]
            raise ConfigError(
                f"{name} is {first[name]!r} for one student of the sweep and {other[name]!r} for another. They share "
                "one stream of batches, so it must be the same for all."
            )
    outs = [config.out for config in configs]
    if len(set(outs)) < len(outs):
        twice = next(out for out in outs if outs.count(out) > 1)
        raise ConfigError(f"two students of the sweep would be written to {twice}. Give each its own name.")


def _train_together(configs: Sequence[TrainConfig], *, alone: bool) -> list[SweepResult]:
    ranks = Ranks.from_environment()
    _check_parts(configs[0], ranks)
    device = resolve_device(ranks.device_name(configs[0].device))
    # What is drawn from torch's global generator must not disturb the caller's.
    with (
        torch.random.fork_rng(devices=[device] if device.type == "cuda" else []),
        ranks.connected(device),
    ):
        results = _train_connected(configs, ranks, device, alone=alone)
    return [results[config.out] for config in configs]


def _settled(config: TrainConfig, device: torch.device) -> TrainConfig:
    """The config with its precision decided: the one its run started with, or that of a new run."""
    begun = read_saved_record(config.out / RUN_FILE) or {}
    return replace(config, precision=settle_precision(config.precision, begun.get("settings"), device))


def _train_connected(
    configs: Sequence[TrainConfig], ranks: Ranks, device: torch.device, *, alone: bool
) -> dict[Path, SweepResult]:
    """Train while the ranks are connected. All that is made here is gone when they disconnect."""
    configs = ranks.on_leader(lambda: [_settled(config, device) for config in configs])
    ranks.on_leader(lambda: _check_can_write(configs))
    opened = ranks.on_all(lambda: open_training_data(configs, device))
    ranks.check_equal(
        [
            (config.settings(), config.validate_every, config.checkpoint_every, data.identity)
            for config, data in zip(configs, opened, strict=True)
        ],
        "the processes see different data or options. Give all the same files and options.",
    )
    # Made before anything is written, so that an unknown optimiser leaves no files behind.
    runs = ranks.on_all(
        lambda: [TrainingRun(config, data, device, ranks) for config, data in zip(configs, opened, strict=True)]
    )
    with ExitStack() as folders:
        results = ranks.on_leader(lambda: _begin(configs, opened, folders))
        runs = [run for run in runs if run.config.out not in results]
        if runs:
            results |= train_to_the_end(runs, opened[0], alone=alone)
    return results


def _check_can_write(configs: Sequence[TrainConfig]) -> None:
    for config in configs:
        if not (config.out / WEIGHTS_FILE).exists():  # of a finished run, only the result is read
            check_can_write(config.out)


def _check_parts(config: TrainConfig, ranks: Ranks) -> None:
    if config.batch_size % (ranks.world_size * config.accumulate):
        parts = f"{ranks.world_size} processes" + (
            f" x accumulate={config.accumulate}" if config.accumulate > 1 else ""
        )
        ranks.refuse(
            ConfigError(
                f"batch_size={config.batch_size} cannot be cut into equal parts for {parts}. Give a multiple of "
                f"{ranks.world_size * config.accumulate}."
            )
        )


def _begin(
    configs: Sequence[TrainConfig], opened: Sequence[TrainingData], folders: ExitStack
) -> dict[Path, SweepResult]:
    """Record in each folder which run it holds, or refuse another run; returns the results of runs that have ended.

    The folders of the other runs stay locked by this process until `folders` is closed.
    """
    results: dict[Path, SweepResult] = {}
    for config, data in zip(configs, opened, strict=True):
        with ExitStack() as own:
            own.enter_context(run_folder(config.out))
            begin_run(config, data)
            if (result := _earlier_result(config)) is not None:
                results[config.out] = result
            else:
                folders.enter_context(own.pop_all())
    return results


def begin_run(config: TrainConfig, data: TrainingData) -> None:
    """Record in a run's folder which run it holds, or refuse to continue another one: see `keep_record`."""
    file = config.out / RUN_FILE
    record: dict[str, Any] = {"settings": config.settings(), "record": data.record.to_json(), "data": data.identity}
    # Validation data does not change the training. Once the run is finished, its score is part of the result.
    is_finished = (config.out / WEIGHTS_FILE).exists()
    # Where the caches are changes nothing either; `atcache maps` looks there.
    record["caches"] = [str(cache.absolute()) for cache in config.caches]
    record["places"] = config.places()  # `atcache report` says the command again, and finds the validation data
    where = ("caches", "places")
    if is_finished:
        record |= {name: (read_record(file) or {}).get(name) for name in where}
    record = {name: value for name, value in record.items() if value or name not in where}
    keep_record(file, record, may_change=() if is_finished else ("data.validation", *where))


def _earlier_result(config: TrainConfig) -> SweepResult | None:
    """The result of an earlier call that ended the run; None if there was none."""
    file = config.out / GIVEN_UP_FILE
    if file.exists():
        return SweepResult(name=config.out.name, problem=file.read_text())
    summary = read_finished(config.out)
    return None if summary is None else SweepResult(name=config.out.name, summary=summary)
