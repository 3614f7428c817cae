"""Memory and processors of a machine or a container, also if the system reports only a part of them."""

from __future__ import annotations

import os

import pytest

from tfserve.machine import available_bytes, usable_cpus

GIB = 1024**3


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


@pytest.fixture
def machine(tmp_path):
    write(tmp_path / "proc/meminfo", "MemTotal:  16777216 kB\nMemAvailable:  8388608 kB\n")
    return tmp_path


def available(machine) -> float:
    return available_bytes(machine / "proc", machine / "sys") / GIB


def test_without_control_groups_the_machine_decides(machine):
    assert available(machine) == 8


def test_version_2_limits_count_at_every_level(machine):
    write(machine / "proc/self/cgroup", "0::/outer/inner\n")
    write(machine / "sys/fs/cgroup/outer/inner/memory.max", "max\n")
    write(machine / "sys/fs/cgroup/outer/inner/memory.current", f"{GIB}\n")
    write(machine / "sys/fs/cgroup/outer/memory.max", f"{3 * GIB}\n")
    write(machine / "sys/fs/cgroup/outer/memory.current", f"{GIB}\n")
    assert available(machine) == 2


def test_version_1_limit_of_a_container_is_at_the_mounted_root(machine):
    write(machine / "proc/self/cgroup", "5:cpu,cpuacct:/docker/x\n4:memory:/docker/x\n")
    write(machine / "sys/fs/cgroup/memory/memory.limit_in_bytes", f"{4 * GIB}\n")
    write(machine / "sys/fs/cgroup/memory/memory.usage_in_bytes", f"{5 * GIB}\n")
    assert available(machine) == 0


def test_this_machine_has_memory():
    assert available_bytes() > 0


def test_where_the_system_does_not_tell_what_is_free_most_of_the_machine_counts(tmp_path):
    whole = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert 0 < available_bytes(tmp_path / "proc", tmp_path / "sys") < whole


@pytest.fixture
def cores(machine, monkeypatch):
    """A machine of which this process may use eight processors."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    return machine


def usable(machine) -> int:
    return usable_cpus(machine / "proc", machine / "sys")


@pytest.mark.parametrize(
    ("quota", "expected"),
    [
        ("max 100000", 8),
        ("200000 100000", 2),
        ("250000 100000", 2),
        ("50000 100000", 1),
        ("1000000000 100000", 8),
        ("", 8),
        ("100000 0", 8),
    ],
)
def test_a_quota_of_version_2_counts_in_whole_processors(cores, quota, expected):
    write(cores / "proc/self/cgroup", "0::/\n")
    write(cores / "sys/fs/cgroup/cpu.max", f"{quota}\n")
    assert usable(cores) == expected


def test_the_least_quota_of_all_levels_counts(cores):
    write(cores / "proc/self/cgroup", "0::/outer/inner\n")
    write(cores / "sys/fs/cgroup/outer/inner/cpu.max", "600000 100000\n")
    write(cores / "sys/fs/cgroup/outer/cpu.max", "300000 100000\n")
    assert usable(cores) == 3


@pytest.mark.parametrize(("quota", "expected"), [("-1", 8), ("400000", 4)])
def test_a_quota_of_version_1_is_of_the_group_that_has_the_processors(cores, quota, expected):
    write(cores / "proc/self/cgroup", "5:memory:/docker/x\n4:cpu,cpuacct:/docker/x\n3:cpuset:/docker/x\n")
    write(cores / "sys/fs/cgroup/cpu/cpu.cfs_quota_us", f"{quota}\n")
    write(cores / "sys/fs/cgroup/cpu/cpu.cfs_period_us", "100000\n")
    assert usable(cores) == expected


def test_without_affinity_all_processors_of_the_machine_count(machine, monkeypatch):
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 6)
    assert usable(machine) == 6
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    assert usable(machine) == 1


def test_this_machine_has_processors():
    assert 1 <= usable_cpus() <= (os.cpu_count() or 1)
