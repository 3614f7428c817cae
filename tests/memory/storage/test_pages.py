from __future__ import annotations

import mmap

import numpy as np

from tfserve.memory.storage.pages import lazy_pages


def test_pages_are_aligned_and_zero_and_can_be_written():
    memory = np.frombuffer(lazy_pages(3 * mmap.PAGESIZE + 8), np.uint8)
    assert memory.ctypes.data % mmap.PAGESIZE == 0
    assert memory.nbytes == 3 * mmap.PAGESIZE + 8
    assert not memory.any()
    memory[-1] = 1
    assert memory.sum() == 1
