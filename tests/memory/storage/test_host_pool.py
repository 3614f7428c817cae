"""The host tier never asks for more memory than the machine or its control group can give."""

from __future__ import annotations

import numpy as np
import pytest

from tfserve.errors import ConfigError
from tfserve.memory.storage.host_pool import HostPool, available_bytes, host_blocks

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


def test_blocks_from_gib():
    assert host_blocks(0, 1024, GIB) == 0
    assert host_blocks(0.5, 1024 * 1024, GIB) == 512
    with pytest.raises(ConfigError, match=r"host_kv_gib: 2 GiB were asked for.*can spare 0\.90"):
        host_blocks(2, 1024, GIB)
    with pytest.raises(ConfigError, match="less than two KV blocks"):
        host_blocks(0.5, 400 * 1024 * 1024, GIB)


def test_both_tiers_together_must_fit():
    """Neither 15 GiB of device KV nor 15 of host KV is too much for 23, but they are together."""
    with pytest.raises(ConfigError, match=r"host_kv_gib: 15 GiB .*spare 7\.20 beside the 15\.00 .*\(kv_cache_gib\)"):
        host_blocks(15, 2**20, 23 * GIB, 15 * GIB)
    with pytest.raises(ConfigError, match=r"spare 0\.00 beside .*for host_kv_gib or num_gpu_blocks_override"):
        host_blocks(1, 2**20, 3 * GIB, 4 * GIB, "num_gpu_blocks_override")
    assert host_blocks(7, 2**20, 23 * GIB, 15 * GIB) == 7 * 1024


def test_a_block_is_contiguous_across_layers():
    pool = HostPool(3, (2, 2, 32), np.float32)
    assert pool.data[1].flags.c_contiguous
    assert pool.block_bytes == 2 * 2 * 32 * 4
