"""KVCacheManager: what preemption, resumption and write-through do to blocks, and in which order copies may run."""

from __future__ import annotations

import pytest

from tests.memory.fakes import FakeTiers
from tfserve.engine.scheduling.table import RequestTable
from tfserve.memory.block_pool import BlockPool
from tfserve.memory.kv_manager import KVCacheManager
from tfserve.memory.residency import TRANSITIONS, KVState
from tfserve.plan import Ack, Copy, CopyId, Direction

STORE, LOAD = Direction.STORE, Direction.LOAD


def tokens_of(copies: list[Copy]) -> int:
    return sum(copy.num_tokens for copy in copies)


def test_clean_blocks_are_free_at_once_and_dirty_ones_when_their_store_is_acknowledged():
    tiers = FakeTiers()
    tiers.step({"1": 10})
    tiers.step({}, order=["1"], budget=100)
    tiers.drain()
    assert tiers.kv.view("1").num_host_tokens == 8
    free = tiers.kv.num_free_blocks
    copies = tiers.preempt("1")
    assert [(copy.direction, copy.start, copy.num_tokens) for copy in copies] == [(STORE, 0, 2)]
    assert tiers.state("1") is KVState.STORING
    assert (tiers.kv.num_free_blocks, tiers.kv.num_storing_blocks) == (free + 2, 1)
    tiers.drain()
    assert tiers.state("1") is KVState.HOST
    assert tiers.kv.num_free_blocks == free + 3


def test_a_resume_whose_blocks_are_still_its_own_moves_nothing():
    tiers = FakeTiers()
    tiers.step({"1": 10})
    tiers.preempt("1")
    assert tiers.resume("1") == []
    assert tiers.state("1") is KVState.DEVICE
    tiers.drain()
    tiers.step({"1": 1})
    assert tiers.wrong == []


def test_paused_blocks_are_taken_only_as_far_as_needed_and_resume_loads_those_alone():
    tiers = FakeTiers(num_blocks=9)
    tiers.step({"1": 20})
    tiers.preempt("1")
    tiers.drain()
    assert tiers.kv.num_free_blocks == 8
    tiers.step({"2": 20})
    assert tiers.kv.view("1").num_device_blocks == 3
    tiers.kv.release("2")
    assert tokens_of(tiers.resume("1")) == 8
    assert tiers.state("1") is KVState.LOADING
    tiers.drain()
    assert tiers.resumed == ["1"]
    assert tiers.intact("1")


def test_a_resumed_request_stores_only_its_new_tokens():
    tiers = FakeTiers()
    tiers.step({"1": 10})
    tiers.preempt("1")
    tiers.drain()
    tiers.resume("1")
    tiers.step({"1": 1})
    assert tokens_of(tiers.preempt("1")) == 1


def test_requests_swap_places_while_stores_are_still_under_way():
    tiers = FakeTiers(num_blocks=6)
    tiers.step({"1": 20})
    tiers.preempt("1")
    tiers.drain()
    tiers.step({"2": 20})
    evictions, loads = tiers.preempt("2"), tiers.resume("1")
    assert len(loads) == 5
    assert {copy.after.copies for copy in loads} == {(copy.id,) for copy in evictions}
    assert tiers.state("1") is KVState.LOADING
    # Each load comes in as soon as its own block has gone out.
    assert not tiers.device.move(LOAD)
    assert tiers.device.move(STORE)
    assert tiers.device.move(LOAD)
    assert not tiers.device.move(LOAD)
    tiers.drain()
    assert tiers.state("1") is KVState.DEVICE
    assert tiers.intact("1")
    tiers.kv.release("1")
    tiers.resume("2")
    tiers.drain()
    assert tiers.intact("2")


def test_without_overlap_loads_wait_for_every_eviction_under_way():
    tiers = FakeTiers(num_blocks=12, load_evict_overlap=False)
    tiers.step({"1": 20})
    tiers.preempt("1")
    tiers.drain()
    tiers.step({"2": 36})
    tiers.step({"3": 8})
    evictions = tiers.preempt("3")
    tiers.kv.release("2")
    loads = tiers.resume("1")
    assert {copy.after.copies for copy in loads} == {tuple(copy.id for copy in evictions)}
    tiers.drain()
    assert tiers.intact("1")


def test_a_resume_is_partial_while_memory_is_short():
    tiers = FakeTiers(num_blocks=6)
    tiers.step({"1": 20})
    tiers.preempt("1")
    tiers.drain()
    tiers.step({"2": 12})
    assert len(tiers.resume("1")) == 0
    assert tiers.kv.view("1").num_device_blocks == 2
    assert tiers.state("1") is KVState.PARTIAL
    tiers.drain()
    assert tiers.resumed == []
    tiers.kv.release("2")
    assert len(tiers.resume("1", max_blocks=2)) == 2
    assert tiers.state("1") is KVState.PARTIAL
    assert len(tiers.resume("1")) == 1
    tiers.drain()
    assert tiers.intact("1")


def test_a_half_done_resume_can_be_taken_back():
    tiers = FakeTiers(num_blocks=6)
    tiers.step({"1": 20})
    tiers.preempt("1")
    tiers.drain()
    tiers.step({"2": 20})
    tiers.kv.release("2")
    tiers.resume("1")
    assert tiers.preempt("1") == []
    assert tiers.state("1") is KVState.HOST
    tiers.cancel()
    assert tiers.kv.num_free_blocks == 5
    tiers.resume("1")
    tiers.drain()
    assert tiers.intact("1")


def test_write_through_follows_the_order_given_within_the_budget_and_in_store_chunks():
    tiers = FakeTiers(block_size=8, store_chunk_tokens=4)
    tiers.step({"1": 14, "2": 14})
    copies = tiers.kv.plan_stores(["2", "1"], 14)
    assert [(copy.start, copy.num_tokens) for copy in copies] == [(0, 8), (0, 4), (0, 4)]
    assert tiers.kv.num_queued_tokens(STORE) == 16
    assert tiers.kv.plan_stores(["2"], 100) == []


def test_write_through_leaves_out_what_the_step_being_planned_writes():
    tiers = FakeTiers()
    tiers.step({"1": 6})
    tiers.kv.extend("1", 2, 8)
    copies = tiers.kv.plan_stores(["1"], 100)
    assert tokens_of(copies) == 4
    assert copies[0].after.step == 0


def test_switches_off():
    without = FakeTiers(num_host_blocks=0)
    without.step({"1": 10})
    assert without.kv.plan_stores(["1"], 100) == []
    assert without.preempt("1") == []
    assert without.state("1") is KVState.NONE
    assert without.all_free()
    lazy = FakeTiers(write_through=False)
    lazy.step({"1": 10})
    assert lazy.kv.plan_stores(["1"], 100) == []
    assert tokens_of(lazy.preempt("1")) == 10


def test_full_host_pool_takes_copies_of_running_requests_least_likely_to_be_preempted_first():
    tiers = FakeTiers(num_host_blocks=5)
    tiers.step({"1": 8, "2": 8, "3": 8})
    tiers.step({}, order=["1", "2"], budget=100)
    tiers.drain()
    assert tiers.kv.num_free_host_blocks == 0
    assert len(tiers.preempt("3")) == 2
    assert [tiers.kv.view(req).num_host_tokens for req in "12"] == [8, 0]
    tiers.drain()
    assert tiers.state("3") is KVState.HOST


def test_full_host_pool_drops_the_tail_that_has_no_room():
    tiers = FakeTiers(num_host_blocks=4)
    tiers.step({"1": 8, "2": 14})
    tiers.preempt("1")
    tiers.preempt("2")
    tiers.drain()
    assert tiers.kv.view("2").num_tokens == 4
    assert tiers.kv.num_dropped_tokens == 10
    tiers.step({"3": 4})
    assert tiers.preempt("3") == []
    assert tiers.state("3") is KVState.NONE
    tiers.resume("2")
    tiers.drain()
    tiers.step({"2": 10})
    assert tiers.wrong == []


def test_release_parks_blocks_under_copy_and_cancels_what_has_not_started():
    tiers = FakeTiers()
    tiers.step({"1": 10})
    tiers.preempt("1")
    tiers.device.move(STORE)
    tiers.kv.release("1")
    assert tiers.kv.num_free_blocks == 13
    tiers.cancel()
    tiers.kv.check()
    assert tiers.kv.num_free_blocks == 15
    tiers.drain()
    assert tiers.all_free()


def test_a_failed_store_of_a_running_request_is_tried_again():
    tiers = FakeTiers()
    tiers.step({"1": 9})
    tiers.step({}, order=["1"], budget=100)
    tiers.device.move(STORE, ok=False)
    tiers.drain()
    assert tiers.kv.view("1").num_host_tokens == 0
    tiers.step({}, order=["1"], budget=100)
    tiers.drain()
    assert tiers.kv.view("1").num_host_tokens == 8


def test_a_failed_copy_of_a_paused_request_costs_the_tokens_from_there_on():
    tiers = FakeTiers()
    tiers.step({"1": 14})
    tiers.preempt("1")
    tiers.device.move(STORE)
    tiers.device.move(STORE, ok=False)
    tiers.drain()
    assert tiers.kv.view("1").num_tokens == 4
    tiers.step({"2": 64})
    tiers.kv.release("2")
    tiers.resume("1")
    tiers.device.move(LOAD, ok=False)
    tiers.drain()
    assert tiers.resumed == ["1"]
    assert tiers.state("1") is KVState.NONE
    assert tiers.all_free()


@pytest.mark.parametrize("honour_after", [True, False])
def test_a_store_that_does_not_wait_for_the_writing_step_loses_tokens(honour_after):
    """Two steps deep: the step that writes is still in flight when its request is preempted."""
    tiers = FakeTiers(depth=2, honour_after=honour_after)
    tiers.step({"1": 16})
    tiers.preempt("1")
    while tiers.device.move(STORE):
        pass
    tiers.drain()
    tiers.step({"2": 64})
    tiers.drain()
    tiers.kv.release("2")
    tiers.resume("1")
    tiers.drain()
    assert tiers.intact("1") is honour_after


@pytest.mark.parametrize("honour_after", [True, False])
def test_write_through_that_does_not_wait_for_the_writing_step_loses_tokens(honour_after):
    tiers = FakeTiers(depth=2, honour_after=honour_after)
    tiers.step({"1": 16})
    tiers.step({}, order=["1"], budget=100)
    while tiers.device.move(STORE):
        pass
    tiers.drain()
    tiers.preempt("1")
    tiers.step({"2": 64})
    tiers.drain()
    tiers.kv.release("2")
    tiers.resume("1")
    tiers.drain()
    assert tiers.intact("1") is honour_after


@pytest.mark.parametrize("honour_after", [True, False])
def test_a_load_that_does_not_wait_for_the_last_reader_spoils_its_step(honour_after):
    """Two steps deep: a clean victim's blocks are handed on while its last step still reads them."""
    tiers = FakeTiers(num_blocks=6, depth=2, honour_after=honour_after)
    tiers.step({"1": 16})
    tiers.preempt("1")
    tiers.drain()
    tiers.step({"2": 16})
    tiers.step({}, order=["2"], budget=100)
    tiers.drain()
    tiers.step({"2": 1})
    assert tokens_of(tiers.preempt("2")) == 1
    tiers.resume("1")
    while tiers.device.move(LOAD):
        pass
    tiers.drain()
    assert tiers.wrong == ([] if honour_after else ["2"])


@pytest.mark.parametrize("honour_after", [True, False])
def test_a_load_that_does_not_wait_for_the_eviction_spoils_the_victim(honour_after):
    tiers = FakeTiers(num_blocks=5, honour_after=honour_after)
    tiers.step({"1": 16})
    tiers.preempt("1")
    tiers.drain()
    tiers.step({"2": 16})
    tiers.preempt("2")
    tiers.resume("1")
    while tiers.device.move(LOAD):
        pass
    tiers.drain()
    tiers.preempt("1")
    tiers.drain()
    tiers.resume("2")
    tiers.drain()
    assert tiers.intact("2") is honour_after


def test_columns_tell_for_many_requests_what_views_tell_for_one():
    tiers = FakeTiers()
    tiers.step({"1": 10, "2": 9, "3": 8})
    tiers.step({}, order=["1", "3"], budget=100)
    tiers.drain()
    tiers.preempt("2")
    tiers.drain()
    tiers.step({"4": 37})
    table = tiers.table
    for req in ("3", "2", "1", "4"):
        view, row = tiers.kv.view(req), table.row(req)
        assert table["num_computed"][row] == view.num_tokens
        assert table["host_tokens"][row] == view.num_host_tokens
        assert table["device_blocks"][row] == view.num_device_blocks
    assert tiers.kv.view("unknown").num_tokens == 0
    assert "unknown" not in table


def test_illegal_moves_are_errors():
    tiers = FakeTiers()
    tiers.step({"1": 4})
    with pytest.raises(AssertionError, match="nothing to resume in KV state DEVICE"):
        tiers.resume("1")
    with pytest.raises(AssertionError, match="2: nothing to resume"):
        tiers.resume("2")
    tiers.preempt("1")
    with pytest.raises(AssertionError, match="cannot run in KV state STORING"):
        tiers.kv.extend("1", 1, 5)
    with pytest.raises(AssertionError, match="not under way"):
        tiers.kv.ack(Ack(CopyId(99), True, 0, 0.0, 0.0))
    with pytest.raises(AssertionError, match="still needs it"):
        tiers.kv.cancelled({CopyId(0)})
    with pytest.raises(ValueError, match="must divide"):
        KVCacheManager(RequestTable(), BlockPool(4), block_size=48, run_tokens=48)


def test_every_state_can_be_left_and_reached():
    assert set(TRANSITIONS) == set(KVState)
    assert set().union(*TRANSITIONS.values()) == set(KVState)
    assert all(KVState.NONE in after for state, after in TRANSITIONS.items() if state is not KVState.NONE)


def test_check_notices_a_cursor_ahead_of_the_acknowledgements():
    tiers = FakeTiers()
    tiers.step({"1": 8})
    tiers.kv.view("1").set_cursor(4)
    with pytest.raises(AssertionError, match="cursor 4, but 0 are on host"):
        tiers.kv.check()
