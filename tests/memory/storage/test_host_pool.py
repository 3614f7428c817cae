"""The host tier never asks for more memory than the machine or its control group can give."""

from __future__ import annotations

import numpy as np
import pytest

from tfserve.errors import ConfigError
from tfserve.memory.storage.host_pool import HostPool, host_blocks

GIB = 1024**3


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
