from __future__ import annotations

import logging

import numpy as np
import pytest
import torch

from tests.model.paged_cache import Cache, check
from tfserve.errors import ConfigError
from tfserve.memory.storage.kv_layout import KVOrder
from tfserve.model.attention import select_backend
from tfserve.model.attention.embedding_bag_attention import EmbeddingBagAttention
from tfserve.model.attention.torch_backend import TorchBackend

LENGTHS = [0, 1, 31, 32, 33, 300]


@pytest.mark.parametrize("order", list(KVOrder))
@pytest.mark.parametrize("group", [1, 3, 4, 8])
@pytest.mark.parametrize("head_dim", [16, 64])
def test_decode_of_unequal_lengths_equals_dense(order: KVOrder, group: int, head_dim: int) -> None:
    cache = Cache(LENGTHS, order=order, head_dim=head_dim)
    assert EmbeddingBagAttention.can_read(cache.kv) == (order is KVOrder.LAYER_MAJOR)
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
        backend = select_backend("auto", "cpu", "float32", 64)
    assert backend.name == "torch"
    assert "attention backend: torch" in caplog.text


def test_a_backend_that_does_not_exist_is_an_error_that_names_those_that_do() -> None:
    with pytest.raises(ConfigError, match=r"attention_backend: 'xformers' .*available: auto, torch.*flash_attn"):
        select_backend("xformers", "cpu", "float32", 64)


def test_a_dtype_without_kernels_is_an_error() -> None:
    with pytest.raises(ConfigError, match=r"dtype: .*float32, bfloat16, float16"):
        select_backend("torch", "cpu", "float64", 64)


def test_the_backend_has_a_block_size_of_its_own_but_takes_any() -> None:
    assert TorchBackend().block_size(None) == 32
    assert TorchBackend().block_size(48) == 48
