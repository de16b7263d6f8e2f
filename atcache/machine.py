"""How many processors and how much memory this process may use: those of its container, not those of the machine.

Linux limits a process by its affinity (taskset, Slurm) and by its control groups (Docker, Kubernetes). A program that
counts the machine's processors instead starts 63 workers on 2 processors, or is killed for want of memory.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, MutableMapping
from pathlib import Path

from atcache.errors import ConfigError

_THREADS = "OMP_NUM_THREADS"
_GROUPS, _MOUNTED = Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")  # of control groups


def num_processors(*, list_of_groups: Path = _GROUPS, mounted: Path = _MOUNTED) -> int:
    """Processors that this process may use at once, at least 1: by affinity and by the quotas of its control groups.

    `dask.system.cpu_count` answers the same question, but it knows neither the groups above the process's own, where
    Kubernetes and Slurm set their limits, nor the usual folder of version 1.

    Args:
        list_of_groups: the file in which Linux lists the process's control groups.
        mounted: the folder of their hierarchies.
    """
    return min([_affinity(), *(max(1, math.ceil(quota)) for quota in _cpu_quotas(list_of_groups, mounted))])


def memory_nbytes() -> int:
    """Bytes of memory that this process may use: the machine's, or less by the limits of its control groups."""
    physical_nbytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return min([physical_nbytes, *_memory_limits()])


def kept_nbytes(keep_mib: int, workers: int) -> int:
    """Bytes in which each process that reads keeps what it has read, if all of them may keep `keep_mib` MiB.

    Raises:
        ConfigError: there is not so much memory.
    """
    if keep_mib * 2**20 > memory_nbytes():
        raise ConfigError(
            f"keep_mib={keep_mib}: this process may use {memory_nbytes() // 2**20} MiB of memory, and needs some for "
            "other things. Keep less (0 keeps nothing), or raise the limit of the container."
        )
    return keep_mib * 2**20 // max(1, workers)


def limit_threads(
    environment: MutableMapping[str, str], *, list_of_groups: Path = _GROUPS, mounted: Path = _MOUNTED
) -> None:
    """Make torch and BLAS, which know the affinity but no quota, start no more threads than there are processors.

    It has an effect only before they are imported, and none where the user has set the number of threads.

    Args:
        environment: where the number is set, such as `os.environ`.
        list_of_groups: as for `num_processors`.
        mounted: as for `num_processors`.
    """
    processors = num_processors(list_of_groups=list_of_groups, mounted=mounted)
    if processors < _affinity():
        environment.setdefault(_THREADS, str(processors))


def _affinity() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1  # no Linux


def _cpu_quotas(list_of_groups: Path = _GROUPS, mounted: Path = _MOUNTED) -> Iterator[float]:
    """Processors by each group that has a quota."""
    for folder in _groups("cpu", list_of_groups, mounted):
        quota = _read(folder / "cpu.cfs_quota_us")
        period = _read(folder / "cpu.cfs_period_us")
        if quota and period and int(quota[0]) > 0 and int(period[0]) > 0:  # a quota of -1 is none
            yield int(quota[0]) / int(period[0])
    for folder in _groups("", list_of_groups, mounted):
        limits = _read(folder / "cpu.max")  # such as "150000 100000", or "max 100000" for none
        if len(limits) == 2 and limits[0].isdecimal() and int(limits[1]) > 0:
            yield int(limits[0]) / int(limits[1])


def _memory_limits(list_of_groups: Path = _GROUPS, mounted: Path = _MOUNTED) -> Iterator[int]:
    """Bytes by each group that has a limit; without one, version 1 names more than any machine has."""
    for limit in (
        *(_read(folder / "memory.limit_in_bytes") for folder in _groups("memory", list_of_groups, mounted)),
        *(_read(folder / "memory.max") for folder in _groups("", list_of_groups, mounted)),
    ):
        if limit and limit[0].isdecimal():  # not "max"
            yield int(limit[0])


def _groups(controller: str, list_of_groups: Path, mounted: Path) -> Iterator[Path]:
    """Folders of the control groups that this process is in, innermost first.

    Args:
        controller: of a hierarchy of version 1, or "" for version 2.
        list_of_groups: lines such as "4:cpu,cpuacct:/docker/abc", or "0::/user.slice" for version 2.
        mounted: where the hierarchies are.
    """
    for line in _read_lines(list_of_groups):
        _, _, rest = line.partition(":")
        controllers, _, group = rest.partition(":")
        if controller not in controllers.split(","):
            continue
        for folder in (mounted / controller, *([] if controller else [mounted / "unified"])):
            # In a container the group's own folder may be the root of what is mounted, which is the last one here.
            inside = (folder / group.lstrip("/"), *(folder / group.lstrip("/")).parents)
            yield from (one for one in inside if one.is_relative_to(folder))


def _read(path: Path) -> list[str]:
    """The words in a file of the kernel; none if there is no such file."""
    return " ".join(_read_lines(path)).split()


def _read_lines(path: Path) -> list[str]:
    try:
        return path.read_text().splitlines()
    except OSError:
        return []
