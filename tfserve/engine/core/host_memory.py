"""The host tier of a live engine: how large it is, and the transfers that reach it. Uses torch."""

from __future__ import annotations

import logging
from dataclasses import dataclass

import numpy as np
import torch

from tfserve.config import EngineConfig
from tfserve.engine.scheduling.policies import uses_host
from tfserve.errors import ConfigError
from tfserve.machine import available_bytes
from tfserve.memory.storage.device_pool import DevicePool
from tfserve.memory.storage.host_pool import HostPool, host_blocks
from tfserve.memory.transfers.copy_runs import BlockGeometry, blocks_per_chunk
from tfserve.memory.transfers.cuda_link import CudaLink
from tfserve.memory.transfers.stream_transfers import StreamTransfers
from tfserve.memory.transfers.worker_transfers import TierArrays, WorkerTransfers
from tfserve.model.runner.cuda_stream_runner import CudaStreamRunner
from tfserve.plan import Clock, Direction, TransferEngine

logger = logging.getLogger(__name__)

_PER_DEVICE_BLOCK = 4
"""Host blocks per device block, if memory allows: both tiers together hold five times the KV of the device."""

_MAX_PINNED_BYTES = 64 * 2**30
"""Most memory that is pinned by default: the driver takes about half a second for each GiB (estimated)."""

_CHUNK_BYTES = 2**30
"""Bytes of host memory pinned in one call."""


@dataclass(frozen=True, slots=True)
class HostTierMemory:
    """The host tier: its number of blocks (the reserved one included), the reason for it, and the transfers to it."""

    num_blocks: int
    reason: str
    transfers: TransferEngine


def open_host_tier(
    config: EngineConfig, device: DevicePool, clock: Clock, runner: CudaStreamRunner | None
) -> HostTierMemory | None:
    """The host tier that `config` asks for, or None. `runner` is set on a CUDA device only.

    Raises ConfigError if the machine has too little memory for it, or cannot pin that memory.
    """
    if config.host_kv_gib == 0 or not uses_host(config.scheduler):
        return None
    block_bytes = device.layout.block_bytes
    # On a CPU both tiers use the same memory. The device's KV is allocated but not yet written, so it still counts as
    # free.
    promised = device.num_blocks * block_bytes if runner is None else 0
    available = available_bytes()
    if config.host_kv_gib is None:
        free = max(0, available - promised)
        num_blocks, reason = default_host_blocks(device.num_blocks, block_bytes, free, pinned=runner is not None)
    else:
        key = "kv_cache_gib" if config.num_gpu_blocks_override is None else "num_gpu_blocks_override"
        num_blocks = host_blocks(config.host_kv_gib, block_bytes, available, promised, key)
        reason = "set by host_kv_gib"
    if num_blocks < 2:
        logger.warning("no memory for a host tier: preempted requests are recomputed")
        return None
    if runner is not None:
        transfers = _stream_transfers(config, device, num_blocks, clock, runner)
    else:
        transfers = _worker_transfers(config, device, num_blocks, clock)
    return HostTierMemory(num_blocks, reason, transfers)


def default_host_blocks(device_blocks: int, block_bytes: int, available: int, *, pinned: bool) -> tuple[int, str]:
    """Number of host blocks if `host_kv_gib` is not set, and the limit that decided it, as text.

    On a CPU both tiers share the memory with other programs, and the system hands out pages on first use.
    Beside a GPU the memory is pinned at the start.
    """
    limits = [(_PER_DEVICE_BLOCK * device_blocks, f"{_PER_DEVICE_BLOCK} times the device's KV")]
    if pinned:
        limits += [
            (available // 2 // block_bytes, "half of the free memory"),
            (_MAX_PINNED_BYTES // block_bytes, f"no more than {_MAX_PINNED_BYTES // 2**30} GiB is pinned unasked"),
        ]
    else:
        limits.append((available // 4 // block_bytes, "a quarter of the free memory"))
    num_blocks, limit = min(limits)
    return num_blocks, f"{limit}; host_kv_gib changes it"


def _worker_transfers(config: EngineConfig, device: DevicePool, num_blocks: int, clock: Clock) -> TransferEngine:
    storage, layout = device.storage, device.layout
    # numpy has no bfloat16; copies only need items of the right size.
    items = storage.view(torch.int16) if storage.element_size() == 2 else storage
    pages = items.numpy().transpose(2, 0, 1, 3)
    host = HostPool(num_blocks, pages.shape[1:], pages.dtype)
    bandwidth = None
    if config.emulated_bandwidth is not None:
        logger.warning("emulated_bandwidth: copies are slowed down to %g GiB/s", config.emulated_bandwidth)
        bandwidth = dict.fromkeys(Direction, config.emulated_bandwidth * 2**30)
    return WorkerTransfers(
        TierArrays.from_pages(pages, layout.num_kv_heads, layout.head_dim),
        TierArrays.from_pages(host.data, layout.num_kv_heads, layout.head_dim),
        clock,
        emulated_bytes_per_s=bandwidth,
    )


def _stream_transfers(
    config: EngineConfig, device: DevicePool, num_blocks: int, clock: Clock, runner: CudaStreamRunner
) -> TransferEngine:
    if config.emulated_bandwidth is not None:
        raise ConfigError("emulated_bandwidth", "a GPU's link has a speed of its own: leave it out")
    layout = device.layout
    row_bytes = layout.num_kv_heads * layout.head_dim * layout.dtype.itemsize
    geometry = BlockGeometry(2 * layout.num_layers, layout.block_size, row_bytes)
    per_chunk = blocks_per_chunk(geometry.block_bytes, _CHUNK_BYTES)
    host = HostPool(num_blocks, (geometry.block_bytes,), np.uint8)
    link = CudaLink(device.storage, host.data, chunk_bytes=per_chunk * geometry.block_bytes, compute=runner.stream)
    transfers = StreamTransfers(link, geometry, per_chunk, clock)
    runner.on_launched = transfers.launched
    return transfers
