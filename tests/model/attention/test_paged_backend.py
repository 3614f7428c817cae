"""The adapters of flash-attn and torch's varlen_attn, over fakes that make the real checks; tests/gpu has the real."""

from __future__ import annotations

import inspect
import re

import pytest
import torch

from tests.model import fake_flash_attn as fake
from tests.model import paged_parity as parity
from tests.model.paged_cache import Cache
from tests.model.paged_parity import GROUPS, HEAD_DIMS, SEEDS, paged_cache
from tfserve.errors import ConfigError
from tfserve.install_hint import install_command
from tfserve.memory.storage.kv_layout import KVOrder
from tfserve.model import attention
from tfserve.model.attention import select_backend
from tfserve.model.attention.paged_backend import PagedBackend, as_rows
from tfserve.model.attention.paged_kernels import DecodeWork, FlashKernels, VarlenKernels
from tfserve.model.attention.torch_backend import TorchBackend

KERNELS = {
    "flash_attn": FlashKernels(fake.flash_attn_with_kvcache, fake.flash_attn_varlen_func),
    "torch_varlen": VarlenKernels(fake.varlen_attn),
}


@pytest.fixture(params=KERNELS)
def backend(request) -> PagedBackend:
    return PagedBackend(KERNELS[request.param])


@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_decode_of_unequal_lengths_equals_dense(backend, head_dim, group):
    parity.decode_equals_dense(backend, "cpu", head_dim, group)


@pytest.mark.parametrize("group", [1, 3, 8])
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_prefill_chunks_equal_dense(backend, head_dim, group):
    parity.chunks_equal_dense(backend, "cpu", head_dim, group)


@pytest.mark.parametrize("seed", SEEDS)
def test_random_mixed_steps_equal_dense(backend, seed):
    parity.random_mixed_step_equals_dense(backend, "cpu", seed)


def test_stale_kv_is_never_read(backend):
    assert not backend.reads_stale_kv
    parity.stale_kv_is_never_read(backend, "cpu")


def test_plain_pytorch_which_says_that_it_reads_stale_kv_does():
    assert TorchBackend.reads_stale_kv
    with pytest.raises(AssertionError):
        parity.stale_kv_is_never_read(TorchBackend(), "cpu")


def test_long_contexts_equal_dense(backend):
    parity.long_context_equals_dense(backend, "cpu")


def test_a_decode_step_from_device_tensors_equals_one_from_a_batch_and_padding_gives_zeros(backend):
    outs = []
    for padded in (False, True):
        cache = paged_cache([255, 30], "cpu", head_dim=64)
        batch = cache.batch([1, 1], 2)
        step = backend.build(batch, cache.kv)
        qkv = torch.randn(2, 8, 64, generator=torch.Generator().manual_seed(2)).to(torch.bfloat16)
        if padded:
            # A third row as a graph pads it: nothing in its context, K and V written to the null block.
            lens = torch.tensor([256, 31, 0], dtype=torch.int32)
            tables = torch.zeros(3, 2, dtype=torch.int32)
            tables[:2, : batch.block_tables.shape[1]] = torch.from_numpy(batch.block_tables)
            slots = torch.cat([batch.slots, torch.zeros(1, dtype=torch.int64)])
            step = backend.build_decode(slots, DecodeWork(lens, tables), cache.kv)
            qkv = torch.cat([qkv, torch.ones(1, 8, 64, dtype=torch.bfloat16)])
        outs.append(step.attend(1, *qkv.split((4, 2, 2), 1)))
    assert torch.equal(outs[0], outs[1][:2])
    assert not outs[1][2].any()


def test_kv_that_is_not_block_major_is_refused(backend):
    cache = Cache([3], order=KVOrder.LAYER_MAJOR, block_size=256, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="strides"):
        backend.build(cache.batch([1], 1), cache.kv)


def test_rows_of_a_layer_are_a_view_that_skips_the_other_layers():
    cache = paged_cache([3], "cpu", head_dim=64)
    keys = cache.kv.layers[1][0]
    rows = as_rows(keys)
    assert rows.data_ptr() == keys.data_ptr()
    per_block = 2 * 2 * 256
    assert torch.equal(rows[2 * per_block + 7], keys[2, 7].flatten())


def test_pages_are_multiples_of_256(backend):
    assert backend.block_size(None) == 256
    assert backend.block_size(512) == 512
    with pytest.raises(ConfigError, match=r"block_size: .* multiple of 256, got 32"):
        backend.block_size(32)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"cache_seqlens": torch.ones(2, dtype=torch.int64)}, "seqlens_k must have dtype int32"),
        ({"block_table": torch.ones(2, 1, dtype=torch.int64)}, "block_table must have dtype torch.int32"),
        ({"k_cache": torch.zeros(3, 128, 2, 64).half()}, "divisible by 256"),
        ({"q": torch.zeros(2, 1, 3, 64).half()}, "must divide number of heads in query"),
        ({"q": torch.zeros(2, 1, 4, 64)}, "fp16 and bf16"),
        ({"block_table": torch.full((2, 1), 9, dtype=torch.int32)}, "no such page"),
    ],
)
def test_the_fake_refuses_what_the_real_one_refuses(change, message):
    pages = torch.zeros(3, 256, 2, 64).half()
    good = {
        "q": torch.zeros(2, 1, 4, 64).half(),
        "k_cache": pages,
        "v_cache": pages,
        "cache_seqlens": torch.ones(2, dtype=torch.int32),
        "block_table": torch.ones(2, 1, dtype=torch.int32),
    }
    assert not fake.flash_attn_with_kvcache(**good).any()
    with pytest.raises(RuntimeError, match=message):
        fake.flash_attn_with_kvcache(**{**good, **change})


def test_the_fake_has_torchs_own_parameters():
    """Where torch has a varlen_attn that reads pages, ours calls it as the fake is called."""
    if VarlenKernels.load() is None:
        pytest.skip("this torch cannot read paged KV")
    from torch.nn.attention.varlen import varlen_attn

    real, ours = (inspect.signature(f).parameters for f in (varlen_attn, fake.varlen_attn))
    assert [(p.name, p.kind) for p in ours.values()] == [(real[name].name, real[name].kind) for name in ours]


def test_a_paged_backend_off_a_gpu_is_an_error(caplog):
    for name in KERNELS:
        with pytest.raises(ConfigError, match=f"attention_backend: '{name}' needs an NVIDIA GPU"):
            select_backend(name, "cpu", "bfloat16", 64)


class Installed:
    """Stands for a kernel family that is there or not."""

    def __init__(self, kernels) -> None:
        self.kernels = kernels

    def load(self):
        return self.kernels


def test_on_a_gpu_the_first_family_that_is_there_is_taken(monkeypatch, caplog):
    flash, varlen = KERNELS.values()

    def offer(has_flash, has_varlen):
        families = {
            "flash_attn": Installed(flash if has_flash else None),
            "torch_varlen": Installed(varlen if has_varlen else None),
        }
        monkeypatch.setattr(attention, "_PAGED", families)

    offer(True, True)
    assert select_backend("auto", "cuda", "bfloat16", 128).name == "flash_attn"
    assert select_backend("torch_varlen", "cuda", "bfloat16", 128).name == "torch_varlen"
    assert select_backend("auto", "cuda", "float32", 128).name == "torch"
    assert "flash_attn does not compute in float32" in caplog.text
    with pytest.raises(ConfigError, match=r"dtype: .*'flash_attn' supports bfloat16, float16"):
        select_backend("flash_attn", "cuda", "float32", 128)
    with pytest.raises(ConfigError, match="heads of multiples of 8 up to 256"):
        select_backend("flash_attn", "cuda", "bfloat16", 320)
    offer(False, True)
    assert select_backend("auto", "cuda", "bfloat16", 128).name == "torch_varlen"
    with pytest.raises(ConfigError, match=re.escape(install_command("cuda"))):
        select_backend("flash_attn", "cuda", "bfloat16", 128)
    offer(False, False)
    assert select_backend("auto", "cuda", "bfloat16", 128).name == "torch"
    assert "falls back to plain PyTorch" in caplog.text
