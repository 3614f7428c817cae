"""The loop over both memory tiers, under every policy: moved, dropped or computed again, tokens stay right."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.engine.fakes import FakeEngine, expected_output
from tfserve.engine.scheduling.policies import POLICIES as REGISTERED
from tfserve.messages import AbortRequest
from tfserve.plan import Direction
from tfserve.types import FinishReason

POLICIES = sorted(REGISTERED)
SHARING = ["round-robin", "earliest-underflow", "andes-offload", "tokenflow"]


@pytest.fixture(autouse=True, params=[1, 2], ids=["depth1", "depth2"])
def depth(request, monkeypatch):
    """Everything here holds at both depths of the pipeline."""
    monkeypatch.setattr(FakeEngine, "pipeline_depth", request.param)


def burst(engine: FakeEngine, n: int = 8, prompt: int = 10, max_tokens: int = 30, rate: float | None = 5.0) -> None:
    for i in range(n):
        engine.add(f"r{i}", [i + 1] * prompt, max_tokens, rate)


def assert_exact(engine: FakeEngine, n: int = 8, prompt: int = 10, max_tokens: int = 30) -> None:
    for i in range(n):
        assert engine.outputs[f"r{i}"] == expected_output([i + 1] * prompt, max_tokens)
        assert engine.finished[f"r{i}"].finish_reason is FinishReason.LENGTH
    engine.drain()
    assert engine.all_free()


@pytest.mark.parametrize("policy", SHARING)
@pytest.mark.parametrize("switch", [None, "write_through", "load_evict_overlap", "priority_writes"])
def test_a_burst_beyond_the_device_is_shared_by_moving_kv(policy, switch):
    off = {} if switch is None else {switch: False}
    engine = FakeEngine(24, num_host_blocks=120, policy=policy, schedule_interval_s=0.1, **off)
    burst(engine)
    engine.run()
    assert_exact(engine)
    assert engine.transfers.moved[Direction.LOAD] > 0


def test_the_end_of_a_late_copy_is_told_though_no_step_follows():
    engine = FakeEngine(24, num_host_blocks=120, policy="tokenflow", speeds=(1,))
    burst(engine, n=2)
    while not engine.finished:
        engine.core.step()
    for req in ("r0", "r1"):
        engine.core.inbox.put(AbortRequest(req))
    engine.core.step()
    while engine.scheduler.offload.is_busy:
        engine.core.step()
    stats = [message.stats for message in engine.messages][-1]
    assert (stats.num_free_blocks, stats.num_free_host_blocks) == (23, 119)


def test_without_write_through_only_preemptions_store():
    moved = {}
    for write_through in (True, False):
        engine = FakeEngine(64, num_host_blocks=120, policy="tokenflow", write_through=write_through)
        burst(engine, n=3)
        engine.run()
        assert engine.scheduler.num_preemptions == 0
        moved[write_through] = engine.transfers.moved[Direction.STORE]
    assert moved[True] > 0
    assert moved[False] == 0


@pytest.mark.parametrize("policy", SHARING)
def test_a_full_host_pool_only_makes_more_to_compute(policy):
    engine = FakeEngine(24, num_host_blocks=6, policy=policy, schedule_interval_s=0.1)
    burst(engine)
    engine.run()
    assert_exact(engine)
    assert engine.scheduler.num_preemptions > 0


@pytest.mark.parametrize("policy", SHARING)
@pytest.mark.parametrize("num_blocks", [12, 24])
def test_without_a_host_tier_no_request_is_preempted_just_before_its_next_token(policy, num_blocks):
    # Two tokens a step, five steps an interval: a request with 10 n + 1 tokens to compute lacks one token when the next
    # swap is due.
    engine = FakeEngine(num_blocks, max_num_batched_tokens=2, policy=policy, schedule_interval_s=0.1)
    burst(engine, n=4, prompt=20, max_tokens=20)
    engine.run()
    assert_exact(engine, n=4, prompt=20, max_tokens=20)


def test_a_failed_load_is_computed_again():
    engine = FakeEngine(24, num_host_blocks=120, policy="round-robin", schedule_interval_s=0.1)
    burst(engine)
    while not engine.transfers.moved[Direction.LOAD]:
        engine.step()
    engine.transfers.fail = set(range(10_000))
    for _ in range(20):
        engine.step()
    engine.transfers.fail = set()
    engine.run()
    assert_exact(engine)


def test_a_paused_and_a_loading_request_can_be_aborted():
    engine = FakeEngine(24, num_host_blocks=120, policy="round-robin", schedule_interval_s=0.1, speeds=(0, 0, 0, 0, 1))
    burst(engine)
    for group in (engine.scheduler.paused, engine.scheduler.loading):
        while not group:
            engine.step()
        req = next(iter(group))
        engine.core.inbox.put(AbortRequest(req))
        engine.step()
        assert engine.finished[req].finish_reason is FinishReason.ABORT
    engine.run()
    assert len(engine.finished) == 8
    engine.drain()
    assert engine.all_free()


def test_decoding_stops_while_a_reader_has_enough_and_goes_on_in_time():
    for policy in ("fcfs", "tokenflow"):
        engine = FakeEngine(policy=policy, generate_ahead_s=1.0)
        engine.add("r", [1, 2, 3], 60, rate=10.0)
        engine.run()
        assert engine.outputs["r"] == expected_output([1, 2, 3], 60)
        # 10 tokens are the second ahead; the other 50 are generated at reading speed.
        assert 4.5 < engine.finished["r"].times.finished_s < 5.5


def test_a_reader_beyond_the_capacity_is_refused_with_the_time_to_wait():
    engine = FakeEngine(policy="tokenflow", overload="shed")
    for i in range(30):
        engine.add(f"r{i}", [i + 1] * 10, 30, rate=200.0)
    engine.run()
    refused = [o for o in engine.finished.values() if o.finish_reason is FinishReason.ERROR]
    assert 0 < len(refused) < 30
    assert all("try again in" in output.error for output in refused)
    assert all(not output.token_ids for output in refused)


shapes = st.tuples(
    st.integers(1, 40),
    st.integers(1, 30),
    st.integers(0, 25),
    st.sampled_from([None, 0, 3, 9]),
    st.sampled_from([None, 2.0, 10.0, 50.0, "read"]),
    st.sampled_from([None, 1, 4, 12]),
)


@settings(max_examples=100, deadline=None)
@given(
    requests=st.lists(shapes, min_size=1, max_size=14),
    policy=st.sampled_from(POLICIES),
    num_blocks=st.integers(19, 60),
    num_host_blocks=st.sampled_from([0, 2, 5, 20, 80]),
    max_num_seqs=st.integers(1, 6),
    budget=st.integers(8, 24),
    ratio=st.sampled_from([0.0, 0.3, 1.0]),
    failing=st.sets(st.integers(0, 60), max_size=2),
    fail_copies=st.sets(st.integers(0, 60), max_size=3),
    speeds=st.lists(st.integers(0, 3), min_size=1, max_size=4).filter(any),
    overload=st.sampled_from(["queue", "share", "shed"]),
    interval=st.sampled_from([0.3, 1.0]),
    overlap=st.booleans(),
    write_through=st.booleans(),
    ahead=st.sampled_from([None, 0.5]),
    bps=st.sampled_from([3e3, 1e6]),
)
def test_whatever_arrives_everyone_ends_exactly_and_no_block_is_lost(
    requests, policy, num_blocks, num_host_blocks, max_num_seqs, budget, ratio, failing, fail_copies, speeds, overload,
    interval, overlap, write_through, ahead, bps,
):  # fmt: skip
    """Arrivals over time, aborts, stop tokens, failing steps and copies, scarce memory in both tiers; check() after
    every step.

    An interval is long enough to recompute a request: faster swaps make no progress.
    """
    engine = FakeEngine(
        num_blocks,
        4,
        max_num_seqs,
        budget,
        num_host_blocks=num_host_blocks,
        speeds=speeds,
        fail_copies=fail_copies,
        bps=bps,
        policy=policy,
        reserve_ratio=ratio,
        reserve_min_ratio=0.0,
        overload=overload if policy == "tokenflow" else "queue",
        schedule_interval_s=interval,
        min_residency_s=interval,
        load_evict_overlap=overlap,
        write_through=write_through,
        generate_ahead_s=ahead,
    )
    engine.runner.fail_on = failing
    aborts: dict[int, list[str]] = {}
    arrivals: dict[int, list[tuple[tuple[str, list[int], int, float | str | None], dict]]] = {}
    for i, (prompt, max_tokens, arrival, abort, rate, stop) in enumerate(requests):
        params = {} if stop is None else {"stop_token_ids": (expected_output([i + 1] * prompt, stop)[-1],)}
        arrivals.setdefault(arrival, []).append(((f"r{i}", [i + 1] * prompt, max_tokens, rate), params))
        if abort is not None:
            aborts.setdefault(arrival + abort, []).append(f"r{i}")
    for step in range(40):
        for request, params in arrivals.get(step, ()):
            engine.add(*request, **params)
        for req in aborts.get(step, ()):
            engine.core.inbox.put(AbortRequest(req))
        engine.step()
    engine.run()
    for i, (prompt, max_tokens, *_, stop) in enumerate(requests):
        got, end = engine.outputs[f"r{i}"], engine.finished[f"r{i}"].finish_reason
        assert got == expected_output([i + 1] * prompt, len(got))
        if end in (FinishReason.LENGTH, FinishReason.STOP):
            # The stop token may come earlier, by chance.
            assert len(got) == max_tokens if stop is None or end is FinishReason.LENGTH else len(got) <= stop
        else:
            assert len(got) < max_tokens
    engine.drain()
    assert engine.all_free()
    assert not engine.scheduler.has_work
