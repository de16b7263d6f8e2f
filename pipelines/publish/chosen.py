"""The blocks and views that a pull takes, as a cache of their own: its layout, its samples, and whose shards it has.

Shards are taken whole and unchanged. So samples are chosen by whole blocks, and views from the first on: a view is
known by its number, from which more views of the same samples are drawn when a cache grows. Pure functions.
"""

from __future__ import annotations

import glob
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np

from atcache.errors import ConfigError, SourceError
from atcache.images.tars import expand_braces
from atcache.store.layout import StoreLayout, Task
from atcache.store.parts import append_part, take_rows

if TYPE_CHECKING:
    from atcache.images.source import SampleIndex


@dataclass(frozen=True, kw_only=True, slots=True)
class Chosen:
    """A part of a cache, as a cache of its own."""

    layout: StoreLayout
    samples: SampleIndex
    blocks: tuple[int, ...]
    """The block of the whole cache that each of its blocks is."""
    num_left_out: int
    """Samples of the chosen tars that it lacks, because their blocks hold samples of other tars too."""

    def tasks(self, whole: StoreLayout) -> dict[Task, Task]:
        """Its tasks, and of each the task of the whole cache that wrote the same shards."""
        return {task: whole.task(task.view, self.blocks[task.block]) for task in self.layout.tasks()}


def choose(
    layout: StoreLayout, samples: SampleIndex, *, num_views: int | None = None, tar_names: Sequence[str] = ()
) -> Chosen:
    """The part of a cache that has these views and tars.

    Args:
        layout: of the whole cache.
        samples: its sample table.
        num_views: how many views, from the first on; None for all.
        tar_names: names of tars, with wildcards; none for all.

    Raises:
        ConfigError: there are not so many views, a name is no tar's, or no block holds these tars only.
    """
    num_views = layout.num_views if num_views is None else num_views
    if num_views > layout.num_views:
        raise ConfigError(f"views={num_views}: this cache has {layout.num_views}. Give fewer.")
    of_views = layout if num_views == layout.num_views else _smaller(layout, num_views=num_views)
    if not tar_names:
        return Chosen(layout=of_views, samples=samples, blocks=tuple(range(layout.num_blocks)), num_left_out=0)
    is_wanted_N = _find_tars([tar.name for tar in samples.tars], tar_names)
    first_view = [layout.task(0, block) for block in range(layout.num_blocks)]
    is_wanted_S = is_wanted_N[samples.tar_S]
    taken = [task for task in first_view if is_wanted_S[task.start : task.stop].all()]
    num_wanted = sum(int(np.count_nonzero(is_wanted_S[task.start : task.stop])) for task in first_view)
    if not taken:
        raise ConfigError(_say_what_shares(samples, first_view, is_wanted_N, is_wanted_S))
    stops, table = _join_blocks(samples, taken, layout.samples_per_shard)
    return Chosen(
        layout=_smaller(of_views, num_samples=stops[-1], part_stops=stops if len(stops) > 1 else ()),
        samples=table,
        blocks=tuple(task.block for task in taken),
        num_left_out=num_wanted - sum(task.num_samples for task in taken),
    )


def _smaller(layout: StoreLayout, **changes: Any) -> StoreLayout:  # noqa: ANN401 - fields of a layout
    """The layout that a build of so much would have: with fewer tasks, their records may need no joining."""
    return replace(layout, **changes, records_per_file=1).with_joined_records()


def _find_tars(names: Sequence[str], patterns: Sequence[str]) -> np.ndarray:
    """Which tars are meant, bool for each name."""
    is_wanted_N = np.zeros(len(names), bool)
    numbers = {name: number for number, name in enumerate(names)}
    for one in (one for pattern in patterns for one in _spelled(pattern)):
        if one in numbers:
            matches = [numbers[one]]
        else:
            matches = [numbers[name] for name in names if fnmatchcase(name, one)] if glob.has_magic(one) else []
        if not matches:
            raise ConfigError(
                f"tars={one!r}: this cache has no such tar. It has {len(names)}, from {names[0]} to {names[-1]}."
            )
        is_wanted_N[matches] = True
    return is_wanted_N


def _spelled(pattern: str) -> list[str]:
    """The names that a pattern stands for, still with wildcards."""
    try:
        return expand_braces(pattern)
    except SourceError as error:
        raise ConfigError(f"tars={error}") from error


def _say_what_shares(
    samples: SampleIndex, blocks: Sequence[Task], is_wanted_N: np.ndarray, is_wanted_S: np.ndarray
) -> str:
    """Why no block can be taken, and which tars would have to be taken too."""
    touched = [samples.tar_S[task.start : task.stop] for task in blocks if is_wanted_S[task.start : task.stop].any()]
    numbers: list[int] = np.unique(np.concatenate(touched)).tolist()
    others = [samples.tars[number].name for number in numbers if not is_wanted_N[number]]
    return (
        f"tars: shards are fetched whole, and each that holds samples of these tars holds some of other tars too. Name "
        f"these also: {', '.join(others[:3])}{f' and {len(others) - 3} more' if len(others) > 3 else ''}."
    )


def _join_blocks(
    samples: SampleIndex, blocks: Sequence[Task], samples_per_shard: int
) -> tuple[tuple[int, ...], SampleIndex]:
    """The row after the last sample of each part, and the table, of a cache that consists of these blocks."""
    # A block that is not full ends a part of the whole cache, and must end one here.
    ends = [number for number, task in enumerate(blocks, 1) if task.num_samples < samples_per_shard]
    cuts = [0, *ends] if ends and ends[-1] == len(blocks) else [0, *ends, len(blocks)]
    parts = [blocks[start:stop] for start, stop in pairwise(cuts)]
    tables = [take_rows(samples, np.concatenate([np.arange(task.start, task.stop) for task in part])) for part in parts]
    table, stops = tables[0], [len(tables[0].keys_S)]
    for part in tables[1:]:
        table = append_part(table, part, samples_per_shard)
        stops.append(len(table.keys_S))
    return tuple(stops), table
