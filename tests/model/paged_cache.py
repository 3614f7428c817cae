"""A paged KV cache with known contents, and the comparison of a backend with dense attention in float64."""

from __future__ import annotations

import torch
from torch import Tensor

from tfserve.memory.storage.device_pool import DevicePool
from tfserve.memory.storage.kv_layout import KVLayout, KVOrder
from tfserve.model.attention.base import AttentionBackend, PagedKV
from tfserve.model.attention.torch_backend import TorchBackend
from tfserve.model.runner.forward_batch import BlockTables, ForwardBatch, build_batch
from tfserve.plan import BlockId, SeqStep, SlotId, StepId, StepPlan


class Cache:
    """A paged cache full of finite garbage, with sequences in random blocks and their true K and V beside it."""

    def __init__(
        self,
        lengths: list[int],
        *,
        order: KVOrder = KVOrder.LAYER_MAJOR,
        kv_heads: int = 3,
        head_dim: int = 16,
        block_size: int = 32,
        extra: int = 70,
        dtype: torch.dtype = torch.float32,
        device: str = "cpu",
        seed: int = 0,
    ) -> None:
        gen = torch.Generator().manual_seed(seed)
        self.lengths, self.block_size, self.kv_heads, self.head_dim = lengths, block_size, kv_heads, head_dim
        room = [-(-(n + extra) // block_size) for n in lengths]
        num_blocks = 1 + sum(room) + 5
        layout = KVLayout(order, 2, block_size, kv_heads, head_dim, dtype)
        pool = DevicePool(layout, num_blocks, device)
        fresh = torch.Generator(device).manual_seed(seed)
        pool.storage.copy_(1e4 * torch.randn(pool.storage.shape, generator=fresh, device=device))
        self.kv = PagedKV(pool.layers())
        for pages in (pages for layer in self.kv.layers for pages in layer):
            pages[0] = 0
        free = iter((torch.randperm(num_blocks - 1, generator=gen) + 1).tolist())
        self.tables = BlockTables(len(lengths), max(room) + 1)
        self.blocks: list[Tensor] = []
        self.k: list[list[Tensor]] = []  # [seq][layer] -> [length, kv_heads, D]
        self.v: list[list[Tensor]] = []
        for row, n in enumerate(lengths):
            own = [BlockId(next(free)) for _ in range(room[row])]
            self.tables.extend(SlotId(row), own)
            self.blocks.append(torch.tensor(own))
            for truth, layers in zip((self.k, self.v), zip(*self.kv.layers, strict=True), strict=True):
                made = [torch.randn(n, kv_heads, head_dim, generator=gen) for _ in layers]
                truth.append([x.to(device, dtype) for x in made])
                for x, pages in zip(truth[-1], layers, strict=True):
                    pages[self.blocks[row][torch.arange(n) // block_size], torch.arange(n) % block_size] = x

    def batch(self, query_lens: list[int], num_decodes: int) -> ForwardBatch:
        seqs = tuple(
            SeqStep(f"r{row}", SlotId(row), start, n, False, (0,) * n)
            for row, (start, n) in enumerate(zip(self.lengths, query_lens, strict=True))
        )
        plan = StepPlan(StepId(0), seqs, num_decodes)
        last_tokens = torch.zeros(len(seqs), dtype=torch.int64, device=self.kv.device)
        return build_batch(plan, self.tables, last_tokens, self.block_size)

    def expected(self, layer: int, query_lens: list[int], q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Dense attention in float64, one sequence and one head at a time."""
        outs, begin = [], 0
        group = q.shape[1] // self.kv_heads
        for row, n in enumerate(query_lens):
            part = slice(begin, begin + n)
            begin += n
            keys = torch.cat([self.k[row][layer], k[part]]).double().repeat_interleave(group, 1)
            values = torch.cat([self.v[row][layer], v[part]]).double().repeat_interleave(group, 1)
            scores = torch.einsum("qhd,khd->hqk", q[part].double(), keys) * self.head_dim**-0.5
            hidden = torch.ones(n, len(keys), dtype=torch.bool, device=q.device).triu(1 + len(keys) - n)
            weights = scores.masked_fill(hidden, -torch.inf).softmax(-1)
            outs.append(torch.einsum("hqk,khd->qhd", weights, values).flatten(1))
        return torch.cat(outs)


def check(
    cache: Cache,
    query_lens: list[int],
    num_decodes: int,
    group: int,
    atol: float = 2e-6,
    backend: AttentionBackend | None = None,
) -> None:
    """Attend in every layer; compare with dense attention; nothing but the written slots may have changed."""
    step = (backend or TorchBackend()).build(cache.batch(query_lens, num_decodes), cache.kv)
    gen = torch.Generator().manual_seed(1)
    total, heads = sum(query_lens), group * cache.kv_heads
    slots = torch.cat([torch.arange(s, s + n) for s, n in zip(cache.lengths, query_lens, strict=True)])
    rows = torch.repeat_interleave(torch.tensor(query_lens))
    where = torch.stack([cache.blocks[row][slot // cache.block_size] for row, slot in zip(rows, slots, strict=True)])
    for layer in range(2):
        qkv = torch.randn(total, heads + 2 * cache.kv_heads, cache.head_dim, generator=gen)
        qkv = qkv.to(cache.kv.device, cache.kv.dtype)
        q, k, v = qkv.split((heads, cache.kv_heads, cache.kv_heads), dim=1)  # views, as the decoder gives them
        before = [pages.clone() for pages in cache.kv.layers[layer]]
        out = step.attend(layer, q, k, v)
        assert out.shape == (total, heads * cache.head_dim)
        expected = cache.expected(layer, query_lens, q, k, v)
        torch.testing.assert_close(out.double(), expected, atol=atol, rtol=atol)
        for old, new, x in zip(before, cache.kv.layers[layer], (k, v), strict=True):
            old[where, slots % cache.block_size] = x
            assert torch.equal(old, new)
