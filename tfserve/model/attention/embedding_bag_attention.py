"""Decode attention in float32 on the CPU: `embedding_bag` over the blocks of the KV cache, without gathering them.

A decode step computes two sums per query head: scores = sum over d of q[d] * K[d, :], and output = sum over t of p[t] *
V[t, :]. With keys stored transposed inside a block, both are a weighted sum of indexed rows, which is what
`embedding_bag` computes (compiled for the row's width, parallel over threads). So nothing is gathered, fragmentation
costs nothing, and sequences of different lengths share a call. `benchmarks/micro/attention_cpu.py` compares it with the
alternatives.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tfserve.model.attention.base import PagedKV

_SHRINK = 0.7
"""A sequence this much shorter than the longest of its bucket starts a new one: padding costs time in softmax and V."""


class EmbeddingBagAttention:
    """One query for each of R sequences. Sequences are sorted by length into buckets that share a padded length."""

    @staticmethod
    def can_read(kv: PagedKV) -> bool:
        """True for float32 on the CPU with K as `[blocks, kv_heads, D, block_size]` and V as `[.., block_size, D]`."""
        k, v = kv.layers[0][0].permute(0, 2, 3, 1), kv.layers[0][1].permute(0, 2, 1, 3)
        return kv.dtype == torch.float32 and kv.device.type == "cpu" and k.is_contiguous() and v.is_contiguous()

    def __init__(self, tables: NDArray[np.int32], context_lens: NDArray[np.int64], kv: PagedKV) -> None:
        self._kv = kv
        self._tables = tables
        self._lens = context_lens
        self._index: _BagIndex | None = None

    def attend(self, layer: int, q: Tensor) -> Tensor:
        """From `q [R, heads, D]` to `[R, heads * D]`."""
        index = self._index
        if index is None:  # built here because the number of query heads is known only now; all layers share it
            index = self._index = _BagIndex(self._tables, self._lens, self._kv, num_heads=q.shape[1])
        head_dim = self._kv.head_dim
        # [blocks * kv_heads * D, block_size] and [blocks * kv_heads * block_size, D]
        keys, values = self._kv.layers[layer]
        key_rows = keys.permute(0, 2, 3, 1).view(-1, self._kv.block_size)
        value_rows = values.permute(0, 2, 1, 3).view(-1, head_dim)

        # At batch 1 the overhead of the calls dominates, so there are as few calls as possible.
        torch.index_select(q.reshape(-1, head_dim), 0, index.query_of_bag, out=index.weights)
        scores = _weighted_sums(key_rows, index.key_rows, index.key_offsets, index.weights.view(-1)).view(-1)
        for part, mask, probs in index.buckets:
            torch.softmax(torch.add(mask, scores[part].view_as(probs), alpha=head_dim**-0.5), -1, out=probs)
        mixed = _weighted_sums(value_rows, index.value_rows, index.value_offsets, index.probs)
        mixed = mixed.view(len(q), -1)
        return mixed if index.unsort is None else mixed.index_select(0, index.unsort)


class _BagIndex:
    """Which rows each bag sums, for one step. Bags run over (sequence by length, kv head, group, block)."""

    def __init__(self, tables: NDArray[np.int32], lens: NDArray[np.int64], kv: PagedKV, num_heads: int) -> None:
        num_rows = kv.num_blocks * kv.num_kv_heads * max(kv.block_size, kv.head_dim)
        # 32-bit indices halve the memory traffic of the index.
        dtype: np.dtype[Any] = np.dtype(np.int32 if num_rows < 2**31 else np.int64)
        num_blocks = -(-lens // kv.block_size)
        order = np.argsort(-num_blocks, kind="stable")
        bounds = _bucket_bounds(num_blocks[order])
        buckets = [
            _bucket(order[begin:end], tables, lens, kv, num_heads=num_heads, dtype=dtype) for begin, end in bounds
        ]
        self.key_rows = torch.from_numpy(np.concatenate([bucket.key_rows for bucket in buckets]))
        self.key_offsets = _offsets([bucket.key_counts for bucket in buckets], dtype)
        self.query_of_bag = torch.from_numpy(np.concatenate([bucket.queries for bucket in buckets]))
        self.value_rows = torch.from_numpy(np.concatenate([bucket.value_rows for bucket in buckets]))
        self.value_offsets = _offsets([bucket.value_counts for bucket in buckets], dtype)
        is_sorted = bool((order[1:] > order[:-1]).all())
        self.unsort = None if is_sorted else torch.from_numpy(np.argsort(order))
        self.weights = torch.empty(len(self.query_of_bag), kv.head_dim)
        self.probs = torch.empty(len(self.value_rows))
        self.buckets: list[
            tuple[slice, Tensor, Tensor]
        ] = []  # slice of the scores, mask [seqs, 1, t], probs [seqs, heads, t]
        begin = 0
        for mask in (bucket.mask for bucket in buckets):
            end = begin + mask.size * num_heads
            probs = self.probs[begin:end].view(len(mask), num_heads, -1)
            self.buckets.append((slice(begin, end), torch.from_numpy(mask), probs))
            begin = end


class _Bucket(NamedTuple):
    """The bags of sequences of similar lengths, padded to the longest."""

    key_rows: NDArray[Any]
    key_counts: NDArray[np.int64]
    queries: NDArray[np.int64]
    value_rows: NDArray[Any]
    value_counts: NDArray[np.int64]
    mask: NDArray[np.float32]
    """`[sequences, 1, blocks * block_size]`: 0, or -inf past a sequence's end."""


def _bucket(
    seqs: NDArray[np.intp],
    tables: NDArray[np.int32],
    lens: NDArray[np.int64],
    kv: PagedKV,
    *,
    num_heads: int,
    dtype: np.dtype[Any],
) -> _Bucket:
    """The first of `seqs` is the longest."""
    size, head_dim, num_kv = kv.block_size, kv.head_dim, kv.num_kv_heads
    num_blocks = -(-lens[seqs] // size)
    width = int(num_blocks[0])
    # A page is one head's share of a block.
    pages = tables[seqs, None, :width].astype(dtype) * num_kv + np.arange(num_kv, dtype=dtype)[:, None]
    bags = (len(seqs), num_kv, num_heads // num_kv, width)
    exists = np.broadcast_to((np.arange(width) < num_blocks[:, None])[:, None, None], bags)
    key_pages = np.broadcast_to(pages[:, :, None], bags)[exists]
    heads = (seqs[:, None] * num_heads + np.arange(num_heads)).reshape(*bags[:3], 1)
    valid = (np.arange(width * size) < lens[seqs, None])[:, None]  # [seqs, 1, width * size]
    rows = (pages[..., None] * size + np.arange(size, dtype=dtype)).reshape(len(seqs), num_kv, -1)
    rows = np.where(valid, rows, dtype.type(0))  # positions past the end read the null block with weight 0
    return _Bucket(
        key_rows=(key_pages[:, None] * head_dim + np.arange(head_dim, dtype=dtype)).ravel(),
        key_counts=exists.ravel() * head_dim,  # a missing block is an empty bag: its scores are zeros
        queries=np.broadcast_to(heads, bags)[exists],
        value_rows=np.broadcast_to(rows[:, :, None], (*bags[:3], width * size)).ravel(),
        value_counts=np.full(len(seqs) * num_heads, width * size),
        mask=np.where(valid, np.float32(0), np.float32(-np.inf)),
    )


def _bucket_bounds(descending: NDArray[np.int64]) -> list[tuple[int, int]]:
    """Split sequences, longest first, into buckets: one much shorter than the first of its bucket starts a new one."""
    bounds, begin = [], 0
    for i, blocks in enumerate(descending.tolist()):
        if blocks < _SHRINK * descending[begin] - 1:
            bounds.append((begin, i))
            begin = i
    return [*bounds, (begin, len(descending))]


def _offsets(counts: list[NDArray[np.int64]], dtype: np.dtype[Any]) -> Tensor:
    """Where each bag begins, and the end of the last: `[bags + 1]`."""
    sums = np.concatenate([[0], *counts]).cumsum()
    return torch.from_numpy(sums.astype(dtype))


def _weighted_sums(table: Tensor, rows: Tensor, offsets: Tensor, weights: Tensor) -> Tensor:
    """`out[bag] = sum of weights[i] * table[rows[i]]` over the bag's i: `[bags, width]`."""
    sums: Tensor = torch.embedding_bag(table, rows, offsets, False, 0, False, weights, True)[0]
    return sums
