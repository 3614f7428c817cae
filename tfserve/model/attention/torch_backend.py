"""Attention with PyTorch's own operators: any device, any float dtype; fast on the CPU in float32."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from tfserve.model.attention.base import PagedKV
from tfserve.model.attention.embedding_bag_attention import EmbeddingBagAttention
from tfserve.model.runner.forward_batch import ForwardBatch


class TorchBackend:
    """Decodes as one call over the whole batch, prefills as one call per sequence.

    Keys and values need no particular layout. Decode in float32 on the CPU is several times faster with the layout that
    EmbeddingBagAttention reads; everything else gathers the blocks and runs scaled_dot_product_attention.
    """

    name = "torch"
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16, torch.float16)
    reads_stale_kv = True  # masking adds -inf to scores, and the sum over values includes masked ones

    def block_size(self, wish: int | None) -> int:
        """Any size works; 32 is as fast as larger sizes (measured) and wastes less memory."""
        return 32 if wish is None else wish

    def build(self, batch: ForwardBatch, kv: PagedKV) -> TorchStep:
        """Prepare a step over `kv`."""
        n = batch.num_decodes
        decode: DecodePart | None = None
        if n:
            part = EmbeddingBagAttention if EmbeddingBagAttention.can_read(kv) else GatherDecode
            decode = part(batch.block_tables[:n], batch.context_lens[:n], kv)
        return TorchStep(batch, kv, decode, _chunks(batch, kv))


class DecodePart(Protocol):
    """Attention of R sequences with one query each."""

    def attend(self, layer: int, q: Tensor) -> Tensor:
        """From `q [R, heads, D]` and the cache to `[R, heads * D]`."""
        ...


class TorchStep:
    """One step: K and V written with one indexed store each, then decodes, then prefill chunks."""

    def __init__(self, batch: ForwardBatch, kv: PagedKV, decode: DecodePart | None, chunks: list[PrefillChunk]) -> None:
        self._kv = kv
        self._block = batch.slots // kv.block_size
        self._offset = batch.slots % kv.block_size
        self._num_decodes = batch.num_decodes
        self._decode = decode
        self._chunks = chunks

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Write `k` and `v [T, kv_heads, D]`, attend with `q [T, heads, D]`; returns `[T, heads * D]`."""
        keys, values = self._kv.layers[layer]
        keys[self._block, self._offset] = k
        values[self._block, self._offset] = v
        if self._decode is not None and not self._chunks:
            return self._decode.attend(layer, q)
        out = torch.empty((len(q), q.shape[1] * q.shape[2]), dtype=q.dtype, device=q.device)
        if self._decode is not None:
            out[: self._num_decodes] = self._decode.attend(layer, q[: self._num_decodes])
        for chunk in self._chunks:
            part = slice(chunk.begin, chunk.end)
            if chunk.blocks is None:
                chunk.attend(q[part], k[part], v[part], out[part])
            else:
                chunk.attend(q[part], chunk.gather(keys), chunk.gather(values), out[part])
        return out


@dataclass(frozen=True, slots=True)
class PrefillChunk:
    """Tokens `[begin, end)` of the step, all of one sequence; `blocks` and `mask` are None if it starts at 0."""

    begin: int
    end: int
    context_len: int
    blocks: Tensor | None  # [W] int64
    mask: Tensor | None  # [end - begin, context_len], 0 or -inf

    def gather(self, pages: Tensor) -> Tensor:
        """The sequence's K (or V) so far, `[context_len, kv_heads, D]`, gathered from a layer's pages."""
        return pages[self.blocks].flatten(0, 1)[: self.context_len]

    def attend(self, q: Tensor, k: Tensor, v: Tensor, out: Tensor) -> None:
        """Causal attention of `q [n, heads, D]` to `k`, `v [context_len, kv_heads, D]`, into `out [n, heads * D]`."""
        n, num_heads, head_dim = q.shape
        num_kv = k.shape[1]
        group = num_heads // num_kv
        # The group is a batch dimension along which K and V have stride 0: grouped queries without a copy.
        grouped = q.view(n, num_kv, group, head_dim).permute(2, 1, 0, 3)  # [group, kv_heads, n, D]
        k, v = (x.transpose(0, 1).expand(group, -1, -1, -1) for x in (k, v))
        mixed = scaled_dot_product_attention(grouped, k, v, attn_mask=self.mask, is_causal=self.mask is None)
        out.view(n, num_kv, group, head_dim).copy_(mixed.permute(2, 1, 0, 3))


def _chunks(batch: ForwardBatch, kv: PagedKV) -> list[PrefillChunk]:
    chunks = []
    begin = batch.num_decodes
    for seq in range(batch.num_decodes, len(batch.query_lens)):
        n, context = int(batch.query_lens[seq]), int(batch.context_lens[seq])
        blocks = mask = None
        if context > n:
            width = -(-context // kv.block_size)
            blocks = torch.from_numpy(batch.block_tables[seq, :width].astype(np.int64)).to(kv.device)
            mask = torch.full((n, context), -torch.inf, dtype=kv.dtype, device=kv.device).triu_(context - n + 1)
        chunks.append(PrefillChunk(begin, begin + n, context, blocks, mask))
        begin += n
    return chunks


class GatherDecode:
    """Decode for any layout, dtype and device: copy every sequence's blocks side by side, then one masked call."""

    def __init__(self, tables: NDArray[np.int32], context_lens: NDArray[np.int64], kv: PagedKV) -> None:
        self._kv = kv
        width = -(-int(context_lens.max()) // kv.block_size)
        self._blocks = torch.from_numpy(tables[:, :width].astype(np.int64)).to(kv.device)  # [R, W]
        hidden = np.arange(width * kv.block_size) >= context_lens[:, None]
        mask = np.where(hidden, -np.inf, 0.0)[:, None, None, :]
        self._mask = torch.from_numpy(mask).to(kv.device, kv.dtype)  # [R, 1, 1, W * block_size]

    def attend(self, layer: int, q: Tensor) -> Tensor:
        """From `q [R, heads, D]` to `[R, heads * D]`."""
        k, v = (
            pages[self._blocks].flatten(1, 2).transpose(1, 2)  # [R, kv_heads, W * block_size, D]
            for pages in self._kv.layers[layer]
        )
        grouped = q.view(len(q), k.shape[1], -1, q.shape[2])  # [R, kv_heads, group, D]
        return scaled_dot_product_attention(grouped, k, v, attn_mask=self._mask).flatten(1)
