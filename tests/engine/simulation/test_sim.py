"""Virtual time: events in order, steps as long as their cost, copies as long as their link."""

from __future__ import annotations

import pytest

from tfserve.engine.scheduling.table import RequestTable
from tfserve.engine.simulation.clock import SimClock
from tfserve.engine.simulation.runner import SimRunner, sim_token
from tfserve.engine.simulation.transfers import SimLinks, SimTransfers
from tfserve.memory.block_pool import BlockPool
from tfserve.memory.kv_manager import KVCacheManager, OffloadOptions
from tfserve.memory.residency import KVState
from tfserve.plan import BlockId, Copy, CopyDeps, CopyId, Direction, SeqStep, SlotId, StepId, StepPlan

BLOCK = 16
TOKEN_BYTES = 1000
STORE_S = LOAD_S = BLOCK * TOKEN_BYTES / 1e6
"""A block over a link of 1 MB/s."""


def test_time_jumps_to_the_earliest_event_and_the_limit():
    clock = SimClock()
    seen = []
    for time_s in (3.0, 1.0, 2.0):
        clock.call_at(time_s, lambda t=time_s: seen.append((t, clock.now())))
    clock.wait(None)
    assert clock.now() == 1.0
    clock.wait(1.5)
    assert clock.now() == 1.5
    clock.advance_to(10.0)
    assert seen == [(1.0, 1.0), (2.0, 2.0), (3.0, 3.0)]
    assert clock.now() == 10.0
    clock.wait(12.0)
    assert clock.now() == 12.0


def test_events_of_one_moment_keep_their_order_and_may_cause_more():
    clock = SimClock()
    seen = []
    clock.call_at(1.0, lambda: clock.call_at(0.5, lambda: seen.append("caused")))
    clock.call_at(1.0, lambda: seen.append("second"))
    clock.wait(None)
    assert seen == ["second", "caused"]
    assert clock.now() == 1.0


def test_a_notification_ends_the_next_wait_only():
    clock = SimClock()
    clock.call_at(5.0, lambda: None)
    clock.notify()
    clock.wait(None)
    assert clock.now() == 0.0
    clock.wait(None)
    assert clock.now() == 5.0


def test_waiting_for_nothing_is_an_error():
    with pytest.raises(RuntimeError, match="nothing is going to happen"):
        SimClock().wait(None)


def plan(step: int, *seqs: SeqStep, n_decode: int = 0) -> StepPlan:
    return StepPlan(StepId(step), seqs, n_decode)


def test_a_step_costs_what_its_batch_costs_and_follows_the_one_before():
    clock = SimClock()
    asked = []

    def step_s(n_decode, decode_ctx, n_prefill, prefill_ctx):
        asked.append((n_decode, decode_ctx, n_prefill, prefill_ctx))
        return 0.5

    runner = SimRunner(clock, step_s, vocab_size=100)
    decode = SeqStep("a", SlotId(0), 9, 1, True, None)
    prefill = SeqStep("b", SlotId(1), 4, 6, False, (1,) * 6)
    first = runner.launch(plan(0, decode, prefill, n_decode=1))
    second = runner.launch(plan(1, decode, n_decode=1))
    assert asked == [(1, 10, 6, 6 * 7.0), (1, 10, 0, 0)]
    assert clock.now() == 0.0
    result = first.result()
    assert (clock.now(), result.device_s, result.tokens) == (0.5, 0.5, (sim_token("a", 10, 100),))
    follower = second.result()
    assert (follower.step, follower.idle_s) == (1, 0.0)
    assert clock.now() == 1.0
    clock.advance_to(1.25)
    assert runner.launch(plan(2, decode, n_decode=1)).result().idle_s == 0.25


def test_the_cpu_time_of_a_launch_passes_before_the_step_starts():
    clock = SimClock()
    runner = SimRunner(clock, lambda *work: 0.5, vocab_size=100, host_s=lambda _: 0.1)
    decode = SeqStep("a", SlotId(0), 9, 1, True, None)
    flights = [runner.launch(plan(step, decode, n_decode=1)) for step in range(3)]
    assert clock.now() == pytest.approx(0.3)
    assert [flight.result().idle_s for flight in flights] == [0.0, 0.0, 0.0]
    assert clock.now() == pytest.approx(0.1 + 3 * 0.5)
    assert runner.launch(plan(3, decode, n_decode=1)).result().idle_s == pytest.approx(0.1)


def test_tokens_depend_on_request_and_position_alone():
    tokens = [sim_token(req, position, 50) for req in "ab" for position in range(1000)]
    assert tokens == [sim_token(req, position, 50) for req in "ab" for position in range(1000)]
    assert set(tokens) == set(range(1, 50))
    assert tokens[:1000] != tokens[1000:]


def make_copy(number, direction, block, num_tokens=BLOCK):
    return Copy(CopyId(number), direction, BlockId(block), BlockId(block), 0, num_tokens, CopyDeps())


def end_times(copies, **options):
    clock = SimClock()
    links = SimLinks(store_bytes_per_s=1e6, load_bytes_per_s=2e6, **options)
    transfers = SimTransfers(clock, links, TOKEN_BYTES)
    transfers.submit(copies)
    clock.advance_to(100.0)
    return {ack.id: pytest.approx(ack.end_s) for ack in transfers.poll()}


def test_copies_take_bytes_over_bandwidth_and_latency_once_per_run():
    copies = [make_copy(i, Direction.STORE, block, 10) for i, block in enumerate((1, 2, 5))]
    assert end_times([*copies, make_copy(3, Direction.LOAD, 7, 10)], latency_s=0.1) == {
        0: 0.11,
        1: 0.12,
        2: 0.23,
        3: 0.105,
    }


def test_directions_that_contend_slow_each_other_down():
    copies = [make_copy(0, Direction.STORE, 1, 10), make_copy(1, Direction.LOAD, 2, 10)]
    assert end_times(copies) == {0: 0.01, 1: 0.005}
    assert end_times(copies, contention=2.0) == {0: 0.01, 1: 0.01}


def swap_s(num_blocks: int = 8, **options) -> tuple[float, int]:
    """Virtual seconds from preempting one request to having another of equal size back; and blocks stored in them."""
    clock = SimClock()
    table = RequestTable()
    for req in ("back", "away"):
        table.add(req)
    device, host = BlockPool(num_blocks + 1), BlockPool(4 * num_blocks)
    kv = KVCacheManager(table, device, BLOCK, 64 * BLOCK, host, options=OffloadOptions(**options))
    transfers = SimTransfers(clock, SimLinks(store_bytes_per_s=1e6, load_bytes_per_s=1e6), TOKEN_BYTES)

    def settle():
        while clock.next_event_s is not None:
            clock.wait(None)
            for ack in transfers.poll():
                kv.ack(ack)
            kv.check()
            if kv.view("back").state is KVState.PARTIAL:
                transfers.submit(kv.resume("back", num_blocks))

    for step, req in enumerate(("back", "away")):
        kv.begin_step(StepId(step))
        assert kv.extend(req, num_blocks * BLOCK, num_blocks * BLOCK) is not None
        transfers.complete(StepId(step))
        kv.begin_step(StepId(step + 1))
        transfers.submit(kv.plan_stores([req], 1_000_000))
        settle()
        if req == "back":
            transfers.submit(kv.preempt(req))
            settle()
    start_s = clock.now()
    stores = kv.preempt("away")
    transfers.submit([*stores, *kv.resume("back", num_blocks)])
    settle()
    assert kv.view("back").state is KVState.DEVICE
    assert kv.view("away").state is KVState.HOST
    return clock.now() - start_s, len(stores)


def test_write_through_and_overlap_pay_what_they_promise():
    full_s, stored = swap_s()
    assert (full_s, stored) == (pytest.approx(8 * LOAD_S), 0)
    late_s, stored = swap_s(write_through=False)
    assert (late_s, stored) == (pytest.approx(STORE_S + 8 * LOAD_S), 8)
    apart_s, _ = swap_s(write_through=False, load_evict_overlap=False)
    assert apart_s == pytest.approx(8 * STORE_S + 8 * LOAD_S)
