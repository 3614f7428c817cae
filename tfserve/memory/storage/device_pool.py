"""DevicePool: the memory that holds the KV blocks of the device tier."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from tfserve.memory.storage.kv_layout import KVLayout
from tfserve.memory.storage.pages import lazy_pages


class DevicePool:
    """`num_blocks` blocks of zeroed KV storage on one device. Which block is whose is the manager's business."""

    def __init__(self, layout: KVLayout, num_blocks: int, device: str) -> None:
        self.layout = layout
        self.num_blocks = num_blocks
        shape = layout.storage_shape(num_blocks)
        if device == "cpu":
            memory = lazy_pages(math.prod(shape) * layout.dtype.itemsize)
            self.storage = torch.frombuffer(memory, dtype=layout.dtype).view(shape)
        else:
            self.storage = torch.zeros(shape, dtype=layout.dtype, device=device)

    def layers(self) -> list[tuple[Tensor, Tensor]]:
        """Per layer K and V as views `[num_blocks, block_size, kv_heads, head_dim]`."""
        return self.layout.layers(self.storage)
