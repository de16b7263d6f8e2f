"""Several processes that work together, as `torchrun` starts them; how those that train one student talk."""

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
"""How long a process waits for the others before it gives up: longer than one of them may need to save."""


class ProcessLostError(AtcacheError, RuntimeError):
    """Another process of the run has ended."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Ranks:
    """Which of the processes of a run this one is. The first, rank 0, leads: it alone writes and speaks.

    An error that all ranks learn of is raised by the leader alone; the others end with `SystemExit(1)`, so that it is
    told once.
    """

    rank: int = 0
    """0 .. world_size - 1, over all nodes."""
    world_size: int = 1
    """Processes in all."""
    local_rank: int = 0
    """Which process of this node, and so which GPU."""
    local_world_size: int = 1
    """Processes of this node, which share its processors."""

    @classmethod
    def from_environment(cls) -> Ranks:
        """What torchrun has put into the environment; one process without it.

        Raises:
            ConfigError: the environment holds no numbers.
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
        """Whether this is the process that writes and speaks."""
        return self.rank == 0

    def refuse_several(self, command: str) -> None:
        """Refuse to run `command` in several processes.

        Raises:
            ConfigError: there are several, and this is the first.
        """
        if self.is_alone:
            return
        self.refuse(
            ConfigError(
                f"{command} runs in one process and was started in {self.world_size}: call it without torchrun. Only "
                "`atcache build` and `atcache train` of one student take several."
            )
        )

    def device_name(self, name: str) -> str:
        """The device of this process, where all were asked for `name`.

        Raises:
            ConfigError: one GPU was named for all.
        """
        if self.is_alone or name == "cpu":
            return name
        import torch

        if name not in ("auto", "cuda"):
            raise ConfigError(
                f"device {name!r} would be every process's: give auto, cpu or cuda, and each has its own."
            )
        return "cpu" if name == "auto" and not torch.cuda.is_available() else f"cuda:{self.local_rank}"

    @contextmanager
    def connected(self, device: torch.device) -> Generator[None]:
        """The processes can talk to each other: by nccl from GPUs, by gloo from CPUs.

        Nothing that averages gradients may outlive it: its threads end with it, or the interpreter's end finds one at
        work now and then and the process aborts.

        Raises:
            ProcessLostError: another process has ended, so that this one cannot go on.
        """
        if self.is_alone:
            yield
            return
        import torch
        import torch.distributed as dist

        # Its functions' defaults hold the group that exists when it is first imported, for ever: here that is none.
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
        """What `function` returns on the leader, on all ranks; the others do not call it.

        Raises:
            AtcacheError: what it raised.
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
        """What `function` returns on this rank, once it has returned on all of them.

        Raises:
            AtcacheError: what it raised on the first rank where it did.
        """
        if self.is_alone:
            return function()
        result, own_problem = _tried(function)
        for problem in self._gather(own_problem):
            if problem is not None:
                self.refuse(problem)
        return cast("Result", result)

    def refused_once(self, function: Callable[[], Result]) -> Result:
        """What `function` returns, where all ranks call it alike and need nothing from each other.

        Raises:
            AtcacheError: what it raised, on the leader alone.
        """
        try:
            return function()
        except AtcacheError as error:
            self.refuse(error)

    def check_equal(self, value: object, message: str) -> None:
        """Refuse to go on where `value` is not the same on every rank.

        Raises:
            ConfigError: with `message`.
        """
        if not self.is_alone and len(set(map(repr, self._gather(value)))) > 1:
            self.refuse(ConfigError(message))

    def sum(self, values: Tensor) -> list[float]:
        """The sums of each of `values` over the ranks; they lie on the device that was connected."""
        if not self.is_alone:
            import torch.distributed as dist

            values = values.clone()
            dist.all_reduce(values)
        return cast("list[float]", values.tolist())

    def refuse(self, problem: AtcacheError) -> NoReturn:
        """End all ranks for a problem that all know: the leader raises it, the others leave in silence."""
        if self.leads:
            raise problem
        raise SystemExit(1)

    def _gather(self, value: object) -> list[Any]:
        """Each rank's value, in their order."""
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

    # gloo's errors are bare RuntimeErrors; they name its source file.
    return isinstance(error, dist.DistError) or "gloo" in str(error).lower()
