"""What a seed decides: the order of samples, a subset of them, the random numbers of a step. Pure functions, for ever.

They rest on raw Philox words and BLAKE2, not on `Generator.permutation` and its like, which libraries may change.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from atcache.errors import ConfigError


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class SampleOrder:
    """One endless stream of (sample, epoch): epoch 0's permutation, then epoch 1's, and so on, cut into batches.

    So every sample comes once an epoch, all batches are full, and a run that stops after step N continues with batch N.
    """

    sample_S: np.ndarray
    """The samples to train on, int64."""
    seed: int
    """Another seed, another order."""
    batch_size: int
    """Samples a step, over all processes."""

    def batch(self, step: int) -> list[tuple[int, int]]:
        """The (sample, epoch) pairs of one step; equal for equal arguments, everywhere."""
        num_samples = len(self.sample_S)
        pairs: list[tuple[int, int]] = []
        position, stop = step * self.batch_size, (step + 1) * self.batch_size
        while position < stop:
            epoch, start = divmod(position, num_samples)
            end = min(num_samples, start + stop - position)
            order = epoch_permutation(num_samples, self.seed, epoch)[start:end]
            pairs += [(sample, epoch) for sample in self.sample_S[order].tolist()]
            position += end - start
        return pairs


@lru_cache(maxsize=4)
def epoch_permutation(num_samples: int, seed: int, epoch: int) -> np.ndarray:
    """The order of `num_samples` things in an epoch, int64, read-only.

    The last few orders are remembered, since every step of an epoch asks for the same one.
    """
    words = np.random.Philox(key=_hash("order", seed, epoch)).random_raw(num_samples)
    order = np.argsort(words, kind="stable")
    order.flags.writeable = False
    return order


def choose_subset(label_S: np.ndarray, eligible_S: np.ndarray, num_samples: int, seed: int) -> np.ndarray:
    """`num_samples` of the eligible samples, as evenly over the classes as they go, ascending int64.

    Args:
        label_S: class of every sample of the source.
        eligible_S: rows that may be chosen.
        num_samples: how many.
        seed: which ones.

    Raises:
        ConfigError: there are fewer.
    """
    if num_samples > len(eligible_S):
        raise ConfigError(f"subset={num_samples}: only {len(eligible_S)} samples can be used. Choose at most that.")
    shuffled = eligible_S[epoch_permutation(len(eligible_S), seed, -1)]
    # A sample's rank within its class: all first ones of a class come before all second ones.
    _, class_S, counts = np.unique(label_S[shuffled], return_inverse=True, return_counts=True)
    rank = np.empty(len(shuffled), np.int64)
    rank[np.argsort(class_S, kind="stable")] = np.arange(len(shuffled)) - np.repeat(np.cumsum(counts) - counts, counts)
    return np.sort(shuffled[np.argsort(rank, kind="stable")[:num_samples]])


def step_seed(seed: int, step: int) -> int:
    """The seed of all that one training step draws (dropout, masks): 63 bits, unlike those of other seeds and steps."""
    return _hash("step", seed, step) >> 65


def _hash(purpose: str, seed: int, number: int) -> int:
    """128 bits that share nothing between purposes, seeds and numbers."""
    return int.from_bytes(hashlib.blake2b(f"{purpose} {seed} {number}".encode(), digest_size=16).digest(), "little")
