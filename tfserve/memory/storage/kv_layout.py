"""KVLayout: the byte order of the KV cache on a device, and the views that attention reads."""

from __future__ import annotations

import enum
from dataclasses import dataclass

import torch
from torch import Tensor


class KVOrder(enum.Enum):
    """How bytes are ordered. Both orders were chosen by measurement.

    BLOCK_MAJOR `[num_blocks, layers, 2, block_size, kv_heads, head_dim]`: a block is one contiguous copy.
    LAYER_MAJOR `[layers, 2, num_blocks, page]`, a page being K `[kv_heads, head_dim, block_size]` or V `[kv_heads,
    block_size, head_dim]`: what the CPU's decode attention reads row by row. A block is `2 * layers` contiguous pages.
    """

    BLOCK_MAJOR = "block-major"
    LAYER_MAJOR = "layer-major"


@dataclass(frozen=True, slots=True)
class KVLayout:
    """Sizes and order of the KV of one model; independent of how many blocks there are."""

    order: KVOrder
    num_layers: int
    block_size: int
    num_kv_heads: int
    head_dim: int
    dtype: torch.dtype

    @classmethod
    def for_device(
        cls, device: str, dtype: str, *, num_layers: int, block_size: int, num_kv_heads: int, head_dim: int
    ) -> KVLayout:
        """The layout in the order that suits a device; `dtype` is torch's name of the element type."""
        order = KVOrder.LAYER_MAJOR if device == "cpu" else KVOrder.BLOCK_MAJOR
        return cls(order, num_layers, block_size, num_kv_heads, head_dim, getattr(torch, dtype))

    @property
    def token_bytes(self) -> int:
        """K and V of one token over all layers."""
        return self.num_layers * 2 * self.num_kv_heads * self.head_dim * self.dtype.itemsize

    @property
    def block_bytes(self) -> int:
        """K and V of one block over all layers."""
        return self.token_bytes * self.block_size

    def storage_shape(self, num_blocks: int) -> tuple[int, ...]:
        """Shape of the one tensor that holds `num_blocks` blocks."""
        if self.order is KVOrder.BLOCK_MAJOR:
            return (num_blocks, self.num_layers, 2, self.block_size, self.num_kv_heads, self.head_dim)
        return (self.num_layers, 2, num_blocks, self.num_kv_heads * self.head_dim * self.block_size)

    def layers(self, storage: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Per layer K and V, views `[num_blocks, block_size, kv_heads, head_dim]`: only the strides tell the order."""
        if self.order is KVOrder.BLOCK_MAJOR:
            return [(storage[:, layer, 0], storage[:, layer, 1]) for layer in range(self.num_layers)]
        heads, width, size = self.num_kv_heads, self.head_dim, self.block_size
        keys = storage[:, 0].view(self.num_layers, -1, heads, width, size).permute(0, 1, 4, 2, 3)
        values = storage[:, 1].view(self.num_layers, -1, heads, size, width).permute(0, 1, 3, 2, 4)
        return list(zip(keys, values, strict=True))
