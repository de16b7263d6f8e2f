"""Processors and memory are those that the process may use: by affinity and by its control groups."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from atcache.errors import ConfigError
from atcache.machine import (
    _cpu_quotas,
    _groups,
    _memory_limits,
    kept_nbytes,
    limit_threads,
    memory_nbytes,
    num_processors,
)

SHOW = "from atcache.machine import *; print(num_processors(), memory_nbytes())"


def shown(*, affinity: set[int] | None = None, group: Path | None = None) -> tuple[int, int]:
    """Processors and memory as a new process sees them, with this affinity and in this control group."""

    def enter() -> None:
        if affinity is not None:
            os.sched_setaffinity(0, affinity)
        if group is not None:
            (group / "cgroup.procs").write_text(str(os.getpid()))

    found = subprocess.run([sys.executable, "-c", SHOW], preexec_fn=enter, capture_output=True, text=True, check=True)
    processors, nbytes = map(int, found.stdout.split())
    return processors, nbytes


@pytest.fixture
def group(request: pytest.FixtureRequest) -> Iterator[Path]:
    """A real control group within another one, for the named controller."""
    parent = parent_of_groups(request.param)
    if parent is None:
        pytest.skip(f"no control group with a limit of {request.param} can be made")
    outer = parent / f"atcache-test-{os.getpid()}"
    try:
        outer.mkdir()
    except OSError as error:
        pytest.skip(f"no control group can be made: {error}")
    try:
        control = outer / "cgroup.subtree_control"
        if control.exists():
            control.write_text(f"+{request.param}")
        (outer / "inner").mkdir()
        yield outer / "inner"
    finally:
        if (outer / "inner").exists():
            (outer / "inner").rmdir()
        outer.rmdir()


def parent_of_groups(controller: str) -> Path | None:
    """A control group in which others can be made and limited by a controller; None if there is none.

    Version 1 has a hierarchy for each controller. In version 2 a group says which controllers those inside it have;
    nothing is changed there, as other processes are in it.
    """
    mounted = Path("/sys/fs/cgroup")
    if (mounted / controller / "cgroup.procs").exists():
        return mounted / controller
    own = [line.removeprefix("0::/") for line in Path("/proc/self/cgroup").read_text().splitlines() if line[0] == "0"]
    for folder in (mounted / name for name in own):
        control = folder / "cgroup.subtree_control"
        if control.exists() and controller in control.read_text().split():
            return folder
    return None


def set_limit(group: Path, version_1: str, version_2: str, limit: str) -> None:
    """Write a limit into the file that is there, that of one version or of the other."""
    (file,) = (group / name for name in (version_1, version_2) if (group / name).exists())
    file.write_text(limit)


def test_affinity_counts():
    assert shown(affinity={min(os.sched_getaffinity(0))})[0] == 1


@pytest.mark.parametrize("group", ["cpu"], indirect=True)
def test_the_quota_of_a_group_counts_even_if_it_is_set_further_out(group):
    set_limit(group.parent, "cpu.cfs_quota_us", "cpu.max", "60000")  # of 100000: part of a processor is one
    assert shown(group=group)[0] == 1


@pytest.mark.parametrize("group", ["memory"], indirect=True)
def test_the_memory_limit_of_a_group_counts_even_if_it_is_set_further_out(group):
    set_limit(group.parent, "memory.limit_in_bytes", "memory.max", str(2**29))
    assert shown(group=group)[1] == 2**29


def made(root: Path, groups: str, files: dict[str, str]) -> dict[str, Path]:
    """Files as Linux would show them: the list of groups, and limits."""
    (root / "list").write_text(groups)
    for name, text in files.items():
        (root / "mounted" / name).parent.mkdir(parents=True, exist_ok=True)
        (root / "mounted" / name).write_text(text)
    return {"list_of_groups": root / "list", "mounted": root / "mounted"}


def test_limits_of_version_2_are_read_at_every_level(tmp_path):
    files = {"a/b/cpu.max": "max 100000\n", "a/cpu.max": "150000 100000\n", "a/b/memory.max": "max\n"}
    where = made(tmp_path, "0::/a/b\n", {**files, "a/memory.max": f"{2**30}\n"})
    assert list(_cpu_quotas(**where)) == [1.5]
    assert list(_memory_limits(**where)) == [2**30]


def test_a_container_whose_own_group_is_the_root_of_what_is_mounted_is_understood(tmp_path):
    where = made(
        tmp_path,
        "5:cpu,cpuacct:/docker/abc\n4:memory:/docker/abc\n",
        {"cpu/cpu.cfs_quota_us": "400000", "cpu/cpu.cfs_period_us": "100000", "memory/memory.limit_in_bytes": "4096"},
    )
    assert list(_cpu_quotas(**where)) == [4.0]
    assert list(_memory_limits(**where)) == [4096]


def test_no_limit_is_found_where_there_are_no_groups(tmp_path):
    where = {"list_of_groups": tmp_path / "none", "mounted": tmp_path}
    assert (list(_cpu_quotas(**where)), list(_memory_limits(**where))) == ([], [])
    assert list(_groups("cpu", **where)) == []


def test_more_memory_for_views_than_there_is_is_refused():
    with pytest.raises(ConfigError, match=r"keep_mib=10000000: this process may use \d+ MiB of memory"):
        kept_nbytes(10_000_000, workers=4)
    assert kept_nbytes(1, workers=4) == 2**18 == kept_nbytes(1, 4)
    assert kept_nbytes(1, workers=0) == 2**20 <= memory_nbytes()


@pytest.mark.parametrize(
    ("files", "has_quota"),
    [
        ({"cpu.max": "100000 100000\n"}, True),
        ({"cpu/cpu.cfs_quota_us": "50000\n", "cpu/cpu.cfs_period_us": "100000\n"}, True),
        ({"cpu.max": "max 100000\n"}, False),
        ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, False),
        ({}, False),
    ],
    ids=["version 2", "version 1", "version 2 without a quota", "version 1 without a quota", "no groups"],
)
def test_threads_are_limited_only_where_a_quota_is_and_the_user_has_not_said(files, has_quota, tmp_path):
    where = made(tmp_path, "1:cpu:/\n0::/\n", files)
    usable = len(os.sched_getaffinity(0))
    assert num_processors(**where) == (1 if has_quota else usable)
    environment: dict[str, str] = {}
    limit_threads(environment, **where)
    assert environment == ({"OMP_NUM_THREADS": "1"} if has_quota and usable > 1 else {})
    given = {"OMP_NUM_THREADS": "7"}
    limit_threads(given, **where)
    assert given == {"OMP_NUM_THREADS": "7"}


@pytest.mark.parametrize("group", ["cpu"], indirect=True)
def test_a_command_tells_torch_of_the_quota(group):
    if len(os.sched_getaffinity(0)) < 2:
        pytest.skip("needs two processors")
    set_limit(group, "cpu.cfs_quota_us", "cpu.max", "100000")
    code = "import os; from atcache.machine import limit_threads; limit_threads(os.environ); import torch"
    found = subprocess.run(
        [sys.executable, "-c", f"{code}; print(torch.get_num_threads())"],
        preexec_fn=lambda: (group / "cgroup.procs").write_text(str(os.getpid())),
        env={name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert int(found.stdout) == 1
