"""The parity cases of paged backends: the same ones run with the fakes on a CPU and with the real kernels on a GPU."""

from __future__ import annotations

import numpy as np
import torch

from tests.model.paged_cache import Cache, check
from tfserve.memory.storage.kv_layout import KVOrder
from tfserve.model.attention.base import AttentionBackend

LENGTHS = [0, 1, 255, 256, 257, 600]
HEAD_DIMS = (64, 128)
GROUPS = (1, 3, 4, 5, 7, 8)
SEEDS = range(10)
ATOL = {torch.bfloat16: 2e-2, torch.float16: 4e-3}


def paged_cache(lengths: list[int], device: str, **options) -> Cache:
    options = {"dtype": torch.bfloat16, "kv_heads": 2, "extra": 300, "seed": 0, **options}
    return Cache(lengths, order=KVOrder.BLOCK_MAJOR, block_size=256, device=device, **options)


def check_paged(backend: AttentionBackend, cache: Cache, query_lens: list[int], num_decodes: int, group: int) -> None:
    check(cache, query_lens, num_decodes, group, ATOL[cache.kv.dtype], backend)


def decode_equals_dense(backend: AttentionBackend, device: str, head_dim: int, group: int) -> None:
    cache = paged_cache(LENGTHS, device, head_dim=head_dim)
    check_paged(backend, cache, [1] * len(LENGTHS), len(LENGTHS), group)


def chunks_equal_dense(backend: AttentionBackend, device: str, head_dim: int, group: int) -> None:
    cache = paged_cache(LENGTHS, device, head_dim=head_dim)
    check_paged(backend, cache, [1, 255, 257, 3, 64, 300], 0, group)


def long_context_equals_dense(backend: AttentionBackend, device: str) -> None:
    cache = paged_cache([4096, 4095, 5], device, head_dim=128, kv_heads=1)
    check_paged(backend, cache, [1, 33, 260], 1, group=4)


def random_mixed_step_equals_dense(backend: AttentionBackend, device: str, seed: int) -> None:
    rng = np.random.default_rng(seed)
    lengths = rng.choice([*LENGTHS, 30, 511, 513, 700], size=rng.integers(1, 9)).tolist()
    decodes = int(rng.integers(0, len(lengths) + 1))
    query_lens = [1] * decodes + rng.integers(1, 290, size=len(lengths) - decodes).tolist()
    cache = paged_cache(
        lengths,
        device,
        head_dim=int(rng.choice(HEAD_DIMS)),
        kv_heads=int(rng.choice([1, 2, 3])),
        dtype=torch.float16 if seed % 2 else torch.bfloat16,
        seed=seed,
    )
    check_paged(backend, cache, query_lens, decodes, group=int(rng.choice(GROUPS)))


def stale_kv_is_never_read(backend: AttentionBackend, device: str) -> None:
    """NaN wherever no sequence has a token yet, and in the null block, as a failed request may leave."""
    gen = torch.Generator().manual_seed(2)
    query_lens, decodes = [1, 1, 1, 1, 300, 20], 4
    qkv = torch.randn(sum(query_lens), 8 + 2 + 2, 128, generator=gen).to(device, torch.bfloat16)
    outs = []
    for poisoned in (False, True):
        cache = paged_cache(LENGTHS, device, head_dim=128)
        if poisoned:
            _poison(cache)
        step = backend.build(cache.batch(query_lens, decodes), cache.kv)
        outs.append(step.attend(0, *qkv.split((8, 2, 2), 1)))
    assert outs[1].isfinite().all()
    assert torch.equal(*outs)


def _poison(cache: Cache) -> None:
    for pages in (pages for layer in cache.kv.layers for pages in layer):
        kept = pages.clone()
        pages.fill_(torch.nan)
        for blocks, n in zip(cache.blocks, cache.lengths, strict=True):
            whole, rest = divmod(n, cache.block_size)
            for i, block in enumerate(blocks[: whole + 1].tolist()):
                end = cache.block_size if i < whole else rest
                pages[block, :end] = kept[block, :end]
