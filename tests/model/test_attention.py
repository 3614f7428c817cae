from __future__ import annotations

import logging

import numpy as np
import pytest
import torch
from torch import Tensor

from tfserve.errors import ConfigError
from tfserve.memory.device_pool import DevicePool
from tfserve.memory.kv_layout import KVLayout, KVOrder
from tfserve.model.attention import select_backend
from tfserve.model.attention.bag_decode import BagDecode
from tfserve.model.attention.base import PagedKV
from tfserve.model.attention.torch_backend import TorchBackend
from tfserve.model.forward_batch import BlockTables, ForwardBatch, build_batch
from tfserve.plan import BlockId, Fence, Row, SeqStep, StepPlan

LENGTHS = [0, 1, 31, 32, 33, 300]


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
        seed: int = 0,
    ) -> None:
        gen = torch.Generator().manual_seed(seed)
        self.lengths, self.block_size, self.kv_heads, self.head_dim = lengths, block_size, kv_heads, head_dim
        room = [-(-(n + extra) // block_size) for n in lengths]
        num_blocks = 1 + sum(room) + 5
        layout = KVLayout(order, 2, block_size, kv_heads, head_dim, dtype)
        pool = DevicePool(layout, num_blocks, "cpu")
        pool.storage.copy_(1e4 * torch.randn(pool.storage.shape, generator=gen))
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
            self.tables.extend(Row(row), own)
            self.blocks.append(torch.tensor(own))
            for truth, layers in zip((self.k, self.v), zip(*self.kv.layers, strict=True), strict=True):
                truth.append([torch.randn(n, kv_heads, head_dim, generator=gen).to(dtype) for _ in layers])
                for x, pages in zip(truth[-1], layers, strict=True):
                    pages[self.blocks[row][torch.arange(n) // block_size], torch.arange(n) % block_size] = x

    def batch(self, query_lens: list[int], num_decodes: int) -> ForwardBatch:
        seqs = tuple(
            SeqStep(f"r{row}", Row(row), start, n, False, (0,) * n)
            for row, (start, n) in enumerate(zip(self.lengths, query_lens, strict=True))
        )
        plan = StepPlan(Fence(0), seqs, num_decodes)
        return build_batch(plan, self.tables, torch.zeros(len(seqs), dtype=torch.int64), self.block_size)

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
            hidden = torch.ones(n, len(keys), dtype=torch.bool).triu(1 + len(keys) - n)
            weights = scores.masked_fill(hidden, -torch.inf).softmax(-1)
            outs.append(torch.einsum("hqk,khd->qhd", weights, values).flatten(1))
        return torch.cat(outs)


def check(cache: Cache, query_lens: list[int], num_decodes: int, group: int, atol: float = 2e-6) -> None:
    """Attend in every layer; compare with dense attention; nothing but the written slots may have changed."""
    step = TorchBackend().build(cache.batch(query_lens, num_decodes), cache.kv)
    gen = torch.Generator().manual_seed(1)
    total, heads = sum(query_lens), group * cache.kv_heads
    slots = torch.cat([torch.arange(s, s + n) for s, n in zip(cache.lengths, query_lens, strict=True)])
    rows = torch.repeat_interleave(torch.tensor(query_lens))
    where = torch.stack([cache.blocks[row][slot // cache.block_size] for row, slot in zip(rows, slots, strict=True)])
    for layer in range(2):
        qkv = torch.randn(total, heads + 2 * cache.kv_heads, cache.head_dim, generator=gen).to(cache.kv.dtype)
        q, k, v = qkv.split((heads, cache.kv_heads, cache.kv_heads), dim=1)  # views, as the decoder gives them
        before = [pages.clone() for pages in cache.kv.layers[layer]]
        out = step.attend(layer, q, k, v)
        assert out.shape == (total, heads * cache.head_dim)
        expected = cache.expected(layer, query_lens, q, k, v)
        torch.testing.assert_close(out.double(), expected, atol=atol, rtol=atol)
        for old, new, x in zip(before, cache.kv.layers[layer], (k, v), strict=True):
            old[where, slots % cache.block_size] = x
            assert torch.equal(old, new)


@pytest.mark.parametrize("order", list(KVOrder))
@pytest.mark.parametrize("group", [1, 3, 4, 8])
@pytest.mark.parametrize("head_dim", [16, 64])
def test_decode_of_unequal_lengths_equals_dense(order: KVOrder, group: int, head_dim: int) -> None:
    cache = Cache(LENGTHS, order=order, head_dim=head_dim)
    assert BagDecode.can_read(cache.kv) == (order is KVOrder.LAYER_MAJOR)
    check(cache, [1] * len(LENGTHS), len(LENGTHS), group)


@pytest.mark.parametrize("order", list(KVOrder))
@pytest.mark.parametrize("n", [1, 31, 33, 70])
def test_prefill_chunks_equal_dense(order: KVOrder, n: int) -> None:
    check(Cache(LENGTHS, order=order), [n] * len(LENGTHS), 0, group=3)


@pytest.mark.parametrize("order", list(KVOrder))
def test_a_mixed_step_equals_dense(order: KVOrder) -> None:
    check(Cache([40, 300, 0, 0, 33, 64], order=order), [1, 1, 5, 64, 40, 1], 2, group=3)


@pytest.mark.parametrize("seed", range(12))
def test_random_steps_equal_dense(seed: int) -> None:
    rng = np.random.default_rng(seed)
    lengths = rng.integers(0, rng.choice([20, 200, 600]), size=rng.integers(1, 14)).tolist()
    decodes = int(rng.integers(0, len(lengths) + 1))
    query_lens = [1] * decodes + rng.integers(1, 60, size=len(lengths) - decodes).tolist()
    cache = Cache(
        lengths,
        kv_heads=int(rng.choice([1, 2, 3])),
        block_size=int(rng.choice([4, 16, 32, 64])),
        order=KVOrder.LAYER_MAJOR if seed % 3 else KVOrder.BLOCK_MAJOR,
        seed=seed,
    )
    check(cache, query_lens, decodes, group=int(rng.choice([1, 3, 4, 8])))


def test_very_unequal_lengths_in_one_decode() -> None:
    check(Cache([700, 3, 90, 64, 650, 1, 200, 210, 0]), [1] * 9, 9, group=3)


@pytest.mark.parametrize("order", list(KVOrder))
def test_bfloat16_equals_dense_within_its_precision(order: KVOrder) -> None:
    cache = Cache([40, 3, 70], order=order, dtype=torch.bfloat16)
    check(cache, [1, 1, 9], 2, group=3, atol=3e-2)


def test_a_sequence_does_not_depend_on_its_neighbours() -> None:
    """Padding and stale blocks get weight 0 exactly: a neighbour full of garbage changes at most the last bits."""
    gen = torch.Generator().manual_seed(3)
    q, k, v = (torch.randn(1, heads, 16, generator=gen) for heads in (9, 3, 3))
    outs = []
    for lengths in ([33], [33, 600]):
        cache = Cache(lengths)
        for (
            keys,
            values,
        ) in cache.kv.layers:
            at = torch.arange(33)
            where = cache.blocks[0][at // 32], at % 32
            keys[where] = torch.linspace(-1, 1, 33 * 48).view(33, 3, 16)
            values[where] = torch.linspace(2, 3, 33 * 48).view(33, 3, 16)
        step = TorchBackend().build(cache.batch([1] * len(lengths), len(lengths)), cache.kv)
        outs.append(step.attend(0, *(x.expand(len(lengths), -1, -1) for x in (q, k, v)))[0])
    torch.testing.assert_close(outs[0], outs[1], atol=1e-6, rtol=0)


def test_auto_picks_a_backend_and_says_which(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        backend = select_backend("auto", "cpu", "float32")
    assert backend.name == "torch"
    assert "attention backend: torch" in caplog.text


def test_a_backend_that_does_not_exist_is_an_error_that_names_those_that_do() -> None:
    with pytest.raises(ConfigError, match=r"attention_backend: 'flash_attn' .*available: auto, torch"):
        select_backend("flash_attn", "cpu", "float32")


def test_a_dtype_without_kernels_is_an_error() -> None:
    with pytest.raises(ConfigError, match=r"dtype: .*float32, bfloat16, float16"):
        select_backend("torch", "cpu", "float64")


def test_the_backend_has_a_block_size_of_its_own_but_takes_any() -> None:
    assert TorchBackend().block_size(None) == 32
    assert TorchBackend().block_size(48) == 48
