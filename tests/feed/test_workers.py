"""Worker processes hand over batches whole and in order, keep their memory, and end with the process they work for."""

from __future__ import annotations

import multiprocessing
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch.utils.data import Dataset

from atcache.cache.slots import Slot, filling, take_memory
from atcache.cache.stacking import Stack
from atcache.errors import ConfigError, WorkerLostError
from atcache.feed.messages import pack, unpack
from atcache.feed.workers import read_ahead


class Made(NamedTuple):
    number: int
    pid: int
    is_in_slot: bool
    codes_BTC: torch.Tensor
    row_B: np.ndarray
    empty: torch.Tensor


class Batches(Dataset):
    """Batches that grow with their number."""

    def __init__(self, num_rows=lambda number: 50 + 10 * number) -> None:
        self._num_rows = num_rows

    def __getitem__(self, number):
        rows = self._num_rows(number)
        stack = Stack(rows)
        for row in range(rows):
            stack.add(np.full((40, 30), 1000 * number + row, np.int32).T)
        codes_BTC = stack.tensor
        # What the memory is does not show in a tensor: ask for more, and see whether it lies behind.
        more = take_memory(1)
        is_in_slot = more is not None and 0 < more.ctypes.data - codes_BTC.data_ptr() < codes_BTC.nbytes + 64
        return Made(number, os.getpid(), is_in_slot, codes_BTC, np.arange(rows * 100), torch.empty(0, 3))


def assert_is(batch, number):
    expected = Batches()[number]
    assert batch.number == number
    assert torch.equal(batch.codes_BTC, expected.codes_BTC)
    assert batch.codes_BTC.stride() == expected.codes_BTC.stride(), "codes keep their order in memory"
    assert np.array_equal(batch.row_B, expected.row_B)
    assert batch.empty.shape == (0, 3)


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_batches_come_whole_and_in_order_and_stay_as_they_are(workers):
    for number, batch in enumerate(list(read_ahead(Batches(), range(9), workers=workers))):
        assert_is(batch, number)


def test_batches_are_made_in_memory_that_is_kept():
    alike = Batches(lambda _: 50)
    found = list(read_ahead(alike, range(8), workers=1))
    assert [batch.is_in_slot for batch in found] == [False] * 2 + [True] * 6, "the first of each slot shows its size"
    assert {batch.pid for batch in found} != {os.getpid()}


def test_a_deleted_file_serves_where_files_in_memory_are_unknown(monkeypatch):
    monkeypatch.delattr(os, "memfd_create")  # as on macOS
    for number, batch in enumerate(read_ahead(Batches(), range(4), workers=2)):
        assert_is(batch, number)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="pinning takes a GPU")
def test_batches_are_pinned_for_a_gpu_and_stay_as_they_are():
    for number, batch in enumerate(list(read_ahead(Batches(), range(9), workers=2, pin_memory=True))):
        assert batch.codes_BTC.is_pinned()
        assert_is(batch, number)


def test_numbers_are_taken_only_when_they_are_needed():
    taken = []
    numbers = (taken.append(number) or number for number in range(100))
    batches = read_ahead(Batches(lambda _: 2), numbers, workers=2)
    assert [next(batches).number for _ in range(3)] == [0, 1, 2]
    assert len(taken) <= 4 + 3
    batches.close()
    assert not multiprocessing.active_children()


class Failing(Dataset):
    def __init__(self, error) -> None:
        self._error = error

    def __getitem__(self, number):
        if number == 2:
            raise self._error
        return number


def test_an_error_comes_as_it_was_raised_at_its_turn():
    batches = read_ahead(Failing(ConfigError("one sentence")), range(4), workers=2)
    assert [next(batches), next(batches)] == [0, 1]
    with pytest.raises(ConfigError, match=r"^one sentence$") as raised:
        next(batches)
    assert not hasattr(raised.value, "__notes__")


def test_a_bug_comes_with_where_it_was_raised():
    with pytest.raises(KeyError, match="no such key") as raised:
        list(read_ahead(Failing(KeyError("no such key")), range(4), workers=2))
    assert "in __getitem__" in raised.value.__notes__[0]


class Ending(Dataset):
    def __getitem__(self, number):
        if number == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        return number


def test_a_killed_worker_is_told_of_in_a_sentence():
    with pytest.raises(WorkerLostError, match=r"ended by signal 9, perhaps for want of memory. Use fewer --workers"):
        list(read_ahead(Ending(), range(9), workers=2))


def test_workers_end_with_a_killed_parent():
    code = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "from test_workers import Batches\n"
        "from atcache.feed.workers import read_ahead\n"
        "batches = read_ahead(Batches(lambda _: 2), iter(int, 1), workers=3)\n"
        "pids = {next(batches).pid for _ in range(12)}\n"
        "print(*pids, flush=True)\n"
        "sys.stdin.read()\n"
    )
    command = [sys.executable, "-c", code, str(Path(__file__).parent)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as parent:
        pids = [int(pid) for pid in parent.stdout.readline().split()]
        assert len(pids) == 3
        parent.kill()
        parent.wait()
    give_up_s = time.monotonic() + 60
    while any(is_running(pid) for pid in pids):
        assert time.monotonic() < give_up_s
        time.sleep(0.05)


def is_running(pid) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@settings(deadline=None)
@given(
    sizes=st.lists(st.integers(0, 20_000), max_size=4),
    axes=st.permutations(range(3)),
    dtype=st.sampled_from([torch.uint8, torch.int16, torch.bfloat16, torch.bool, torch.int64]),
    slot_size=st.sampled_from([None, 1, 40_000]),
    num_in_slot=st.integers(0, 2),
)
def test_any_arrays_are_handed_over_in_their_order(sizes, axes, dtype, slot_size, num_in_slot):
    slot = None if slot_size is None else Slot.create(slot_size)
    numbers = torch.Generator().manual_seed(0)
    with filling(slot):
        batch = []
        for number, size in enumerate(sizes):
            memory = take_memory(2 * size) if number < num_in_slot else None
            content = np.empty(2 * size, np.uint8) if memory is None else memory
            content[:] = number
            batch.append(content)
        tensor = (torch.randint(0, 2, (5, 7, 30), generator=numbers).to(dtype)).permute(*axes)
        batch += [tensor, tensor[1:, ::2], tensor[0, 0, 0], {"text": "x" * 9000}]
        message, filled = pack(batch, slot)
    back = unpack(message, filled, pin_memory=False)
    assert len(message.pickled) < 30_000 + 9000
    for ours, theirs in zip(back[:-1], batch[:-1], strict=True):
        assert torch.equal(torch.as_tensor(ours), torch.as_tensor(theirs))
    assert back[len(sizes)].stride() == tensor.stride()
    assert back[len(sizes)].dtype == dtype
    assert back[-1] == batch[-1]
    for each in {slot, filled} - {None}:
        each.close()


def test_memory_that_cannot_be_had_is_told_of_in_a_sentence():
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, limits[1]))  # for files without a name too
    try:
        with pytest.raises(
            ConfigError, match=r"^16.8 MB of memory for a batch cannot be shared .*: File too large. Use"
        ):
            Slot.create(2**24)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
