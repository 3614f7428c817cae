"""Attention with kernels that read paged KV through a block table: flash-attn, or torch's own copy of it."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tfserve.errors import ConfigError
from tfserve.model.attention.base import PagedKV
from tfserve.model.attention.paged_kernels import DecodeWork, PagedKernels, PrefillWork
from tfserve.model.runner.forward_batch import ForwardBatch
from tfserve.model.runner.staging import upload

PAGE_TOKENS = 256
"""A page of these kernels is a multiple of this many tokens."""


class PagedBackend:
    """Decodes and prefill chunks as one call each per layer, in bfloat16 or float16.

    Two calls, because decodes are slow in a call with chunks. Alone, the kernel packs the queries of a group into one
    tile and splits long contexts over the chip.
    """

    dtypes: tuple[torch.dtype, ...] = (torch.bfloat16, torch.float16)
    # Scores beyond a sequence's end are masked, values there are not loaded: flash_fwd_kernel.h of flash-attn 2.8
    # (apply_mask, Clear_OOB_MN).
    reads_stale_kv = False

    def __init__(self, kernels: PagedKernels) -> None:
        self.name = kernels.name
        self._kernels = kernels

    def block_size(self, wish: int | None) -> int:
        """256 tokens, or `wish` if it is a multiple of 256. Raises ConfigError for other values."""
        if wish is not None and wish % PAGE_TOKENS:
            raise ConfigError(
                "block_size",
                f"attention backend {self.name!r} needs a multiple of {PAGE_TOKENS}, got {wish}; leave it out",
            )
        return wish or PAGE_TOKENS

    def build(self, batch: ForwardBatch, kv: PagedKV) -> PagedStep:
        """Prepare a step over `kv`: all its integers go to the device in one copy."""
        n = batch.num_decodes
        decode_args, prefill_args = _decode_arrays(batch, kv), _prefill_arrays(batch, kv)
        tensors = upload(kv.device, *decode_args, *prefill_args)
        decode = DecodeWork(tensors[0], tensors[1]) if decode_args else None
        prefill = None
        if prefill_args:
            query_ends, context_ends, lens, tables = tensors[-4:]
            most = int(batch.query_lens[n:].max()), int(batch.context_lens[n:].max())
            prefill = PrefillWork(query_ends, context_ends, lens, tables, *most)
        return PagedStep(self._kernels, kv, batch.slots, num_decodes=n, decode=decode, prefill=prefill)

    def build_decode(self, slots: Tensor, work: DecodeWork, kv: PagedKV) -> PagedStep:
        """A step of decodes only, with all inputs on the device already; `slots` int64 `[B]`.

        No launch depends on the values of the inputs, so a graph of it can be replayed with other values.
        """
        return PagedStep(self._kernels, kv, slots, num_decodes=len(slots), decode=work, prefill=None)


class PagedStep:
    """One step: K and V written with one indexed copy each, then decodes, then prefill chunks."""

    def __init__(
        self,
        kernels: PagedKernels,
        kv: PagedKV,
        slots: Tensor,
        *,
        num_decodes: int,
        decode: DecodeWork | None,
        prefill: PrefillWork | None,
    ) -> None:
        self._kernels = kernels
        self._kv = kv
        self._num_decodes = num_decodes
        self._decode = decode
        self._prefill = prefill
        # All layers have the same strides, so one index of rows serves them all.
        block = torch.div(slots, kv.block_size, rounding_mode="floor")
        self._rows = block * _rows_per_block(kv.layers[0][0]) + slots % kv.block_size

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Write `k` and `v [T, kv_heads, D]`, attend with `q [T, heads, D]`; returns `[T, heads * D]`."""
        keys, values = self._kv.layers[layer]
        as_rows(keys).index_copy_(0, self._rows, k.flatten(1))
        as_rows(values).index_copy_(0, self._rows, v.flatten(1))
        n = self._num_decodes
        outs = []
        if self._decode is not None:
            outs.append(self._kernels.decode(q[:n], keys, values, self._decode))
        if self._prefill is not None:
            outs.append(self._kernels.prefill(q[n:], keys, values, self._prefill))
        return (outs[0] if len(outs) == 1 else torch.cat(outs)).flatten(1)


def as_rows(pages: Tensor) -> Tensor:
    """`pages [num_blocks, block_size, kv_heads, D]`, a token's heads dense, as `[rows, kv_heads * D]`: a view.

    Rows cover everything between the first page and the last, pages of other layers included: token t of block b is row
    b * (rows per block) + t.
    """
    num_blocks, block_size, heads, width = pages.shape
    rows = (num_blocks - 1) * _rows_per_block(pages) + block_size
    return pages.as_strided((rows, heads * width), (heads * width, 1))


def _rows_per_block(pages: Tensor) -> int:
    _, _, heads, width = pages.shape
    if pages.stride()[1:] != (heads * width, width, 1) or pages.stride(0) % (heads * width):
        raise ValueError(
            f"paged kernels need KV blocks of [block_size, kv_heads, head_dim], not strides {pages.stride()}"
        )
    return pages.stride(0) // (heads * width)


def _decode_arrays(batch: ForwardBatch, kv: PagedKV) -> list[NDArray[np.int32]]:
    """The arrays of DecodeWork on the host; empty if there are no decodes."""
    n = batch.num_decodes
    if n == 0:
        return []
    return [batch.context_lens[:n].astype(np.int32), _tables(batch, kv, slice(0, n))]


def _prefill_arrays(batch: ForwardBatch, kv: PagedKV) -> list[NDArray[np.int32]]:
    n = batch.num_decodes
    if n == len(batch.query_lens):
        return []
    lens = batch.context_lens[n:]
    return [_ends(batch.query_lens[n:]), _ends(lens), lens.astype(np.int32), _tables(batch, kv, slice(n, None))]


def _tables(batch: ForwardBatch, kv: PagedKV, part: slice) -> NDArray[np.int32]:
    """Block tables no wider than the longest of these sequences: flash-attn chooses its splits by the width."""
    width = -(-int(batch.context_lens[part].max()) // kv.block_size)
    return np.ascontiguousarray(batch.block_tables[part, :width])


def _ends(lens: NDArray[np.int64]) -> NDArray[np.int32]:
    return np.concatenate([[0], lens.cumsum()]).astype(np.int32)
