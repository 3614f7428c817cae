"""The host tier of a live engine: how large it is, and the transfers that reach it. Uses torch."""

from __future__ import annotations

import logging
from dataclasses import dataclass

import torch

from tfserve.config import EngineConfig
from tfserve.engine.policies import OFFLOADING
from tfserve.errors import ConfigError
from tfserve.memory.device_pool import DevicePool
from tfserve.memory.host_pool import HostPool, available_bytes, host_blocks
from tfserve.memory.transfers import TierArrays, WorkerTransfers
from tfserve.plan import Clock, Direction, TransferEngine

logger = logging.getLogger(__name__)

_PER_DEVICE_BLOCK = 2
"""Host blocks per device block where `host_kv_gib` is not set."""

_GRANULE_TOKENS = 32


@dataclass(frozen=True, slots=True)
class HostTierMemory:
    """Blocks on the host, the reserved one included, and what moves KV to them and back."""

    num_blocks: int
    transfers: TransferEngine


def granule_of(block_size: int) -> int:
    """Tokens that write-through stores at a time: 32, or what divides a block that 32 does not."""
    return _GRANULE_TOKENS if block_size % _GRANULE_TOKENS == 0 else block_size


def open_host_tier(config: EngineConfig, device: DevicePool, clock: Clock) -> HostTierMemory | None:
    """The host tier that `config` asks for; None if there is to be none.

    Raises ConfigError for one that this machine has no memory for, or no way to reach from the device.
    """
    if config.host_kv_gib == 0 or not config.scheduler.offload or config.scheduler.policy not in OFFLOADING:
        return None
    storage, layout = device.storage, device.layout
    if storage.device.type != "cpu":
        if config.host_kv_gib is not None:
            raise ConfigError("host_kv_gib", f"there is no host tier for device {storage.device.type} yet; set 0")
        logger.warning("no host tier for device %s yet: preempted requests are recomputed", storage.device.type)
        return None
    available = available_bytes()
    if config.host_kv_gib is None:
        num_blocks = min(_PER_DEVICE_BLOCK * device.num_blocks, available // 2 // layout.block_bytes)
    else:
        num_blocks = host_blocks(config.host_kv_gib, layout.block_bytes, available)
    if num_blocks < 2:
        logger.warning("no memory for a host tier: preempted requests are recomputed")
        return None
    # numpy has no bfloat16; copies only need items of the right size.
    items = storage.view(torch.int16) if storage.element_size() == 2 else storage
    pages = items.numpy().transpose(2, 0, 1, 3)
    host = HostPool(num_blocks, pages.shape[1:], pages.dtype)
    bandwidth = None
    if config.emulated_bandwidth is not None:
        logger.warning("emulated_bandwidth: copies are slowed down to %g GiB/s", config.emulated_bandwidth)
        bandwidth = dict.fromkeys(Direction, config.emulated_bandwidth * 2**30)
    transfers = WorkerTransfers(
        TierArrays.from_pages(pages, layout.num_kv_heads, layout.head_dim),
        TierArrays.from_pages(host.data, layout.num_kv_heads, layout.head_dim),
        clock,
        emulated_bytes_per_s=bandwidth,
    )
    return HostTierMemory(num_blocks, transfers)
