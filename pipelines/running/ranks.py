"""Several processes that work together, as `torchrun` starts them, and how those that train one student communicate."""

from __future__ import annotations

import os
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from importlib import import_module
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar, cast

from atcache.errors import AtcacheError, ConfigError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

Result = TypeVar("Result")

PATIENCE = timedelta(minutes=10)
"""How long a process waits for the others before it gives up. Saving, which one may have to do, takes less."""


class ProcessLostError(AtcacheError, RuntimeError):
    """Another process of the run has ended."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Ranks:
    """Which of a run's processes this one is. Rank 0 leads: only it saves the run and prints.

    An error that all ranks know of is raised by the leader only, so that it is printed once. The others end with
    `SystemExit(1)`.
    """

    rank: int = 0
    """0 .. world_size - 1, over all nodes."""
    world_size: int = 1
    """Processes in all."""
    local_rank: int = 0
    """The number of the process on its node, and so of its GPU."""
    local_world_size: int = 1
    """Processes on this node, which share its processors."""

    @classmethod
    def from_environment(cls) -> Ranks:
        """The ranks that torchrun has put into the environment; without torchrun, those of a single process.

        Raises:
            ConfigError: what stands in the environment is not numbers.
        """
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
        if any(name not in os.environ for name in names):
            return cls()
        try:
            rank, world_size, local_rank = (int(os.environ[name]) for name in names)
            local_world_size = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        except ValueError as error:
            values = ", ".join(f"{name}={os.environ[name]!r}" for name in names)
            raise ConfigError(f"{values}: expected whole numbers. Let torchrun set them, or unset them.") from error
        return cls(rank=rank, world_size=world_size, local_rank=local_rank, local_world_size=local_world_size)

    @property
    def is_alone(self) -> bool:
        """Whether this is the only process."""
        return self.world_size == 1

    @property
    def leads(self) -> bool:
        """Whether this is rank 0, which saves the run and prints."""
        return self.rank == 0

    def refuse_several(self, command: str) -> None:
        """Refuse to run `command` in several processes.

        Raises:
            ConfigError: there are several, and this one leads.
        """
        if self.is_alone:
            return
        self.refuse(
            ConfigError(
                f"{command} runs in one process but was started in {self.world_size}: call it without torchrun. Only "
                "`atcache build` and `atcache train` of one student can use several."
            )
        )

    def device_name(self, name: str) -> str:
        """The device of this process, if `name` was given to all.

        Raises:
            ConfigError: `name` is a single GPU.
        """
        if self.is_alone or name == "cpu":
            return name
        import torch

        if name not in ("auto", "cuda"):
            raise ConfigError(
                f"device {name!r} would be used by every process: give auto, cpu or cuda, so that each gets its own."
            )
        return "cpu" if name == "auto" and not torch.cuda.is_available() else f"cuda:{self.local_rank}"

    @contextmanager
    def connected(self, device: torch.device) -> Generator[None]:
        """Connect the processes inside this block: by nccl between GPUs, by gloo between CPUs.

        Nothing that averages gradients may outlive the block. Threads of it that still work when the interpreter ends
        would sometimes abort the process.

        Raises:
            ProcessLostError: another process has ended, so this one cannot continue.
        """
        if self.is_alone:
            yield
            return
        import torch
        import torch.distributed as dist

        # Import it before a group exists: its functions keep the group of that moment as the default of an argument.
        import_module("torch.distributed.nn")
        if device.type == "cuda":
            torch.cuda.set_device(device)
        try:
            dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=PATIENCE)
            yield
        except RuntimeError as error:
            if isinstance(error, AtcacheError) or not _is_of_a_lost_process(error):
                raise
            self.refuse(
                ProcessLostError(
                    "another process of this run has ended or does not answer, so this one ends too. What was stored "
                    "stays; type the same command again to continue."
                )
            )
        dist.destroy_process_group()

    def on_leader(self, function: Callable[[], Result]) -> Result:
        """Call `function` on the leader only, and return its result on all ranks.

        Raises:
            AtcacheError: what `function` raised.
        """
        if self.is_alone:
            return function()
        import torch.distributed as dist

        told: list[Any] = [_tried(function) if self.leads else None]
        dist.broadcast_object_list(told, src=0)
        result, problem = told[0]
        if problem is not None:
            self.refuse(problem)
        return result

    def on_all(self, function: Callable[[], Result]) -> Result:
        """Call `function` on all ranks, and return this rank's result once all have finished.

        Raises:
            AtcacheError: what `function` raised, on the lowest rank that failed.
        """
        if self.is_alone:
            return function()
        result, own_problem = _tried(function)
        for problem in self._gather(own_problem):
            if problem is not None:
                self.refuse(problem)
        return cast("Result", result)

    def refused_once(self, function: Callable[[], Result]) -> Result:
        """Call `function`, which does or refuses the same on all ranks, and return its result.

        Raises:
            AtcacheError: what `function` raised, on the leader only.
        """
        try:
            return function()
        except AtcacheError as error:
            self.refuse(error)

    def check_equal(self, value: object, message: str) -> None:
        """Refuse to continue if `value` is not the same on every rank.

        Raises:
            ConfigError: with `message`.
        """
        if not self.is_alone and len(set(map(repr, self._gather(value)))) > 1:
            self.refuse(ConfigError(message))

    def sum(self, values: Tensor) -> list[float]:
        """The sum over the ranks of each of `values`, which are on the device that was connected."""
        if not self.is_alone:
            import torch.distributed as dist

            values = values.clone()
            dist.all_reduce(values)
        return cast("list[float]", values.tolist())

    def refuse(self, problem: AtcacheError) -> NoReturn:
        """End all ranks because of a problem that all know: the leader raises it, the others exit in silence."""
        if self.leads:
            raise problem
        raise SystemExit(1)

    def _gather(self, value: object) -> list[Any]:
        """The value of each rank, in the order of ranks."""
        import torch.distributed as dist

        values: list[Any] = self.world_size * [None]
        dist.all_gather_object(values, value)
        return values


def _tried(function: Callable[[], Result]) -> tuple[Result | None, AtcacheError | None]:
    """What a function returned, or the error it raised."""
    try:
        return function(), None
    except AtcacheError as error:
        return None, error


def _is_of_a_lost_process(error: RuntimeError) -> bool:
    import torch.distributed as dist

    # gloo raises plain RuntimeErrors; they can only be told by its source file's name in their text.
    return isinstance(error, dist.DistError) or "gloo" in str(error).lower()
