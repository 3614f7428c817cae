"""The columns of a snapshot are what the tracker and the memory manager write, wherever the rows of requests move."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tfserve.engine.scheduling.cost_model import CostModel
from tfserve.engine.scheduling.snapshots import Snapshots
from tfserve.engine.scheduling.tracker import Tracker
from tfserve.memory.block_pool import BlockPool
from tfserve.memory.kv_manager import KVCacheManager
from tfserve.memory.residency import KVState
from tfserve.plan import Ack, Copy, StepId

BLOCK = 4


class World:
    """A tracker and a memory manager that live together; copies end when the test says so."""

    def __init__(self, num_host_blocks: int) -> None:
        host = BlockPool(num_host_blocks) if num_host_blocks else None
        self.tracker = Tracker(20.0)
        self.kv = KVCacheManager(self.tracker.table, BlockPool(20), BLOCK, 64, host)
        cost = CostModel(kv_bytes_per_token=1, max_num_seqs=8)
        self.snapshots = Snapshots(self.kv, self.tracker, cost, max_num_seqs=8, max_num_batched_tokens=64)
        self.live: list[str] = []
        self.copies: list[Copy] = []
        self.step = 0

    def act(self, action: str, pick: int) -> None:
        req = self.live[pick % len(self.live)] if self.live else None
        if action == "add":
            # Ids come again: the same name may be another request.
            name = f"r{pick % 7}"
            if name not in self.live:
                self.live.append(name)
                self.tracker.add(name, arrival_s=0.0, num_prompt=3, max_tokens=9, rate=None)
        elif action == "ack" and self.copies:
            copy = self.copies.pop(0)
            self.kv.ack(Ack(copy.id, pick % 5 > 0, copy.num_tokens, 0.0, 1.0))
        elif req is not None:
            self._act_on(action, req, pick)

    def _act_on(self, action: str, req: str, pick: int) -> None:
        state = self.kv.view(req).state
        if action == "run" and state in (KVState.NONE, KVState.DEVICE):
            self.step += 1
            self.kv.begin_step(StepId(self.step))
            self.kv.extend(req, 1 + pick % 9, 20)
        elif action == "store":
            self.copies += self.kv.plan_stores(self.live, pick)
        elif action == "preempt" and state is KVState.DEVICE:
            self.copies += self.kv.preempt(req)
        elif action == "resume" and state in (KVState.STORING, KVState.HOST, KVState.PARTIAL):
            self.copies += self.kv.resume(req, pick % 4)
        elif action == "leave":
            self.kv.release(req)
            self.tracker.remove(req, completed=False)
            self.live.remove(req)

    def check(self) -> None:
        columns = self.snapshots.take(1.0).columns
        views = [self.kv.view(req) for req in columns.ids]
        assert sorted(columns.ids) == sorted(self.live)
        assert columns.num_computed.tolist() == [view.num_tokens for view in views]
        assert columns.device_blocks.tolist() == [view.num_device_blocks for view in views]
        assert columns.host_tokens.tolist() == [view.num_host_tokens for view in views]
        self.kv.check()
        self.tracker.table.check()


ACTIONS = ["add", "run", "run", "store", "preempt", "resume", "ack", "leave", "look"]


@settings(max_examples=150, deadline=None)
@given(
    actions=st.lists(st.tuples(st.sampled_from(ACTIONS), st.integers(0, 40)), max_size=60),
    num_host_blocks=st.sampled_from([0, 4, 40]),
)
def test_columns_are_what_looking_every_request_up_gives(actions, num_host_blocks):
    world = World(num_host_blocks)
    for action, pick in actions:
        if action == "look":
            world.check()
        else:
            world.act(action, pick)
    world.check()


def test_counters_in_the_row_of_another_request_are_noticed():
    world = World(40)
    for action, pick in (("add", 3), ("run", 3), ("add", 4)):
        world.act(action, pick)
    world.check()
    first, second = (world.tracker.table.ref(req) for req in world.live)
    first.index, second.index = second.index, first.index
    with pytest.raises(AssertionError, match="looked for elsewhere"):
        world.tracker.table.check()
    with pytest.raises(AssertionError, match="r3"):
        world.kv.check()


def test_a_row_that_was_removed_can_not_be_written():
    table = Tracker(20.0).table
    table.add("a")
    ref = table.add("b")
    table.remove("b")
    table.remove("a")
    with pytest.raises(IndexError):
        table.num_computed[ref.index] = 1


def test_a_policy_can_not_write_to_the_table():
    world = World(0)
    for action in ("add", "run"):
        world.act(action, 3)
    columns = world.snapshots.take(1.0).columns
    for column in (columns.num_computed, columns.state, columns.reading.consumed):
        with pytest.raises(ValueError):  # noqa: PT011 - the words are numpy's
            column[0] = 7
    world.check()
