"""The interface of attention backends: paged KV, and one step's attention over it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from tfserve.model.runner.forward_batch import ForwardBatch


@dataclass(frozen=True)
class PagedKV:
    """The KV cache as attention sees it: per layer K and V as views, with any strides, of shape
    `[num_blocks, block_size, kv_heads, head_dim]`.

    Block 0 stands for missing blocks: it is read with weight 0 and must stay finite. So must the whole cache if the
    backend reads stale KV.
    """

    layers: Sequence[tuple[Tensor, Tensor]]  # K and V

    @property
    def num_blocks(self) -> int:
        """Blocks in each layer."""
        return self.layers[0][0].shape[0]

    @property
    def block_size(self) -> int:
        """Tokens in a block."""
        return self.layers[0][0].shape[1]

    @property
    def num_kv_heads(self) -> int:
        """Heads of K and V."""
        return self.layers[0][0].shape[2]

    @property
    def head_dim(self) -> int:
        """Width of a head."""
        return self.layers[0][0].shape[3]

    @property
    def dtype(self) -> torch.dtype:
        """Element type of K and V."""
        return self.layers[0][0].dtype

    @property
    def device(self) -> torch.device:
        """Where the cache lives."""
        return self.layers[0][0].device


class AttentionStep(Protocol):
    """One step's attention over all layers; holds the metadata that layers share."""

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Write K and V `[T, kv_heads, D]` into the cache, then attend with `q [T, heads, D]`: `[T, heads * D]`."""
        ...


class AttentionBackend(Protocol):
    """A family of kernels for paged attention."""

    name: str
    dtypes: tuple[torch.dtype, ...]
    reads_stale_kv: bool
    """True if the kernel reads a block beyond a sequence's tokens, with weight 0: a NaN there would spread."""

    def block_size(self, wish: int | None) -> int:
        """Tokens per KV block: `wish`, or the backend's default. Raises ConfigError for a `wish` it cannot use."""
        ...

    def build(self, batch: ForwardBatch, kv: PagedKV) -> AttentionStep:
        """Prepare a step: compute once what all layers share."""
        ...
