"""DevicePool: the memory that holds the KV blocks of the device tier."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from tfserve.memory.storage.kv_layout import KVLayout

_PAGE_BYTES = 4096


class DevicePool:
    """`num_blocks` blocks of zeroed KV storage on one device. Which block is whose is the manager's business."""

    def __init__(self, layout: KVLayout, num_blocks: int, device: str) -> None:
        self.layout = layout
        self.num_blocks = num_blocks
        shape = layout.storage_shape(num_blocks)
        if device == "cpu":
            self.storage = _lazy_zeros(shape, layout.dtype)
        else:
            self.storage = torch.zeros(shape, dtype=layout.dtype, device=device)

    def layers(self) -> list[tuple[Tensor, Tensor]]:
        """Per layer K and V as views `[num_blocks, block_size, kv_heads, head_dim]`."""
        return self.layout.layers(self.storage)


def _lazy_zeros(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Zeros that take physical memory only where they are written, aligned to a page.

    torch.zeros touches every byte at once; numpy asks the system for pages that are zero already.
    """
    num_bytes = math.prod(shape) * dtype.itemsize
    raw = np.zeros(num_bytes + _PAGE_BYTES, np.uint8)
    skip = -raw.ctypes.data % _PAGE_BYTES
    return torch.from_numpy(raw[skip : skip + num_bytes]).view(dtype).view(shape)
