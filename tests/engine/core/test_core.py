"""The loop with scheduler, manager and a fake runner: every request gets its tokens in all circumstances."""

from __future__ import annotations

from typing import ClassVar

import pytest

from tests.engine.fakes import FakeEngine, expected_output, next_token
from tests.panics import PanicException
from tfserve.engine.scheduling.policy import Decision, Snapshot
from tfserve.engine.scheduling.state import RequestState
from tfserve.messages import AbortRequest
from tfserve.types import FinishReason

POLICIES = ["fcfs", "fcfs-chunked"]


@pytest.fixture(autouse=True, params=[1, 2], ids=["depth1", "depth2"])
def depth(request, monkeypatch):
    """Everything here holds at both depths of the pipeline."""
    monkeypatch.setattr(FakeEngine, "pipeline_depth", request.param)


@pytest.mark.parametrize("policy", POLICIES)
def test_requests_of_unequal_lengths_all_get_their_own_tokens(policy):
    engine = FakeEngine(policy=policy)
    prompts = {f"r{i}": list(range(1 + i, 1 + i + 3 * i + 1)) for i in range(9)}
    for req, prompt in prompts.items():
        engine.add(req, prompt, max_tokens=5 + len(prompt) % 4)
    engine.run()
    for req, prompt in prompts.items():
        assert engine.outputs[req] == expected_output(prompt, 5 + len(prompt) % 4)
        assert engine.finished[req].finish_reason is FinishReason.LENGTH
    assert engine.kv.num_free_blocks == engine.kv.num_blocks - 1


def test_prompt_longer_than_the_token_budget_is_computed_in_chunks():
    engine = FakeEngine(max_num_batched_tokens=7)
    engine.add("long", list(range(1, 51)), max_tokens=3)
    engine.run()
    chunks = [seq.n for plan in engine.runner.plans for seq in plan.seqs]
    assert chunks == [7] * 7 + [1, 1, 1]
    assert engine.outputs["long"] == expected_output(list(range(1, 51)), 3)


def test_fcfs_runs_prefill_alone_and_fcfs_chunked_beside_decodes():
    for policy, mixed in (("fcfs", False), ("fcfs-chunked", True)):
        engine = FakeEngine(policy=policy, max_num_batched_tokens=8)
        engine.add("a", [1, 2, 3], max_tokens=20)
        engine.core.step()
        engine.core.step()
        engine.add("b", list(range(1, 30)), max_tokens=3)
        engine.run()
        kinds = [(plan.n_decode > 0, len(plan.seqs) > plan.n_decode) for plan in engine.runner.plans]
        assert ((True, True) in kinds) is mixed
        assert engine.outputs["a"] == expected_output([1, 2, 3], 20)


@pytest.mark.parametrize("policy", POLICIES)
def test_running_out_of_blocks_preempts_and_recomputes_with_identical_tokens(policy):
    # The ratio of 0 admits all requests; 4 requests of 40 tokens then do not fit into 23 blocks of 4.
    engine = FakeEngine(num_blocks=24, policy=policy, reserve_ratio=0.0, reserve_min_ratio=0.0)
    prompts = {f"r{i}": [i + 1] * 10 for i in range(4)}
    for req, prompt in prompts.items():
        engine.add(req, prompt, max_tokens=30)
        engine.core.step()
    engine.run()
    assert engine.scheduler.num_preemptions > 0
    for req, prompt in prompts.items():
        assert engine.outputs[req] == expected_output(prompt, 30)


def test_a_wrong_guess_raises_the_reserve_ratio():
    engine = FakeEngine(num_blocks=24, reserve_ratio=0.1, reserve_min_ratio=0.0)
    for i in range(4):
        engine.add(f"r{i}", [i + 1] * 10, max_tokens=30)
    before = engine.scheduler._policy.ratio
    while engine.scheduler.num_preemptions == 0:
        engine.core.step()
    assert engine.scheduler._policy.ratio > before


def test_conservative_admission_avoids_preemption():
    engine = FakeEngine(num_blocks=24, reserve_ratio=1.0, reserve_min_ratio=1.0)
    for i in range(4):
        engine.add(f"r{i}", [i + 1] * 10, max_tokens=30)
    engine.run()
    assert engine.scheduler.num_preemptions == 0


def test_abort_frees_blocks_in_every_state():
    engine = FakeEngine(max_num_seqs=2)
    for req in ("running", "also", "waiting"):
        engine.add(req, [1, 2, 3], max_tokens=50)
    engine.core.step()
    engine.core.step()
    for req in ("running", "waiting", "never existed"):
        engine.core.inbox.put(AbortRequest(req))
    engine.run()
    assert engine.finished["running"].finish_reason is FinishReason.ABORT
    assert engine.finished["waiting"].finish_reason is FinishReason.ABORT
    assert engine.outputs["waiting"] == []
    assert engine.outputs["also"] == expected_output([1, 2, 3], 50)
    assert engine.kv.num_free_blocks == engine.kv.num_blocks - 1


@pytest.mark.parametrize("kind", [RuntimeError, PanicException])
def test_a_failing_step_fails_its_batch_and_the_loop_goes_on(kind):
    engine = FakeEngine(max_num_seqs=2)
    engine.runner.fail_on, engine.runner.failure = {3}, kind("planned failure")
    for req in ("a", "b", "c"):
        engine.add(req, [1, 2, 3], max_tokens=10)
    engine.run()
    assert engine.finished["a"].finish_reason is FinishReason.ERROR
    assert "planned failure" in engine.finished["b"].error
    assert engine.outputs["c"] == expected_output([1, 2, 3], 10)
    assert engine.kv.num_free_blocks == engine.kv.num_blocks - 1


class BrokenBytes:
    """A tokenizer whose tokens cannot be decoded."""

    leading_spaces = 0
    special_texts: ClassVar[dict[str, int]] = {}

    def __init__(self, error: BaseException) -> None:
        self.error = error

    def bytes_table(self, skip_special_tokens):
        return self

    def __getitem__(self, token):
        raise self.error


@pytest.mark.parametrize("error", [ValueError("bad token"), PanicException("bad token")], ids=repr)
def test_a_request_whose_text_cannot_be_made_fails_alone(error):
    engine = FakeEngine(tokenizer=BrokenBytes(error))
    engine.add("a", [1, 2, 3], max_tokens=10, stop=("x",))
    engine.add("b", [1, 2, 3], max_tokens=10)
    engine.run()
    assert engine.finished["a"].finish_reason is FinishReason.ERROR
    assert "bad token" in engine.finished["a"].error
    assert engine.outputs["b"] == expected_output([1, 2, 3], 10)
    assert engine.all_free()


def test_a_request_whose_logits_are_not_finite_fails_alone():
    engine = FakeEngine(max_num_seqs=3)
    engine.runner.not_finite = {4: "b"}
    for req in ("a", "b", "c"):
        engine.add(req, [1, 2, 3], max_tokens=10)
    engine.run()
    assert engine.finished["b"].finish_reason is FinishReason.ERROR
    assert "not finite" in engine.finished["b"].error
    assert engine.outputs["b"] == expected_output([1, 2, 3], 10)[: len(engine.outputs["b"])]
    assert len(engine.outputs["b"]) < 10
    for req in ("a", "c"):
        assert engine.outputs[req] == expected_output([1, 2, 3], 10)
        assert engine.finished[req].finish_reason is FinishReason.LENGTH
    assert engine.kv.num_free_blocks == engine.kv.num_blocks - 1


def test_stop_token_ends_the_request_and_names_the_token():
    third = expected_output([5, 6], 3)[-1]
    engine = FakeEngine()
    engine.add("stop", [5, 6], max_tokens=10, stop_token_ids=(third,))
    engine.add("min", [5, 6], max_tokens=10, stop_token_ids=(third,), min_tokens=5)
    engine.run()
    assert engine.outputs["stop"] == expected_output([5, 6], 3)
    assert engine.finished["stop"].finish_reason is FinishReason.STOP
    assert engine.finished["stop"].stop_reason == third
    assert len(engine.outputs["min"]) == 10


def test_eos_ends_the_request_unless_ignored():
    engine = FakeEngine()
    engine.core._eos_token_ids = frozenset({next_token([7])})
    engine.add("eos", [7], max_tokens=4)
    engine.add("ignore", [7], max_tokens=4, ignore_eos=True)
    engine.run()
    assert len(engine.outputs["eos"]) == 1
    assert engine.finished["eos"].stop_reason is None
    assert len(engine.outputs["ignore"]) == 4


def test_queue_is_first_come_first_served():
    engine = FakeEngine(max_num_seqs=2)
    for i in range(8):
        engine.add(f"r{i}", [i + 1] * (8 - i), max_tokens=4)
    engine.run()
    order = [entry.req for plan in engine.runner.plans for entry in plan.entered]
    assert order == [f"r{i}" for i in range(8)]


class OnlyDecodes:
    """Admits all requests and grants no prompt tokens, as if decodes went first that then cannot run."""

    def decide(self, snapshot: Snapshot) -> Decision:
        c = snapshot.columns
        return Decision(admit=c.ids_of(c.in_state(RequestState.WAITING)), prefill_tokens=0)


def test_prompts_run_when_there_are_no_decodes_to_go_first(monkeypatch):
    engine = FakeEngine()
    monkeypatch.setattr(engine.scheduler, "_policy", OnlyDecodes())
    engine.add("a", [1, 2, 3], max_tokens=4)
    engine.add("b", [4, 5], max_tokens=4)
    engine.run()
    assert engine.outputs == {"a": expected_output([1, 2, 3], 4), "b": expected_output([4, 5], 4)}
