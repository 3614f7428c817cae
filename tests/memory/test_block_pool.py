"""BlockPool: nothing is lost, nothing is given twice, and neighbours are found when there are any."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from tfserve.engine.scheduling.table import RequestTable
from tfserve.memory.block_pool import BlockPool
from tfserve.memory.kv_manager import KVCacheManager


def test_allocation_is_all_or_nothing():
    pool = BlockPool(5)
    assert pool.allocate(5) is None
    assert pool.num_free == 4
    assert pool.allocate(4) == (1, 2, 3, 4)
    assert pool.allocate(1) is None


def test_blocks_follow_their_predecessor_and_requests_keep_apart():
    pool = BlockPool(64)
    first = pool.allocate(2, run=8)
    second = pool.allocate(3, run=8)
    assert first == (1, 2)
    assert second == (9, 10, 11)
    assert pool.allocate(1, after=first[-1], run=8) == (3,)
    assert pool.allocate(1, after=second[-1], run=8) == (12,)


def test_scattered_blocks_are_used_when_no_run_is_left():
    pool = BlockPool(9)
    held = pool.allocate(8)
    pool.free(held[::2])
    assert pool.allocate(3, run=4) == (1, 3, 5)


def test_shared_block_is_free_only_after_its_last_holder():
    pool = BlockPool(4)
    blocks = pool.allocate(2)
    pool.retain(blocks)
    pool.free(blocks)
    assert pool.num_free == 1
    pool.free(blocks)
    assert pool.num_free == 3


def test_double_free_and_sharing_a_free_block_are_errors():
    pool = BlockPool(4)
    blocks = pool.allocate(1)
    pool.free(blocks)
    with pytest.raises(ValueError, match="free already"):
        pool.free(blocks)
    with pytest.raises(ValueError, match="cannot be shared"):
        pool.retain(blocks)


def test_check_notices_a_lost_block():
    pool = BlockPool(4)
    pool.allocate(1)
    with pytest.raises(AssertionError, match="disagree"):
        pool.check([])


def test_manager_gives_just_the_blocks_a_request_needs():
    table = RequestTable()
    for req in ("a", "b"):
        table.add(req)
    kv = KVCacheManager(table, BlockPool(8), block_size=4, run_tokens=16)
    assert len(kv.extend("a", 5, 20)) == 2
    assert kv.extend("a", 3, 20) == ()
    assert len(kv.extend("a", 1, 20)) == 1
    assert kv.extend("b", 17, 17) is None
    assert kv.view("b").blocks == ()
    assert kv.view("a").num_tokens == 9
    kv.release("a")
    assert kv.num_free_blocks == 7
    kv.check()


class PoolMachine(RuleBasedStateMachine):
    """Random allocate, share and free against a model of the owners."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = BlockPool(33)
        self.held: list[tuple[int, ...]] = []

    @rule(n=st.integers(0, 12), run=st.sampled_from([1, 2, 4, 8]), chain=st.booleans())
    def allocate(self, n, run, chain):
        after = self.held[-1][-1] if chain and self.held and self.held[-1] else None
        free = self.pool.num_free
        blocks = self.pool.allocate(n, after=after, run=run)
        if blocks is None:
            assert n > free
        else:
            assert len(set(blocks)) == n
            self.held.append(blocks)

    @rule(index=st.integers(0, 100))
    def free(self, index):
        if self.held:
            self.pool.free(self.held.pop(index % len(self.held)))

    @rule(index=st.integers(0, 100))
    def share(self, index):
        if self.held:
            blocks = self.held[index % len(self.held)]
            self.pool.retain(blocks)
            self.held.append(blocks)

    @invariant()
    def conserved(self):
        self.pool.check(self.held)


TestPoolMachine = PoolMachine.TestCase
TestPoolMachine.settings = settings(max_examples=50, stateful_step_count=40, deadline=None)
