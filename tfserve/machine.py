"""The processors and the memory that this process may use, also by its control groups. Torch-free.

Complete on Linux only. Elsewhere all processors of the machine and three quarters of its memory count.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

_PROC, _SYS = Path("/proc"), Path("/sys")


def usable_cpus(proc: Path = _PROC, sys: Path = _SYS) -> int:
    """Number of processors for this process: those it may run on, limited by the quota of its control groups.

    A quota of 2.5 gives 2: with three threads, all would wait for the throttled one. At least 1.
    """
    affinity = getattr(os, "sched_getaffinity", None)
    limits: list[float] = [len(affinity(0)) if affinity else os.cpu_count() or 1]
    for group in _control_groups("cpu", proc, sys):
        quota, _, period = _text(group / "cpu.max").partition(" ")
        quota, period = quota or _text(group / "cpu.cfs_quota_us"), period or _text(group / "cpu.cfs_period_us")
        if quota.isdigit() and period.isdigit() and int(period):  # "max" and -1 mean: no quota
            limits.append(int(quota) / int(period))
    return max(1, int(min(limits)))


def available_bytes(proc: Path = _PROC, sys: Path = _SYS) -> int:
    """Memory that this process can still allocate: the least that the machine and its control groups have left."""
    limits = [_free_bytes(proc / "meminfo")]
    for group in _control_groups("memory", proc, sys):
        for limit_file, used_file in (
            ("memory.max", "memory.current"),
            ("memory.limit_in_bytes", "memory.usage_in_bytes"),
        ):
            limit, used = _text(group / limit_file), _text(group / used_file)
            if limit.isdigit() and used.isdigit():
                limits.append(max(0, int(limit) - int(used)))
    return min(limits)


def _free_bytes(meminfo: Path) -> int:
    for line in _text(meminfo).splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") * 3 // 4


def _control_groups(controller: str, proc: Path, sys: Path) -> Iterator[Path]:
    """This process's control groups of a controller and all above them, of version 2 and 1."""
    root = sys / "fs/cgroup"
    for line in _text(proc / "self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if not controllers or controller in controllers.split(","):
            base, group = root / controller if controllers else root, PurePosixPath(path)
            # Inside a container the listed path may be the host's. The mounted root is then the group itself.
            for part in (group, *group.parents):
                yield base / str(part).lstrip("/")


def _text(path: Path) -> str:
    """The text of a file; empty if it cannot be read."""
    try:
        return path.read_text().strip()
    except OSError:
        return ""
