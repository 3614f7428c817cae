"""flash-attn's two functions for paged KV in pure torch, with the checks that the real ones make.

The checks and their words are those of mha_fwd_kvcache and mha_varlen_fwd in flash_api.cpp of flash-attn 2.8.
"""

from __future__ import annotations

import torch
from torch import Tensor


def flash_attn_with_kvcache(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, *, cache_seqlens: Tensor, block_table: Tensor, causal: bool = False
) -> Tensor:
    """`q [B, n, heads, D]` against the first `cache_seqlens [B]` tokens of each sequence: `[B, n, heads, D]`."""
    batch, n, heads, width = q.shape
    _check_pages(q, k_cache, v_cache, block_table, batch)
    _check_int32("seqlens_k", cache_seqlens, batch, q)
    out = torch.empty_like(q)
    for i, length in enumerate(cache_seqlens.tolist()):
        out[i] = _attend(q[i], k_cache, v_cache, block_table[i], length, causal)
    assert out.shape == (batch, n, heads, width)
    return out


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *,
    causal: bool = False,
    block_table: Tensor,
    seqused_k: Tensor | None = None,
) -> Tensor:
    """`q [total, heads, D]`, sequence by sequence, against each one's tokens: `[total, heads, D]`."""
    batch = len(cu_seqlens_q) - 1
    _check_pages(q, k, v, block_table, batch)
    for name, ends in (("cu_seqlens_q", cu_seqlens_q), ("cu_seqlens_k", cu_seqlens_k)):
        _check_int32(name, ends, batch + 1, q)
    queries, lengths = cu_seqlens_q.diff().tolist(), cu_seqlens_k.diff().tolist()
    if seqused_k is not None:
        _check_int32("seqused_k", seqused_k, batch, q)
        lengths = seqused_k.tolist()
    # The real one launches a grid for these sizes and leaves out what is beyond them.
    _require(max(queries) <= max_seqlen_q and max(lengths) <= max_seqlen_k, "max_seqlen is below a sequence's length")
    _require(int(cu_seqlens_q[-1]) == len(q), "cu_seqlens_q must end at the number of queries")
    out = torch.empty_like(q)
    for i, (begin, length) in enumerate(zip(cu_seqlens_q.tolist(), lengths, strict=False)):
        part = slice(begin, begin + queries[i])
        out[part] = _attend(q[part], k, v, block_table[i], length, causal)
    return out


def varlen_attn(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor | None,
    max_q: int,
    max_k: int,
    *,
    window_size: tuple[int, int] = (-1, -1),
    enable_gqa: bool = False,
    seqused_k: Tensor | None = None,
    block_table: Tensor | None = None,
) -> Tensor:
    """torch.nn.attention.varlen.varlen_attn of torch 2.12, as far as it reads pages."""
    _require(block_table is not None and seqused_k is not None, "block_table requires seqused_k")
    _require(cu_seq_k is not None, "the fake needs cu_seq_k")
    _require(
        enable_gqa or query.shape[1] == key.shape[2], "Expect query and key/value to have the same number of heads"
    )
    _require(window_size in ((-1, -1), (-1, 0)), "the fake has no sliding window")
    assert block_table is not None
    assert cu_seq_k is not None
    return flash_attn_varlen_func(
        query,
        key,
        value,
        cu_seq_q,
        cu_seq_k,
        max_q,
        max_k,
        causal=window_size == (-1, 0),
        block_table=block_table,
        seqused_k=seqused_k,
    )


def _attend(q: Tensor, k_pages: Tensor, v_pages: Tensor, blocks: Tensor, length: int, causal: bool) -> Tensor:
    """One sequence, `q [n, heads, D]`; a query that sees no key gives zeros."""
    n, heads, width = q.shape
    page = k_pages.shape[1]
    _require(length <= len(blocks) * page, "a sequence is longer than its block table")
    own = blocks[: -(-length // page)].long()
    _require(bool(((own >= 0) & (own < len(k_pages))).all()), "illegal memory access: no such page")
    group = heads // k_pages.shape[2]
    keys, values = (pages[own].flatten(0, 1)[:length].float() for pages in (k_pages, v_pages))
    keys, values = keys.repeat_interleave(group, 1), values.repeat_interleave(group, 1)
    scores = torch.einsum("qhd,khd->hqk", q.float(), keys) * width**-0.5
    if causal:  # aligned to the bottom right corner
        hidden = torch.ones(n, length, dtype=torch.bool).triu(1 + length - n)
        scores = scores.masked_fill(hidden, -torch.inf)
    weights = scores.softmax(-1).nan_to_num(0.0)
    return torch.einsum("hqk,khd->qhd", weights, values).to(q.dtype)


def _check_pages(q: Tensor, k: Tensor, v: Tensor, block_table: Tensor, batch: int) -> None:
    *_, heads, width = q.shape
    _require(q.dtype in (torch.float16, torch.bfloat16), "FlashAttention only support fp16 and bf16 data type")
    _require(k.dtype == q.dtype, "query and key must have the same dtype")
    _require(v.dtype == q.dtype, "query and value must have the same dtype")
    for x in (q, k, v):
        _require(x.stride(-1) == 1, "Input tensor must have contiguous last dimension")
    _require(block_table.dtype == torch.int32, "block_table must have dtype torch.int32")
    _require(block_table.stride(-1) == 1, "block_table must have contiguous last dimension")
    _require(block_table.device == q.device, "block_table must be on CUDA")
    _require(block_table.ndim == 2 and len(block_table) == batch, "block_table must have shape (batch, blocks)")
    _require(k.shape[1] % 256 == 0, "Paged KV cache block size must be divisible by 256")
    _require(batch > 0, "batch size must be positive")
    _require(width <= 256, "FlashAttention forward only supports head dimension at most 256")
    _require(width % 8 == 0, "head_size should be a multiple of 8")
    _require(heads % k.shape[2] == 0, "Number of heads in key/value must divide number of heads in query")
    _require(
        k.shape == v.shape and k.shape[3] == width, "k and v must have shape (num_blocks, page, heads_k, head_size)"
    )


def _check_int32(name: str, x: Tensor, size: int, q: Tensor) -> None:
    _require(x.dtype == torch.int32, f"{name} must have dtype int32")
    _require(x.device == q.device, f"{name} must be on CUDA")
    _require(x.is_contiguous(), f"{name} must be contiguous")
    _require(x.shape == (size,), f"{name} must have shape ({size})")


def _require(holds: bool, message: str) -> None:
    if not holds:
        raise RuntimeError(message)
