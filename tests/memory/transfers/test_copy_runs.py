"""Copies become runs and rectangles: which neighbours go together, and which bytes that is."""

from __future__ import annotations

from collections import deque

import numpy as np
import pytest

from tests.memory.transfers.fake_link import FakeLink
from tfserve.memory.transfers.copy_runs import BlockGeometry, blocks_per_chunk, take_run
from tfserve.plan import BlockId, Copy, CopyId, Direction

PAGES, BLOCK, ROW = 6, 4, 3
GEOMETRY = BlockGeometry(PAGES, BLOCK, ROW)


def copy(number: int, device_block: int, host_block: int, start: int = 0, num_tokens: int = BLOCK) -> Copy:
    return Copy(CopyId(number), Direction.STORE, BlockId(device_block), BlockId(host_block), start, num_tokens)


def runs_of(copies: list[Copy], *, most: int = 100, chunk: int = 100, joins=lambda copy: True) -> list[list[int]]:
    queue, runs = deque(copies), []
    while queue:
        runs.append([each.id for each in take_run(queue, joins, most=most, blocks_per_chunk=chunk)])
    return runs


def test_neighbours_on_both_tiers_go_together():
    copies = [copy(0, 1, 5), copy(1, 2, 6), copy(2, 3, 8), copy(3, 4, 9), copy(4, 9, 10)]
    assert runs_of(copies) == [[0, 1], [2, 3], [4]]


def test_only_the_same_tokens_go_together():
    assert runs_of([copy(0, 1, 1, 0, 2), copy(1, 2, 2, 0, 2), copy(2, 3, 3), copy(3, 4, 4, 2, 2)]) == [[0, 1], [2], [3]]


def test_a_run_has_a_most_and_ends_before_what_may_not_join():
    copies = [copy(i, i + 1, i + 1) for i in range(5)]
    assert runs_of(copies, most=2) == [[0, 1], [2, 3], [4]]
    assert runs_of(copies, joins=lambda each: each.id != 3) == [[0, 1, 2], [3, 4]]


@pytest.mark.parametrize("first", range(9))
def test_no_run_crosses_a_border_of_registered_memory(first):
    copies = [copy(i, i + 1, first + i) for i in range(9)]
    runs = runs_of(copies, chunk=3)
    for run in runs:
        assert len({(first + i) // 3 for i in run}) == 1
    assert len(runs) == len({(first + i) // 3 for i in range(9)})
    assert [i for run in runs for i in run] == list(range(9))


@pytest.mark.parametrize("block_bytes", [100, 4096, 6144, 33554432, 3 * 1024 * 1024 * 1024])
def test_chunks_end_on_page_boundaries(block_bytes):
    blocks = blocks_per_chunk(block_bytes, 2**30)
    assert blocks >= 1
    assert blocks * block_bytes % 4096 == 0
    assert blocks * block_bytes <= max(2**30, block_bytes * 4096)


def test_whole_blocks_are_one_row_and_ranges_one_rectangle():
    whole = GEOMETRY.rectangle(copy(0, 2, 5), 3)
    assert (whole.rows, whole.nbytes) == (1, 3 * GEOMETRY.block_bytes)
    part = GEOMETRY.rectangle(copy(0, 2, 5, 1, 2), 3)
    assert (part.rows, part.width, part.pitch) == (3 * PAGES, 2 * ROW, BLOCK * ROW)
    assert part.nbytes == 3 * 2 * GEOMETRY.token_bytes


@pytest.mark.parametrize("seed", range(20))
def test_a_rectangle_is_exactly_the_tokens_of_the_copies(seed):
    rng = np.random.default_rng(seed)
    n = int(rng.integers(1, 4))
    dev, host = (int(rng.integers(1, 9 - n)) for _ in range(2))
    start = int(rng.integers(0, BLOCK))
    num_tokens = int(rng.integers(1, BLOCK - start + 1))
    device, memory = (rng.integers(0, 256, (9, PAGES, BLOCK, ROW), np.uint8) for _ in range(2))
    expected = memory.copy()
    expected[host : host + n, :, start : start + num_tokens] = device[dev : dev + n, :, start : start + num_tokens]
    link = FakeLink(device.reshape(-1), memory.reshape(-1))
    link.start(Direction.STORE, GEOMETRY.rectangle(copy(0, dev, host, start, num_tokens), n), [])
    link.run_all()
    np.testing.assert_array_equal(memory, expected)
