"""What the core reports of live requests: admission, refusal, reading progress, and resumes with their path."""

from __future__ import annotations

import pytest

from tests.engine.fakes import FakeEngine
from tfserve.engine.scheduling.reasons import Cause, Reason, ReasonLog
from tfserve.messages import ListStreams, ReportPlayed, StepOutputs, StreamStates
from tfserve.types import FinishReason, StreamState, Tenant


def streams_of(engine: FakeEngine) -> dict[str, StreamState]:
    engine.core.inbox.put(ListStreams(7))
    engine.step()
    answer = [message for message in engine.messages if isinstance(message, StreamStates)][-1]
    assert answer.query == 7
    return {state.id: state for state in answer.streams}


def test_every_request_is_admitted_once_or_refused_with_a_retry_time():
    engine = FakeEngine(policy="tokenflow", overload="shed", num_blocks=30, num_host_blocks=100)
    for i in range(30):
        engine.add(f"r{i}", [i + 1] * 10, 30, rate=200.0)
    engine.run()
    started = [req for message in engine.messages if isinstance(message, StepOutputs) for req in message.started]
    refused = {req for req, last in engine.finished.items() if last.retry_after_s is not None}
    assert len(started) == len(set(started))
    assert refused
    assert set(started) | refused == set(engine.finished)
    assert not set(started) & refused
    assert all(engine.finished[req].finish_reason is FinishReason.ERROR for req in refused)
    assert all(engine.finished[req].retry_after_s >= 0 for req in refused)


def test_of_those_without_a_reader_the_smallest_priority_is_served_first():
    engine = FakeEngine(policy="tokenflow", max_num_seqs=1)
    engine.add("reader", [1, 2, 3], 20, rate=5.0)
    engine.step()
    for req, priority in (("later", 1), ("first", -1), ("second", 0)):
        engine.add(req, [4, 5, 6], 5, priority=priority)
    engine.run()
    assert [req for req in engine.finished if req != "reader"] == ["first", "second", "later"]


def test_being_let_in_is_told_before_the_first_token_of_a_long_prompt():
    engine = FakeEngine(max_num_batched_tokens=8)
    engine.add("long", list(range(1, 41)), 3)
    engine.step()
    assert engine.messages[0].started == ["long"]
    assert engine.messages[0].outputs == []


def test_a_readers_report_replaces_what_the_scheduler_thinks_it_has_read():
    engine = FakeEngine(policy="tokenflow")
    engine.add("a", [1, 2, 3], 50, rate=1.0)
    for _ in range(20):
        engine.step()
    engine.core.inbox.put(ReportPlayed("a", 15))
    engine.core.inbox.put(ReportPlayed("never existed", 15))
    state = streams_of(engine)["a"]
    assert state.num_unread <= state.num_output_tokens - 15
    assert (state.phase, state.rate, state.num_prompt_tokens, state.max_tokens) == ("running", 1.0, 3, 50)
    engine.run()
    assert "a" in engine.finished


def test_streams_are_listed_in_order_of_arrival_and_what_json_lacks_is_none():
    engine = FakeEngine(max_num_seqs=1)
    for req in ("first", "second", "third"):
        engine.add(req, [1, 2], 40)
    engine.step()
    states = streams_of(engine)
    assert list(states) == ["first", "second", "third"]
    assert [state.phase for state in states.values()] == ["running", "waiting", "waiting"]
    assert states["second"].ttft_s is None
    assert states["first"].rate is None
    assert states["first"].time_to_empty_s is None
    engine.run()


def test_a_resumed_request_reports_its_path_and_the_stall_of_its_reader():
    engine = FakeEngine(policy="tokenflow", overload="share", num_blocks=16, num_host_blocks=100)
    for i in range(6):
        engine.add(f"r{i}", [i + 1] * 10, 40, rate=40.0)
    engine.run()
    resumed = [event for message in engine.messages if isinstance(message, StepOutputs) for event in message.resumed]
    assert engine.scheduler.num_preemptions > 0
    assert 0 < len(resumed) <= engine.scheduler.num_preemptions
    assert {path for path, _ in resumed} <= {"load", "recompute"}
    assert all(seconds >= 0 for _, seconds in resumed)
    assert engine.core.stats().num_dropped <= engine.core.stats().num_preemptions
    assert any(last.times.stall_s > 0 for last in engine.finished.values())


@pytest.mark.parametrize("policy", ["tokenflow", "round-robin"])
def test_a_paused_stream_tells_why_and_so_does_a_waiting_one(policy):
    engine = FakeEngine(24, num_host_blocks=120, policy=policy, schedule_interval_s=0.1)
    for number in range(8):
        engine.add(f"r{number}", [number + 1] * 10, 30, rate=5.0)
    reasons: dict[str, set[str | None]] = {}
    while len(engine.finished) < 8:
        if not engine.step():
            engine.clock.time += 0.05
        for state in streams_of(engine).values():
            reasons.setdefault(state.phase, set()).add(state.reason)
    assert None not in reasons["paused"] | reasons["waiting"]
    assert all(" s unread, " in reason for reason in reasons["paused"] if reason)
    assert any(reason and reason.endswith(Cause.SPARE_MEMORY) for reason in reasons["running"])


def test_a_stream_of_another_tenant_has_no_name_in_a_reason():
    log = ReasonLog()
    engine = FakeEngine(policy="tokenflow")
    for req in ("mine", "theirs"):
        engine.add(req, [1, 2, 3], 50, rate=4.0)
    engine.step()
    live = dict(engine.scheduler.running)
    live["theirs"].tenant = Tenant("others")
    for request, other in (("mine", "theirs"), ("mine", "mine"), ("mine", "gone")):
        live[request].reason = Reason(Cause.MAKES_ROOM, 6.21, other)
        named = log.words(live[request], live, has_batch_slot=True)
        assert named == f"6.2 s unread, memory for {'stream mine' if other == 'mine' else 'another stream'}"
