"""Tests of several processes start them with these: as torchrun does, or forked, which is quicker."""

from __future__ import annotations

import multiprocessing
import os
import pty
import socket
import subprocess
import sys
from pathlib import Path

import torch

from atcache.errors import AtcacheError

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


def start(arguments) -> subprocess.Popen[str]:
    """torchrun with two processes."""
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen([*TORCHRUN, *arguments], env=env, text=True, **pipes)


def workers_of(pid) -> list[int]:
    """The processes that torchrun started."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [int(child) for child in children if rank_of(int(child)) is not None]


def rank_of(pid) -> int | None:
    variables = Path(f"/proc/{pid}/environ").read_bytes().decode().split("\0")
    ranks = [variable.removeprefix("RANK=") for variable in variables if variable.startswith("RANK=")]
    return int(ranks[0]) if ranks else None


def in_two_processes(function) -> list[int | None]:
    """Exit codes of two processes that call `function` as torchrun's would; forked, which spares them the imports."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=_call_as, args=(rank, place, function)) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        process.kill()
    return [process.exitcode for process in processes]


def _call_as(rank, place, function):
    os.environ |= {**place, "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    torch.set_num_threads(1)
    try:
        function()
    except AtcacheError as error:
        print("told:", error, file=sys.stderr, flush=True)
        raise SystemExit(3) from error


def run_on_a_terminal(code: str) -> tuple[subprocess.CompletedProcess[bytes], bytes]:
    """A Python process whose stderr is a terminal, and what it showed there."""
    ours, theirs = pty.openpty()
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "120"}
    done = subprocess.run([sys.executable, "-c", code], stderr=theirs, stdout=subprocess.PIPE, env=environment)
    os.close(theirs)
    shown = b""
    # Linux ends the reading of a closed terminal with an error.
    try:
        while part := os.read(ours, 65536):
            shown += part
    except OSError:
        pass
    os.close(ours)
    return done, shown
