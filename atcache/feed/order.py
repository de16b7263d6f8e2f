"""What a seed decides: the order of samples, a subset of them, the random numbers of a step.

These pure functions must never change, or old runs could not resume. They use raw Philox words and BLAKE2, not
`Generator.permutation` and the like, which libraries may change.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from atcache.choices import SHUFFLES, Shuffle
from atcache.errors import ConfigError

# These must never change either, as orders depend on them. A disk reads a block at once. A window is shuffled as a
# whole; the page cache should have room for two.
BLOCK_SAMPLES = 32
WINDOW_BLOCKS = 128


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class SampleOrder:
    """One endless stream of (sample, epoch): epoch 0's permutation, then epoch 1's, and so on, cut into batches.

    So every sample comes once per epoch, all batches are full, and a run that stops after N steps continues with
    batch N.
    """

    sample_S: np.ndarray
    """The samples to train on, int64."""
    seed: int
    """Another seed gives another order."""
    batch_size: int
    """Samples a step, over all processes."""
    shuffle: Shuffle = "global"
    """"block" permutes blocks of `BLOCK_SAMPLES` neighbouring rows, and then the samples of each window of
    `WINDOW_BLOCKS` such blocks: reads stay within one window until all its samples are read."""
    rank: int = 0
    """Which of `num_ranks` equal parts of each batch this process takes."""
    num_ranks: int = 1
    """Processes that train together; a divisor of `batch_size`."""

    def __post_init__(self) -> None:
        if self.shuffle not in SHUFFLES:
            raise ConfigError(f"shuffle={self.shuffle!r}: expected one of {', '.join(SHUFFLES)}.")

    @property
    def identity(self) -> dict[str, Any]:
        """What another order must have in common with this one to be the same, as JSON."""
        samples = np.ascontiguousarray(self.sample_S, "<i8")
        return {
            "samples": hashlib.blake2b(samples.view(np.uint8).data, digest_size=16).hexdigest(),
            "seed": self.seed,
            "batch_size": self.batch_size,
            "shuffle": self.shuffle,
        }

    def num_steps(self, epochs: float) -> int:
        """Steps that show each sample `epochs` times. The last of them may show the first samples of the next epoch."""
        # Rounded first, or a rounding error such as in 30.000000000000004 would cost another step.
        return math.ceil(round(epochs * len(self.sample_S) / self.batch_size, 9))

    def batch(self, step: int) -> list[tuple[int, int]]:
        """This rank's (sample, epoch) pairs of one step; the same on every machine.

        The parts of all ranks, one after another, are the batch that one process alone would take.
        """
        pairs: list[tuple[int, int]] = []
        for epoch, start, stop in self._stretches(step):
            pairs += [(sample, epoch) for sample in self.sample_S[self._epoch_order(epoch)[start:stop]].tolist()]
        return pairs

    def windows(self, step: int) -> list[tuple[int, int]]:
        """The (epoch, window) pairs that a step's samples lie in; none under "global"."""
        if self.shuffle == "global":
            return []
        found: list[tuple[int, int]] = []
        for epoch, start, stop in self._stretches(step):
            ends_W = _block_order(self, epoch)[1]
            first, last = np.searchsorted(ends_W, [start, stop - 1], side="right").tolist()
            found += [(epoch, window) for window in range(first, last + 1)]
        return found

    def window_samples(self, epoch: int, window: int) -> np.ndarray:
        """The samples of one window, ascending int64; none after an epoch's last window."""
        order, ends_W = _block_order(self, epoch)
        if window >= len(ends_W):
            return self.sample_S[:0]
        start = 0 if window == 0 else int(ends_W[window - 1])
        return np.sort(self.sample_S[order[start : int(ends_W[window])]])

    def _stretches(self, step: int) -> list[tuple[int, int, int]]:
        """Where this rank's part of a step is: (epoch, start, stop) in the order of one epoch, or of several."""
        num_samples = len(self.sample_S)
        part_size = self.batch_size // self.num_ranks
        position = step * self.batch_size + self.rank * part_size
        stop = position + part_size
        stretches: list[tuple[int, int, int]] = []
        while position < stop:
            epoch, start = divmod(position, num_samples)
            end = min(num_samples, start + stop - position)
            stretches.append((epoch, start, end))
            position += end - start
        return stretches

    def _epoch_order(self, epoch: int) -> np.ndarray:
        if self.shuffle == "global":
            return epoch_permutation(len(self.sample_S), self.seed, epoch)
        return _block_order(self, epoch)[0]


@lru_cache(maxsize=2)
def _block_order(order: SampleOrder, epoch: int) -> tuple[np.ndarray, np.ndarray]:
    """The order of an epoch's samples, and where each window of it ends; read-only."""
    block_S = order.sample_S // BLOCK_SAMPLES
    is_block_there = np.zeros(block_S.max() + 1, bool)
    is_block_there[block_S] = True
    num_blocks = int(np.count_nonzero(is_block_there))
    place_of_block = np.argsort(epoch_permutation(num_blocks, order.seed, epoch, purpose="blocks"), kind="stable")
    window_of_block = np.zeros(len(is_block_there), np.int64)
    window_of_block[is_block_there] = place_of_block // WINDOW_BLOCKS
    window_S = window_of_block[block_S]
    if num_blocks <= 2**16 * WINDOW_BLOCKS:
        window_S = window_S.astype(np.uint16)  # sorted six times as fast
    # A permutation of all samples, stably sorted by window, permutes each window.
    shuffled = epoch_permutation(len(block_S), order.seed, epoch)
    places = shuffled[np.argsort(window_S[shuffled], kind="stable")]
    ends_W = np.cumsum(np.bincount(window_S))
    for array in (places, ends_W):
        array.flags.writeable = False
    return places, ends_W


@lru_cache(maxsize=2)
def epoch_permutation(num_samples: int, seed: int, epoch: int, *, purpose: str = "order") -> np.ndarray:
    """The order of `num_samples` things in an epoch, int32 if that is enough, else int64; read-only.

    The last two orders are remembered, since every step of an epoch asks for the same one. Each process that reads has
    its own, so they are as small as can be.
    """
    words = np.random.Philox(key=_hash(purpose, seed, epoch)).random_raw(num_samples)
    order = np.argsort(words, kind="stable").astype(np.int32 if num_samples < 2**31 else np.int64, copy=False)
    order.flags.writeable = False
    return order


def choose_subset(label_S: np.ndarray, eligible_S: np.ndarray, num_samples: int, seed: int) -> np.ndarray:
    """`num_samples` of the eligible samples, as even over the classes as possible, ascending int64.

    Args:
        label_S: class of every sample of the source.
        eligible_S: rows that may be chosen.
        num_samples: how many.
        seed: decides which ones.

    Raises:
        ConfigError: fewer are eligible.
    """
    if num_samples > len(eligible_S):
        raise ConfigError(f"subset={num_samples}: only {len(eligible_S)} samples can be used. Choose at most that.")
    shuffled = eligible_S[epoch_permutation(len(eligible_S), seed, -1)]  # no epoch of training has this order
    # A sample's rank within its class. By rank, the first sample of every class comes before any second one.
    _, class_S, counts = np.unique(label_S[shuffled], return_inverse=True, return_counts=True)
    rank = np.empty(len(shuffled), np.int64)
    rank[np.argsort(class_S, kind="stable")] = np.arange(len(shuffled)) - np.repeat(np.cumsum(counts) - counts, counts)
    return np.sort(shuffled[np.argsort(rank, kind="stable")[:num_samples]])


def step_seed(seed: int, step: int) -> int:
    """The seed of all that one training step draws (dropout, masks): 63 bits, different for each seed and step."""
    return _hash("step", seed, step) >> 65


def _hash(purpose: str, seed: int, number: int) -> int:
    """128 bits that are different for each purpose, seed and number."""
    return int.from_bytes(hashlib.blake2b(f"{purpose} {seed} {number}".encode(), digest_size=16).digest(), "little")
