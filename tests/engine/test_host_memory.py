"""How large the host tier is where nobody says, on a laptop and beside a GPU."""

from __future__ import annotations

import pytest

from tfserve.engine.host_memory import default_host_blocks

GIB = 2**30
BLOCK = 32 * 2**20


@pytest.mark.parametrize(
    ("pinned", "device_gib", "free_gib", "gib", "why"),
    [
        (False, 1, 20, 4, "4 times the device's KV"),
        (False, 2, 20, 5, "quarter"),
        (False, 2, 4, 1, "quarter"),
        (True, 10, 100, 40, "4 times"),
        (True, 60, 100, 50, "half"),
        (True, 100, 1000, 64, "64 GiB"),
    ],
)
def test_the_tier_is_as_large_as_its_tightest_limit_which_is_named(pinned, device_gib, free_gib, gib, why):
    blocks, reason = default_host_blocks(device_gib * GIB // BLOCK, BLOCK, free_gib * GIB, pinned=pinned)
    assert blocks == gib * GIB // BLOCK
    assert why in reason
    assert "host_kv_gib" in reason
