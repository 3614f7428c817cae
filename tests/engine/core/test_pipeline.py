"""The rules of two steps under way (docs/decisions/009), one by one, on a runner that runs as late as it can."""

from __future__ import annotations

import pytest

from tests.engine.fakes import FakeEngine, expected_output
from tfserve.engine.scheduling.policy import Decision, ResumeBy, Snapshot
from tfserve.engine.scheduling.state import RequestState
from tfserve.engine.scheduling.tracker import Tracker
from tfserve.memory.residency import KVState
from tfserve.messages import AbortRequest, AddRequest, Shutdown
from tfserve.plan import Direction
from tfserve.types import FinishReason, SamplingParams

PROMPTS = {"a": [1, 2, 3, 4, 5, 6], "b": [7, 8, 9]}
NUM_TOKENS = 20


class Script:
    """A policy with decisions of the test at given steps; it admits all requests at other steps."""

    def __init__(self, decisions: dict[int, Decision]) -> None:
        self.decisions = decisions
        self.num_calls = 0

    def decide(self, snapshot: Snapshot) -> Decision:
        number, self.num_calls = self.num_calls, self.num_calls + 1
        c = snapshot.columns
        return self.decisions.get(number, Decision(admit=c.ids_of(c.in_state(RequestState.WAITING))))


@pytest.fixture(autouse=True)
def two_deep(monkeypatch):
    monkeypatch.setattr(FakeEngine, "pipeline_depth", 2)


def start(decisions: dict[int, Decision], num_blocks: int = 64, **a_params) -> FakeEngine:
    """Both requests arrive before step 0, which computes their prompts; write-through is off."""
    engine = FakeEngine(num_blocks, num_host_blocks=60, write_through=False)
    engine.scheduler._policy = Script(decisions)
    for req, prompt in PROMPTS.items():
        engine.add(req, prompt, NUM_TOKENS, **(a_params if req == "a" else {}))
    return engine


def preempt_a(by: ResumeBy, **more) -> Decision:
    return Decision(preempt=(("a", by),), **more)


AWAY = {3: preempt_a(ResumeBy.LOAD), 9: Decision(resume=(("a", ResumeBy.LOAD),))}
"""Out while step 2 computes a token for it, and back after `displace` has taken its place on the device."""


def displace(engine: FakeEngine) -> None:
    """Take every block that "a" has left; 14 blocks are just enough for the other two."""
    engine.add("c", [3] * 40, 1)


def seqs_of(engine: FakeEngine, req: str) -> list:
    return [(plan.step, seq) for plan in engine.runner.plans for seq in plan.seqs if seq.req == req]


def run_to_the_end(engine: FakeEngine) -> None:
    engine.run()
    for req, prompt in PROMPTS.items():
        assert engine.outputs[req] == expected_output(prompt, NUM_TOKENS)
    engine.drain()
    assert engine.all_free()


@pytest.mark.parametrize("depth", [1, 2])
def test_a_step_is_launched_before_the_tokens_of_the_one_before_are_asked_for(depth, monkeypatch):
    monkeypatch.setattr(FakeEngine, "pipeline_depth", depth)
    engine = FakeEngine()
    engine.add("a", [1], 4)
    engine.run()
    launches = [("launch", step) for step in range(4)]
    results = [("result", step) for step in range(4)]
    if depth == 1:
        assert engine.runner.log == [event for pair in zip(launches, results, strict=True) for event in pair]
    else:
        first, *later = launches
        between = [event for pair in zip(later, results, strict=False) for event in pair]
        assert engine.runner.log == [first, *between, results[-1]]
    assert engine.outputs["a"] == expected_output([1], 4)


def test_a_preempted_request_still_gets_its_token_and_its_store_waits_for_the_step_that_writes_last():
    engine = start(AWAY, num_blocks=14)
    for _ in range(4):
        engine.step()
    assert engine.runner.plans[2].seqs[0].req == "a"
    assert [seq.req for seq in engine.runner.plans[3].seqs] == ["b"]
    # Prompt and two tokens have KV, the last of them from step 2, which was under way.
    stores = engine.runner.plans[3].stores
    assert [(copy.start, copy.num_tokens) for copy in stores] == [(0, 4), (0, 4)]
    assert all(copy.after.step == 2 for copy in stores)
    assert engine.outputs["a"] == expected_output(PROMPTS["a"], 3)
    assert engine.scheduler.paused["a"].num_in_flight == 0
    displace(engine)
    run_to_the_end(engine)
    assert engine.transfers.moved[Direction.LOAD] == 8


def test_a_store_that_does_not_wait_for_that_step_corrupts():
    engine = start(AWAY, num_blocks=14)
    engine.transfers.honour_steps = False
    for _ in range(4):
        engine.step()
    displace(engine)
    engine.run()
    assert engine.outputs["b"] == expected_output(PROMPTS["b"], NUM_TOKENS)
    assert engine.outputs["a"] != expected_output(PROMPTS["a"], NUM_TOKENS)


@pytest.mark.parametrize("by", ResumeBy)
def test_a_stop_turns_a_preemption_into_a_release(by):
    third = expected_output(PROMPTS["a"], 3)[-1]
    engine = start({3: preempt_a(by)}, stop_token_ids=(third,))
    for _ in range(4):
        engine.step()
    assert engine.scheduler.num_preemptions == 1
    assert engine.outputs["a"] == expected_output(PROMPTS["a"], 3)
    assert engine.finished["a"].finish_reason is FinishReason.STOP
    assert engine.kv.view("a").state is KVState.NONE
    assert list(engine.scheduler.running) == ["b"]
    engine.run()
    assert max(step for step, _ in seqs_of(engine, "a")) == 2
    assert engine.transfers.moved[Direction.LOAD] == 0
    assert engine.outputs["b"] == expected_output(PROMPTS["b"], NUM_TOKENS)
    engine.drain()
    assert engine.all_free()


def test_a_recompute_waits_for_the_token_in_flight_even_if_the_policy_does_not():
    engine = start({3: preempt_a(ResumeBy.RECOMPUTE, admit=("a",))})
    for _ in range(4):
        engine.step()
    assert [seq.req for seq in engine.runner.plans[3].seqs] == ["b"]
    engine.step()
    (entry,) = engine.runner.plans[4].entered
    assert entry.token_ids == (*PROMPTS["a"], *expected_output(PROMPTS["a"], 3))
    run_to_the_end(engine)


@pytest.mark.parametrize("by", ResumeBy)
def test_a_row_that_is_entered_again_gets_its_tokens_from_the_host_and_then_from_the_device(by):
    back = {6: Decision(resume=(("a", ResumeBy.LOAD),))} if by is ResumeBy.LOAD else {}
    engine = start({3: preempt_a(by)} | back)
    run_to_the_end(engine)
    again = [seq for step, seq in seqs_of(engine, "a") if step > 3]
    tokens = [*PROMPTS["a"], *expected_output(PROMPTS["a"], 3)]
    assert again[0].token_ids == tuple(tokens[again[0].start :])
    assert all(seq.token_ids is None for seq in again[1:])


def test_a_stop_wastes_one_token_that_is_not_sent_and_max_tokens_wastes_none():
    third = expected_output(PROMPTS["a"], 3)[-1]
    engine = start({}, stop_token_ids=(third,))
    engine.run()
    assert engine.outputs["a"] == expected_output(PROMPTS["a"], 3)
    assert sum(seq.sample for _, seq in seqs_of(engine, "a")) == 4
    assert sum(seq.sample for _, seq in seqs_of(engine, "b")) == NUM_TOKENS
    assert engine.core.stats().num_output_tokens == 3 + NUM_TOKENS


def test_a_token_in_flight_at_an_abort_is_dropped_also_if_the_id_is_used_again():
    engine = start({})
    for _ in range(4):
        engine.step()
    engine.core.inbox.put(AbortRequest("a"))
    engine.outputs["a"] = []
    engine.core.inbox.put(AddRequest("a", [9, 9], SamplingParams(max_tokens=NUM_TOKENS), engine.clock.now()))
    engine.step()
    assert engine.finished.pop("a").finish_reason is FinishReason.ABORT
    engine.run()
    assert engine.outputs["a"] == expected_output([9, 9], NUM_TOKENS)
    assert engine.outputs["b"] == expected_output(PROMPTS["b"], NUM_TOKENS)


def test_a_failed_step_ends_its_requests_but_no_request_that_joined_the_next_step():
    engine = start({})
    engine.runner.fail_on = {3}
    for _ in range(4):
        engine.step()
    engine.add("c", [4, 4, 4], NUM_TOKENS)
    engine.run()
    assert {seq.req for seq in engine.runner.plans[4].seqs} == {"a", "b", "c"}
    for req, prompt in PROMPTS.items():
        assert engine.finished[req].finish_reason is FinishReason.ERROR
        assert engine.outputs[req] == expected_output(prompt, 3)
    assert engine.outputs["c"] == expected_output([4, 4, 4], NUM_TOKENS)
    engine.drain()
    assert engine.all_free()


def test_a_shutdown_waits_for_the_runner():
    engine = start({})
    for _ in range(3):
        engine.step()
    engine.core.inbox.put(Shutdown())
    engine.core.run()
    engine.core.close()
    assert engine.runner.closed
    assert {output.finish_reason for output in engine.finished.values()} == {FinishReason.ABORT}


def test_buffers_count_the_token_in_flight():
    tracker = Tracker(default_rate=10.0)
    tracker.add("a", arrival_s=0.0, num_prompt=5, max_tokens=9, rate=10.0)
    tracker.on_planned(["a"])
    before = tracker.columns(1.0)
    assert (before.num_output[0], before.unread[0], before.time_to_empty_s[0]) == (1, 1.0, 0.1)
    tracker.on_planned(["a"])
    tracker.on_tokens(["a"], 1, 1.0)
    after = tracker.columns(1.0)
    assert (after.num_output[0], after.num_remaining[0], after.unread[0]) == (2, 7, 2.0)
    assert (after.first_token_s[0], after.time_to_empty_s[0]) == (1.0, 0.2)
