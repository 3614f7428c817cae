"""The default size of the host tier, on a laptop and beside a GPU."""

from __future__ import annotations

from unittest.mock import patch

import pytest

from tests.scripted import scripted_engine, write_scripted_model
from tfserve.engine.core import build, host_memory
from tfserve.engine.core.host_memory import default_host_blocks
from tfserve.errors import ConfigError

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


def test_both_tiers_must_fit_and_the_error_names_both_settings(tmp_path) -> None:
    """The device's KV takes no memory until it is written, and still looks free."""
    settings = {"host_kv_gib": 0.75, "num_gpu_blocks_override": 2**17, "max_model_len": 512}  # 256 MiB on the device
    with (
        patch.object(host_memory, "available_bytes", lambda: GIB),
        pytest.raises(ConfigError, match=r"host_kv_gib: 0\.75 GiB .* spare 0\.6\d beside .* num_gpu_blocks_override"),
        scripted_engine(write_scripted_model(tmp_path), "", **settings),
    ):
        pass


def test_weights_that_do_not_fit_are_an_error_before_they_are_loaded(tmp_path) -> None:
    with (
        patch.object(build, "available_bytes", lambda: 10_000),
        pytest.raises(ConfigError, match=r"model: its weights take at least .* as float32"),
        scripted_engine(write_scripted_model(tmp_path), ""),
    ):
        pass
