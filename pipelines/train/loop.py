"""The training loop: every run takes each batch of one stream, in turn, until all runs are done."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

from atcache.feed.batch import Batch
from atcache.feed.loader import BatchStream
from atcache.files.durable import write_file
from atcache.machine import num_processors

from ..running.interrupts import Interrupts
from ..running.metrics import MetricsLog, Speed, read_metrics
from ..running.progress import Progress
from ..running.run_folder import GIVEN_UP_FILE
from .data import TrainingData
from .student_run import LOG_EVERY, DivergedError, Reports, TrainingRun
from .summary import SweepResult

ADVISES_AFTER_S = 10.0
"""Seconds of training after which a run that waits for data is told what may help."""
_MUCH_WAITING = 0.3
_ENOUGH_WORKERS = 8  # they feed most GPUs, and each has memory for two batches


def train_to_the_end(runs: Sequence[TrainingRun], data: TrainingData, *, alone: bool) -> dict[Path, SweepResult]:
    """Train each run on the batches that it still lacks; returns the results by folder.

    Args:
        runs: at least one; each continues from its checkpoint, if there is one.
        data: the stream they share.
        alone: whether this is a single run, not a sweep; then a loss that is NaN or infinite is an error.

    Raises:
        AtcacheError: something fails; always one of its children. Where it comes between two steps, runs are saved
            first.
    """
    ranks = runs[0].ranks
    ranks.on_all(lambda: [run.restore() for run in runs])
    ranks.check_equal(
        [run.step for run in runs],
        f"the processes do not see the same checkpoint in {runs[0].config.out}: several nodes need an --out on storage "
        "that they share.",
    )
    with ExitStack() as stack:
        return _Loop(runs, stack, alone=alone).to_the_end(data)


class _Loop:
    """The state of the training of all runs. What it opens is closed with the `stack`."""

    def __init__(self, runs: Sequence[TrainingRun], stack: ExitStack, *, alone: bool) -> None:
        self._runs, self._ranks, self._alone = runs, runs[0].ranks, alone
        self._first_step, self._num_steps = min(run.step for run in runs), max(run.num_steps for run in runs)
        self._results: dict[Path, SweepResult] = {}
        self._restored_at = {run: run.step for run in runs}
        self._to_validate = self._ranks.on_leader(lambda: [_lacks_validation(run) for run in runs])
        self._is_advised = False
        self._progress: Progress | None = None
        if self._ranks.leads:
            title = runs[0].config.mode if len(runs) == 1 else "sweep"
            self._progress = Progress(title, total=self._num_steps, unit="steps", done=self._first_step)
            stack.enter_context(self._progress)
            for line in self._notes():
                self._progress.say(line)
        self._reports = {
            run: self._reports_of(run, stack, validates) for run, validates in zip(runs, self._to_validate, strict=True)
        }
        self._interrupts = stack.enter_context(Interrupts(heeded=self._ranks.leads))
        self._speed = Speed(self._ranks.world_size)

    def to_the_end(self, data: TrainingData) -> dict[Path, SweepResult]:
        """Train all runs to their last step; returns their results by folder."""
        for run, validates in zip(self._runs, self._to_validate, strict=True):
            self._after_step(run, validates=validates)
        batches = self._speed.timed(self._batches(data))
        for step in range(self._first_step, self._num_steps):
            if len(self._results) == len(self._runs):
                break
            with self._saved_when_stopped():
                batch = next(batches)
            if not self._alone:  # one copy to the device for all; a single run may take the batch in parts
                batch = self._for_all(batch)
            # A run whose checkpoint is of a later step joins when the stream gets there.
            current = [run for run in self._unfinished() if run.step == step]
            for run in current:
                with self._saved_when_stopped(within_step=run):
                    self._take(run, batch)
            self._tell(step + 1)
            with self._saved_when_stopped():
                for run in self._unfinished():
                    if run in current:
                        self._after_step(run, validates=run.is_validated)
                if self._interrupts.came and self._unfinished():
                    self._interrupts.end()
        return self._results

    def _batches(self, data: TrainingData) -> Iterator[Batch]:
        """This rank's parts of all batches to come."""
        stream = BatchStream(
            data.views,
            data.label_S,
            replace(data.order, rank=self._ranks.rank, num_ranks=self._ranks.world_size),
            first_step=self._first_step,
            num_steps=self._num_steps,
            workers=self._runs[0].config.workers,
        )
        return iter(stream)

    def _for_all(self, batch: Batch) -> Batch:
        """The batch on the device. A run with a teacher looks at its codes, which all others of that teacher share."""
        by_teacher = next((run for run in self._runs if run.data.teacher is not None), self._runs[0])
        return by_teacher.on_device(batch)

    def _unfinished(self) -> list[TrainingRun]:
        return [run for run in self._runs if run.config.out not in self._results]

    def _take(self, run: TrainingRun, batch: Batch) -> None:
        """Take one step of a run. In a sweep, a run whose loss is NaN or infinite is given up."""
        try:
            run.take(batch, self._speed, self._reports[run])
        except DivergedError as error:
            if self._alone:
                raise
            out = run.config.out
            write_file(out / GIVEN_UP_FILE, str(error).encode())
            self._results[out] = SweepResult(name=out.name, problem=str(error))
            self._reports[run].say(f"given up: {error}")

    def _after_step(self, run: TrainingRun, *, validates: bool) -> None:
        """Validate the run if `validates`, draw its maps if it is time, and finish it after its last step."""
        if validates:
            with self._speed.paused(), self._interrupts.at_once():
                run.validate(self._reports[run])
        if validates or run.step > self._restored_at[run]:
            with self._speed.paused():
                run.draw_maps(self._reports[run])
        if run.is_done:
            summary = self._ranks.on_leader(partial(run.finish, self._speed))
            self._results[run.config.out] = SweepResult(name=run.config.out.name, summary=summary)

    @contextmanager
    def _saved_when_stopped(self, within_step: TrainingRun | None = None) -> Generator[None]:
        """A context in which all runs are between two steps, except `within_step`, whose weights may be half changed.

        If it is interrupted or fails, those between two steps are saved.
        """
        try:
            yield
        except BaseException:
            if self._ranks.leads:
                # A run without a new step would only save its checkpoint again.
                whole = [run for run in self._unfinished() if run is not within_step]
                trained = [run for run in whole if run.step > self._restored_at[run]]
                sound = [run for run in trained if run.is_sound()]
                for run in sound:
                    run.save(self._speed)
                for run in trained:
                    outcome = "is saved" if run in sound else "is not saved: some weights are NaN or infinite"
                    self._reports[run].say(f"stopped after step {run.step}, which {outcome}")
            raise

    def _tell(self, num_steps: int) -> None:
        """Show the progress, every few steps."""
        if self._progress is not None and (num_steps % LOG_EVERY == 0 or num_steps == self._num_steps):
            losses = " ".join(f"{run.loss:.4g}" for run in self._runs)
            self._progress.advance(num_steps - self._progress.done, f"loss {losses}  {self._speed}")
            self._advise(self._progress)

    def _advise(self, progress: Progress) -> None:
        """Once, if a run waits for data: say how many processes could read ahead."""
        if self._is_advised or self._speed.training_s < ADVISES_AFTER_S:
            return
        self._is_advised = True
        waited = self._speed.values()["waited_for_data"]
        workers = min(_ENOUGH_WORKERS, num_processors() // self._ranks.local_world_size - 1)
        if waited > _MUCH_WAITING and workers > self._runs[0].config.workers:
            progress.say(
                f"NOTE: {waited:.0%} of the time is spent waiting for data. Stop and type the same command with "
                f"--workers {workers}: so many processes then read ahead, and the run goes on where it was."
            )

    def _reports_of(self, run: TrainingRun, stack: ExitStack, validates: bool) -> Reports:
        """Where a run's metrics and log lines go; logs the step at which it continues."""
        if self._progress is None:
            return Reports()
        metrics = stack.enter_context(MetricsLog(run.config.out, first_step=run.step, validates_first_step=validates))
        reports = Reports(metrics=metrics, progress=self._progress, prefix=self._prefix(run))
        if run.step:
            reports.say(f"continuing after step {run.step} of {run.num_steps}")
        return reports

    def _notes(self) -> Iterator[str]:
        """Lines for the user before the runs; what concerns all of them appears once."""
        lines = {run: (*filter(None, [run.data.about_teacher]), *run.notes) for run in self._runs}
        for note in dict.fromkeys(note for run in self._runs for note in lines[run]):
            concerned = [run for run in self._runs if note in lines[run]]
            if len(concerned) == len(self._runs):
                yield note
            else:
                yield from (self._prefix(run) + note for run in concerned)

    def _prefix(self, run: TrainingRun) -> str:
        return "" if self._alone else f"{run.config.out.name}: "


def _lacks_validation(run: TrainingRun) -> bool:
    """Whether a run still needs a validation at its step. At the last step it always does: `finish` needs the score."""
    return run.is_validated and (
        run.is_done or all(row["step"] != run.step for row in read_metrics(run.config.out, "validation"))
    )
