"""The paged backends over the real kernels: the parity cases of tests/model/paged_parity.py."""

from __future__ import annotations

import pytest
import torch

from tests.model import paged_parity as parity
from tests.model.paged_cache import check
from tests.model.paged_parity import GROUPS, HEAD_DIMS, SEEDS, paged_cache
from tfserve.model.attention.base import PagedKV
from tfserve.model.attention.paged_backend import PagedBackend
from tfserve.model.attention.paged_kernels import DecodeWork, FlashKernels, VarlenKernels
from tfserve.model.attention.torch_backend import TorchBackend

FAMILIES = {"flash_attn": FlashKernels, "torch_varlen": VarlenKernels}


@pytest.fixture(params=FAMILIES)
def backend(request) -> PagedBackend:
    kernels = FAMILIES[request.param].load()
    if kernels is None:
        pytest.skip(f"{request.param} is not on this machine")
    return PagedBackend(kernels)


@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_decode_of_unequal_lengths_equals_dense(backend, head_dim, group):
    parity.decode_equals_dense(backend, "cuda", head_dim, group)


@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_prefill_chunks_equal_dense(backend, head_dim, group):
    parity.chunks_equal_dense(backend, "cuda", head_dim, group)


@pytest.mark.parametrize("seed", SEEDS)
def test_random_mixed_steps_equal_dense(backend, seed):
    parity.random_mixed_step_equals_dense(backend, "cuda", seed)


def test_stale_kv_is_never_read(backend):
    """The guarantee of `reads_stale_kv = False`: NaN in stale KV has no effect, so no step must wait for a check."""
    parity.stale_kv_is_never_read(backend, "cuda")


def test_long_contexts_equal_dense(backend):
    parity.long_context_equals_dense(backend, "cuda")


def test_plain_pytorch_equals_dense_on_the_same_pages():
    for query_lens, decodes in (([1, 1, 1], 3), ([1, 40, 300], 1)):
        cache = paged_cache([255, 600, 0], "cuda", head_dim=64)
        check(cache, query_lens, decodes, 4, parity.ATOL[torch.bfloat16], TorchBackend())


def test_padding_rows_give_zeros_and_finite_null_block(backend):
    cache = paged_cache([255], "cuda", head_dim=128)
    batch = cache.batch([1], 1)
    lens = torch.tensor([256, 0], dtype=torch.int32, device="cuda")
    tables = torch.zeros(2, 1, dtype=torch.int32, device="cuda")
    tables[0] = int(batch.block_tables[0, 0])
    slots = torch.cat([batch.slots, torch.zeros(1, dtype=torch.int64, device="cuda")])
    qkv = torch.randn(2, 12, 128, device="cuda", dtype=torch.bfloat16)
    out = backend.build_decode(slots, DecodeWork(lens, tables), cache.kv).attend(0, *qkv.split((8, 2, 2), 1))
    assert not out[1].any()
    assert cache.kv.layers[0][0][0].isfinite().all()


def test_pages_more_than_two_to_the_31_elements_apart(backend):
    """A kernel or an index in 32 bits would read or write somewhere else."""
    kv_heads, width, layers = 8, 128, 32
    per_block = layers * 2 * 256 * kv_heads * width
    num_blocks = 2**31 // per_block + 3
    storage = torch.zeros(num_blocks, layers, 2, 256, kv_heads, width, dtype=torch.bfloat16, device="cuda")
    kv = PagedKV([(storage[:, layer, 0], storage[:, layer, 1]) for layer in range(layers)])
    gen = torch.Generator("cuda").manual_seed(0)
    near = torch.randn(2, 255, kv_heads, width, generator=gen, device="cuda").bfloat16()
    last = num_blocks - 1
    for block in (1, last):
        storage[block, 31, :, :255] = near
    qkv = torch.randn(1, 48, width, generator=gen, device="cuda").bfloat16().expand(2, -1, -1)
    tables = torch.tensor([[1], [last]], dtype=torch.int32, device="cuda")
    lens = torch.full((2,), 256, dtype=torch.int32, device="cuda")
    slots = torch.tensor([1 * 256 + 255, last * 256 + 255], device="cuda")
    q, k, v = qkv.split((32, kv_heads, kv_heads), 1)
    out = backend.build_decode(slots, DecodeWork(lens, tables), kv).attend(31, q, k, v)
    assert torch.equal(storage[last, 31, 0, 255], k[1])
    assert torch.equal(storage[last, 31, 1, 255], v[1])
    assert out[0].any()
    assert torch.equal(out[0], out[1])
