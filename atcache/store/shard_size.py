"""How many samples a shard should have, and how many layers a chunk. Pure functions of numbers."""

from __future__ import annotations

from atcache.store.layout import MAX_FOLDER_ENTRIES

MAX_SAMPLES_PER_SHARD = 8192
"""The most that a plan gives a shard: it bounds the index of a shard, and the work lost, if views are tiny."""


def plan_samples_per_shard(
    nbytes_per_view: int, num_samples: int, target_nbytes: int = 256 * 2**20, max_samples: int = MAX_SAMPLES_PER_SHARD
) -> int:
    """How many samples a task takes, so that its shard has about `target_nbytes`.

    Args:
        nbytes_per_view: bytes of one view of one sample, on disk or before compression: the caller chooses.
        num_samples: samples in the source; a shard is never larger.
        target_nbytes: larger shards mean fewer files, and more work lost when a build dies.
        max_samples: see `MAX_SAMPLES_PER_SHARD`. Shards have more if a view would have over `MAX_FOLDER_ENTRIES`.

    >>> plan_samples_per_shard(1_500_000, 1_281_167)
    178
    >>> plan_samples_per_shard(1_500_000, 14_197_122)
    1420
    """
    planned = max(1, min(target_nbytes // max(1, nbytes_per_view), num_samples, max_samples))
    return max(planned, -(-num_samples // MAX_FOLDER_ENTRIES))


def plan_layers_per_chunk(layer_nbytes: int, num_layers: int, target_nbytes: int = 32 * 2**10) -> int:
    """Layers in a chunk: the largest divisor of `num_layers` whose chunk stays within `target_nbytes`, or 1.

    A reader decompresses at least one chunk, so a large layer has a chunk of its own. Small layers share one, because
    compressors do badly on a few hundred bytes.

    >>> plan_layers_per_chunk(4096, 12)
    6
    """
    fitting = [count for count in range(1, num_layers + 1) if num_layers % count == 0]
    return max([count for count in fitting if count * layer_nbytes <= target_nbytes], default=1)


def settle_samples_per_shard(wanted: int, num_samples: int) -> int:
    """The samples of a shard where the user says how many. A shard may have room for more than there are, since caches
    that grow or are merged keep it; but not much more, as each shard has an index of all its places.
    """
    return min(wanted, max(num_samples, MAX_SAMPLES_PER_SHARD))
