"""Train: students from a cache (copy, distill), or the runs they are compared with (scratch, finetune).

One run is one folder: run.json (its settings), metrics.jsonl and TensorBoard events, checkpoint.pt while it runs,
model.safetensors when it is done. Typing the same command again continues from the checkpoint, exactly.

Several students can share one stream of batches (a sweep): each still is the run it would be alone.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from atcache.errors import ConfigError
from atcache.loader import Batch, training_batches
from atcache.precision import resolve_device
from atcache.store.durable import write_file

from .distributed import Ranks
from .interrupts import Interrupts
from .metrics import MetricsLog, read_metrics
from .progress import Progress
from .run_folder import GIVEN_UP_FILE, keep_record, read_record, run_folder, settle_precision
from .runs import RUN_FILE, WEIGHTS_FILE
from .speed import Speed
from .train_config import TrainConfig
from .train_summary import TrainSummary, read_finished
from .training_data import TrainingData, open_training_data
from .training_run import LOG_EVERY, DivergedError, Reports, TrainingRun

__all__ = ["SweepResult", "TrainConfig", "TrainSummary", "train", "train_sweep"]


@dataclass(frozen=True, kw_only=True, slots=True)
class SweepResult:
    """What one student of a sweep came to."""

    name: str
    """Its folder's name."""
    summary: TrainSummary | None
    """None for a student that was given up."""
    problem: str | None
    """Why it was given up; None for a finished one."""

    def to_json(self) -> dict[str, Any]:
        """The fields as a JSON object."""
        summary = None if self.summary is None else self.summary.to_json()
        return {"name": self.name, "summary": summary, "problem": self.problem}


def train(config: TrainConfig) -> TrainSummary:
    """Train a student, or continue.

    Raises:
        AtcacheError: one of its children for each thing that does not fit; a checkpoint that was saved stays valid.
    """
    (result,) = _train_together([config], alone=True)
    if result.summary is None:
        raise DivergedError(f"{config.out} was given up by a sweep: {result.problem} Delete it to train it anew.")
    return result.summary


def train_sweep(configs: Sequence[TrainConfig]) -> list[SweepResult]:
    """Train several students from one stream of batches: what is read once serves all.

    Each student is bit for bit what `train` would make of its config alone. One whose loss is no number any more is
    given up, and the others go on.

    Args:
        configs: equal in their `stream()`, each with a folder of its own.

    Raises:
        ConfigError: the configs do not go together.
        AtcacheError: as `train`.
    """
    Ranks.from_environment().refuse_several("`atcache train --sweep`")
    _check_one_stream(configs)
    return _train_together(configs, alone=False)


def _check_one_stream(configs: Sequence[TrainConfig]) -> None:
    if not configs:
        raise ConfigError("a sweep of no students: name at least one.")
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
        raise ConfigError(f"two students of the sweep would be written to {twice}. Give each a name of its own.")


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
    """The config with the precision that its run was begun with, or begins with now."""
    begun = read_record(config.out / RUN_FILE) or {}
    return replace(config, precision=settle_precision(config.precision, begun.get("settings"), device))


def _train_connected(
    configs: Sequence[TrainConfig], ranks: Ranks, device: torch.device, *, alone: bool
) -> dict[Path, SweepResult]:
    """What is in here lives as long as the ranks are connected."""
    configs = ranks.on_leader(lambda: [_settled(config, device) for config in configs])
    opened = ranks.on_all(lambda: open_training_data(configs, device))
    ranks.check_equal(
        [
            (config.settings(), config.validate_every, config.checkpoint_every, data.identity)
            for config, data in zip(configs, opened, strict=True)
        ],
        "the processes see different data or options. Give all the same files and options.",
    )
    # Made before anything is written: an optimiser that does not exist leaves nothing behind.
    runs = ranks.on_all(
        lambda: [TrainingRun(config, data, device, ranks) for config, data in zip(configs, opened, strict=True)]
    )
    with ExitStack() as folders:
        results = ranks.on_leader(lambda: _begin(configs, opened, folders))
        runs = [run for run in runs if run.config.out not in results]
        if runs:
            results |= _train_runs(runs, opened[0], alone=alone)
    return results


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
    """Keep in each folder which run it is, or refuse another one; results of those that are at their end already.

    The folders of those that are not are this process's until `folders` is left.
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
    """Keep in a run's folder which run it is, or refuse to go on with another one: see `keep_record`."""
    record = {"settings": config.settings(), "record": data.record.to_json(), "data": data.identity}
    # What a run is validated on changes nothing in it; but a finished one has its score.
    is_finished = (config.out / WEIGHTS_FILE).exists()
    keep_record(config.out / RUN_FILE, record, may_change=() if is_finished else ("data.validation",))


def _earlier_result(config: TrainConfig) -> SweepResult | None:
    """What an earlier call came to, where that was the end."""
    file = config.out / GIVEN_UP_FILE
    if file.exists():
        return _result(config, None, file.read_text())
    summary = read_finished(config.out)
    return None if summary is None else _result(config, summary)


def _result(config: TrainConfig, summary: TrainSummary | None, problem: str | None = None) -> SweepResult:
    return SweepResult(name=config.out.name, summary=summary, problem=problem)


def _train_runs(runs: Sequence[TrainingRun], data: TrainingData, *, alone: bool) -> dict[Path, SweepResult]:
    """Give each run the batches it lacks, until all are done; results by folder."""
    ranks = runs[0].ranks
    ranks.on_all(lambda: [run.restore() for run in runs])
    first_step, total = min(run.step for run in runs), max(run.num_steps for run in runs)
    ranks.check_equal(
        first_step,
        f"the processes do not see the same checkpoint in {runs[0].config.out}: several nodes need an --out on storage "
        "that they share.",
    )
    results: dict[Path, SweepResult] = {}
    with ExitStack() as stack:
        progress: Progress | None = None
        if ranks.leads:
            title = runs[0].config.mode if alone else "sweep"
            progress = stack.enter_context(Progress(title, total=total, unit="steps", done=first_step))
            for line in _notes(runs, alone):
                progress.say(line)
        to_validate = ranks.on_leader(lambda: {run.config.out for run in runs if _lacks_validation(run)})
        reports = {
            run.config.out: _reports(run, progress, stack, alone=alone, validates=run.config.out in to_validate)
            for run in runs
        }
        speed = Speed(ranks.world_size)
        interrupts = stack.enter_context(Interrupts(heeded=ranks.leads))
        for run in runs:
            validates = run.config.out in to_validate
            if result := _after_step(run, speed, reports[run.config.out], interrupts, validates=validates):
                results[run.config.out] = result
        for step, batch in enumerate(speed.timed(_batches(runs, data, first_step, total)), start=first_step):
            if not alone:  # one journey to the device for all; a run alone may want it in parts
                batch = batch.to(runs[0].device)
            # A run whose checkpoint is of a later step joins when the stream gets there.
            current = [run for run in runs if run.step == step and run.config.out not in results]
            for run in current:
                if result := _take(run, batch, speed, reports[run.config.out], alone=alone):
                    results[run.config.out] = result
            if progress is not None and ((step + 1) % LOG_EVERY == 0 or step + 1 == total):
                losses = " ".join(f"{run.loss:.4g}" for run in runs)
                progress.advance(step + 1 - progress.done, f"loss {losses}  {speed}")
            current = [run for run in current if run.config.out not in results]
            with _saved_when_stopped(current, results, speed, reports):
                for run in current:
                    validates = run.is_validated
                    if result := _after_step(run, speed, reports[run.config.out], interrupts, validates=validates):
                        results[run.config.out] = result
                if len(results) == len(runs):
                    break
                if interrupts.came:
                    interrupts.end()
    return results


def _lacks_validation(run: TrainingRun) -> bool:
    """Whether the process that saved a run's checkpoint ended before it was validated, or before that was of use."""
    rows = read_metrics(run.config.out, "validation")
    return run.is_validated and (run.is_done or all(row["step"] != run.step for row in rows))


def _reports(run: TrainingRun, progress: Progress | None, stack: ExitStack, *, alone: bool, validates: bool) -> Reports:
    """Where a run's numbers and words go until `stack` is left; says where it continues.

    Args:
        run: restored from its checkpoint, where there is one.
        progress: None on ranks that do not lead.
        stack: ends what is opened.
        alone: whether it is the only run.
        validates: whether the step it is at is validated, once more or for the first time.
    """
    if progress is None:
        return Reports()
    metrics = stack.enter_context(MetricsLog(run.config.out, first_step=run.step, validates_first_step=validates))
    reports = Reports(metrics=metrics, progress=progress, prefix=_prefix(run, alone))
    if run.step:
        reports.say(f"continuing after step {run.step} of {run.num_steps}")
    return reports


def _take(run: TrainingRun, batch: Batch, speed: Speed, reports: Reports, *, alone: bool) -> SweepResult | None:
    """One step of a run, and what a sweep's came to where it was given up."""
    try:
        run.take(batch, speed, reports)
    except DivergedError as error:
        if alone:
            raise
        write_file(run.config.out / GIVEN_UP_FILE, str(error).encode())
        reports.say(f"given up: {error}")
        return _result(run.config, None, str(error))
    return None


def _after_step(
    run: TrainingRun, speed: Speed, reports: Reports, interrupts: Interrupts, *, validates: bool
) -> SweepResult | None:
    """Validate, and finish, when it is time; what the run came to where it is done."""
    if validates:
        with speed.paused(), interrupts.at_once():
            run.validate(reports)
    if not run.is_done:
        return None
    return _result(run.config, run.ranks.on_leader(partial(run.finish, speed)))


@contextmanager
def _saved_when_stopped(
    runs: Sequence[TrainingRun], results: Mapping[Path, SweepResult], speed: Speed, reports: Mapping[Path, Reports]
) -> Generator[None]:
    """Save runs that stand between two steps, where the process is told to end in here, or one of them fails."""
    try:
        yield
    except BaseException:
        said: list[tuple[Reports, str]] = []
        for run in runs:
            if run.ranks.leads and run.config.out not in results:
                is_sound = run.is_sound()
                if is_sound:
                    run.save(speed)
                outcome = "is saved" if is_sound else "is not saved: weights are no numbers any more"
                said.append((reports[run.config.out], f"stopped after step {run.step}, which {outcome}"))
        for report, line in said:
            report.say(line)
        raise


def _notes(runs: Sequence[TrainingRun], alone: bool) -> Iterator[str]:
    """What the user should know before the runs; what concerns all of them is said once."""
    for note in dict.fromkeys(note for run in runs for note in run.notes):
        concerned = [run for run in runs if note in run.notes]
        if len(concerned) == len(runs):
            yield note
        else:
            yield from (_prefix(run, alone) + note for run in concerned)


def _prefix(run: TrainingRun, alone: bool) -> str:
    return "" if alone else f"{run.config.out.name}: "


def _batches(runs: Sequence[TrainingRun], data: TrainingData, first_step: int, stop_step: int) -> Iterator[Batch]:
    ranks = runs[0].ranks
    return training_batches(
        data.views,
        data.label_S,
        replace(data.order, rank=ranks.rank, num_ranks=ranks.world_size),
        first_step=first_step,
        stop_step=stop_step,
        workers=runs[0].config.workers,
    )
