from __future__ import annotations

import pytest
import torch

from tfserve.memory.storage.device_pool import DevicePool
from tfserve.memory.storage.kv_layout import KVLayout, KVOrder


def layout(order: KVOrder, dtype: torch.dtype = torch.float32) -> KVLayout:
    return KVLayout(order, num_layers=3, block_size=8, num_kv_heads=2, head_dim=4, dtype=dtype)


@pytest.mark.parametrize("order", list(KVOrder))
def test_layers_are_views_that_together_cover_the_storage_once(order: KVOrder) -> None:
    pool = DevicePool(layout(order), 5, "cpu")
    count = 0
    for pair in pool.layers():
        for pages in pair:
            assert pages.shape == (5, 8, 2, 4)
            pages.add_(1)
            count += pages.numel()
    assert count == pool.storage.numel()
    assert torch.equal(pool.storage, torch.ones_like(pool.storage))


@pytest.mark.parametrize("order", list(KVOrder))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bytes_are_those_of_the_storage(order: KVOrder, dtype: torch.dtype) -> None:
    pool = DevicePool(layout(order, dtype), 5, "cpu")
    assert pool.storage.nbytes == 5 * pool.layout.block_bytes
    assert pool.layout.block_bytes == 8 * pool.layout.token_bytes
    assert pool.storage.dtype == dtype


def test_block_major_keeps_a_block_contiguous() -> None:
    pool = DevicePool(layout(KVOrder.BLOCK_MAJOR), 5, "cpu")
    for pair in pool.layers():
        for pages in pair:
            pages[2] = 1
    block = pool.layout.block_bytes // 4
    assert torch.equal(pool.storage.flatten().nonzero()[:, 0], torch.arange(2 * block, 3 * block))


def test_layer_major_keeps_a_page_contiguous_with_keys_transposed() -> None:
    pool = DevicePool(layout(KVOrder.LAYER_MAJOR), 5, "cpu")
    keys, values = pool.layers()[1]
    token = torch.arange(2 * 4).view(2, 4).float()
    keys[3, 5] = token
    values[3, 5] = token
    page = pool.storage[1, 0, 3].view(2, 4, 8)  # [kv_heads, head_dim, block_size]
    assert torch.equal(page[:, :, 5], token)
    page = pool.storage[1, 1, 3].view(2, 8, 4)  # [kv_heads, block_size, head_dim]
    assert torch.equal(page[:, 5], token)
    assert pool.storage.count_nonzero() == 2 * 7


def test_the_order_follows_the_device() -> None:
    sizes = {"num_layers": 3, "block_size": 8, "num_kv_heads": 2, "head_dim": 4}
    assert KVLayout.for_device("cpu", "float32", **sizes) == layout(KVOrder.LAYER_MAJOR)
    assert KVLayout.for_device("cuda", "bfloat16", **sizes) == layout(KVOrder.BLOCK_MAJOR, torch.bfloat16)


def test_storage_is_zero_and_aligned() -> None:
    storage = DevicePool(layout(KVOrder.LAYER_MAJOR), 50, "cpu").storage
    assert not storage.any()
    assert storage.data_ptr() % 64 == 0
