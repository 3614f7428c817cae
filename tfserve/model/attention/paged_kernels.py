"""Kernels that read paged KV through a block table, and their inputs: flash-attn 2, its own package or torch's copy."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class DecodeWork:
    """B sequences with one query each. Int32, on the KV's device."""

    context_lens: Tensor  # [B], tokens including this step's; 0 for a padding row: its output is zeros
    block_tables: Tensor  # [B, W]; entries past a sequence's last block are not read


@dataclass(frozen=True, slots=True)
class PrefillWork:
    """S chunks, each the last tokens of its sequence. Tensors are int32, on the KV's device."""

    query_ends: Tensor  # [S + 1], start of each chunk's tokens, and the end of the last
    context_ends: Tensor  # [S + 1], the same for whole sequences
    context_lens: Tensor  # [S]
    block_tables: Tensor  # [S, W]
    max_query: int
    max_context: int


class PagedKernels(Protocol):
    """Kernels over `keys` and `values` of shape `[num_blocks, block_size, kv_heads, D]`, any strides but the last."""

    name: str

    def decode(self, q: Tensor, keys: Tensor, values: Tensor, work: DecodeWork) -> Tensor:
        """From `q [B, heads, D]` to `[B, heads, D]`."""
        ...

    def prefill(self, q: Tensor, keys: Tensor, values: Tensor, work: PrefillWork) -> Tensor:
        """From `q [T, heads, D]` to `[T, heads, D]`, causal: a chunk's last query sees its whole sequence."""
        ...


class FlashKernels:
    """flash-attn 2's two functions for paged KV; `decode` is flash_attn_with_kvcache, `varlen` flash_attn_varlen_func.

    Source: flash_attn/flash_attn_interface.py of flash-attn 2.8.
    """

    name = "flash_attn"

    def __init__(self, decode: Callable[..., Tensor], varlen: Callable[..., Tensor]) -> None:
        self._decode, self._varlen = decode, varlen

    @classmethod
    def load(cls) -> FlashKernels | None:
        """Those of the installed package; None without it. (flash-attn 4 has the package, but not these functions.)"""
        try:
            from flash_attn import flash_attn_varlen_func, flash_attn_with_kvcache
        except ImportError:
            return None
        return cls(flash_attn_with_kvcache, flash_attn_varlen_func)

    def decode(self, q: Tensor, keys: Tensor, values: Tensor, work: DecodeWork) -> Tensor:
        """See PagedKernels."""
        out = self._decode(
            q.unsqueeze(1),
            keys,
            values,
            cache_seqlens=work.context_lens,
            block_table=work.block_tables,
            causal=True,
        )
        return out.squeeze(1)

    def prefill(self, q: Tensor, keys: Tensor, values: Tensor, work: PrefillWork) -> Tensor:
        """See PagedKernels."""
        return self._varlen(
            q,
            keys,
            values,
            work.query_ends,
            work.context_ends,
            work.max_query,
            work.max_context,
            causal=True,
            block_table=work.block_tables,
        )


class VarlenKernels:
    """`torch.nn.attention.varlen.varlen_attn` with a block table (torch 2.12 and later): flash-attn 2 inside torch."""

    name = "torch_varlen"

    def __init__(self, varlen_attn: Callable[..., Tensor]) -> None:
        self._attn = varlen_attn

    @classmethod
    def load(cls) -> VarlenKernels | None:
        """Those of this torch; None if it cannot read paged KV."""
        try:
            from torch.nn.attention.varlen import varlen_attn
        except ImportError:
            return None
        attn: Callable[..., Tensor] = varlen_attn  # type: ignore[assignment]  # a tuple only where lse is asked for
        return cls(attn) if "block_table" in inspect.signature(varlen_attn).parameters else None

    def decode(self, q: Tensor, keys: Tensor, values: Tensor, work: DecodeWork) -> Tensor:
        """See PagedKernels."""
        query_ends = torch.arange(len(q) + 1, dtype=torch.int32, device=q.device)
        context_ends = torch.nn.functional.pad(work.context_lens.cumsum(0, dtype=torch.int32), (1, 0))
        most = work.block_tables.shape[1] * keys.shape[1]
        return self._call(q, keys, values, (query_ends, context_ends, 1, most), work)

    def prefill(self, q: Tensor, keys: Tensor, values: Tensor, work: PrefillWork) -> Tensor:
        """See PagedKernels."""
        sizes = work.query_ends, work.context_ends, work.max_query, work.max_context
        return self._call(q, keys, values, sizes, work)

    def _call(
        self,
        q: Tensor,
        keys: Tensor,
        values: Tensor,
        sizes: tuple[Tensor, Tensor, int, int],
        work: DecodeWork | PrefillWork,
    ) -> Tensor:
        return self._attn(
            q,
            keys,
            values,
            *sizes,
            window_size=(-1, 0),  # which is causal, aligned to the last key
            enable_gqa=True,
            seqused_k=work.context_lens,
            block_table=work.block_tables,
        )
