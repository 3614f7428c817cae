"""What of the decode graphs needs no GPU: the ladder, the widths, and that padded inputs change no result."""

from __future__ import annotations

import pytest
import torch

from tests.model import fake_flash_attn as fake
from tests.model.paged_parity import paged_cache
from tfserve.model.attention.paged_backend import PagedBackend
from tfserve.model.attention.paged_kernels import FlashKernels
from tfserve.model.cuda_graphs import DecodeInputs, ladder, widths

H100_PROCESSORS = 132


@pytest.mark.parametrize("most", [1, 2, 3, 16, 17, 31, 32, 100, 128, 129, 256, 257, 1000])
def test_the_ladder_ends_at_the_most_and_pads_little(most):
    rungs = ladder(most)
    assert rungs == sorted(set(rungs))
    assert rungs[-1] == most
    for n in range(1, most + 1):
        size = next(rung for rung in rungs if rung >= n)
        assert size - n < max(16, n / 2) or size == 2 * n - 1 or n <= 16
    assert len(rungs) <= 12 + most // 32


def test_only_batches_that_leave_the_chip_empty_get_a_graph_for_each_width():
    assert widths(1, 8, H100_PROCESSORS, 32) == [1, 2, 4, 8, 16, 32]
    assert widths(16, 8, H100_PROCESSORS, 20) == [1, 2, 4, 8, 16, 20]
    assert widths(27, 8, H100_PROCESSORS, 32) == [32]
    assert widths(1, 8, H100_PROCESSORS, 1) == [1]


@pytest.mark.parametrize("lengths", [[255, 30, 600], [0], [0, 1, 255, 256]])
def test_padded_inputs_change_no_result_and_forget_the_batch_before(lengths):
    backend = PagedBackend(FlashKernels(fake.flash_attn_with_kvcache, fake.flash_attn_varlen_func))
    inputs = DecodeInputs.zeros(6, 4, torch.device("cpu"))
    busy = paged_cache([700] * 6, "cpu", head_dim=64)
    inputs.fill(busy.batch([1] * 6, 6))

    n = len(lengths)
    qkv = torch.randn(6, 8, 64, generator=torch.Generator().manual_seed(1)).bfloat16()
    plain, padded = (paged_cache(lengths, "cpu", head_dim=64) for _ in range(2))
    batch = plain.batch([1] * n, n)
    expected = backend.build(batch, plain.kv).attend(1, *qkv[:n].split((4, 2, 2), 1))

    inputs.fill(batch)
    ids, positions, slots = inputs.tokens
    assert torch.equal(positions[:n], batch.positions)
    assert not ids[n:].any()
    assert not slots[n:].any()
    step = backend.build_decode(slots, inputs.work(), padded.kv)
    out = step.attend(1, *qkv.split((4, 2, 2), 1))
    assert torch.equal(out[:n], expected)
    assert not out[n:].any()
    # Beside the null block, which padding writes, the caches are the same.
    for layer in range(2):
        for one, other in zip(plain.kv.layers[layer], padded.kv.layers[layer], strict=True):
            assert torch.equal(one[1:], other[1:])
