"""The tokenflow policy: admission within the capacity, and how prompts share steps with decodes."""

from __future__ import annotations

import pytest

from tests.engine.scene import FlatCost, Scene, decide, set_kv
from tests.scheduler_settings import scheduler_config
from tfserve.config import SchedulerConfig
from tfserve.engine.scheduling.policies.tokenflow.admission import AdmissionLimit, estimate_capacity, predicted_wait_s
from tfserve.engine.scheduling.policies.tokenflow.policy import TokenFlow
from tfserve.engine.scheduling.state import RequestState

# -- capacity and overload


def overloaded(**cost) -> Scene:
    scene = Scene(cost=FlatCost(capacity=50.0, **cost)).running("a").running("b")
    return scene.waiting("c", for_s=0.9).waiting("d", for_s=0.5)


def test_queue_admits_only_readers_within_the_capacity():
    # Two readers at 20/s run; 50/s feed no third. By memory alone fcfs would let both in, reserving their output.
    scene = overloaded()
    scene.num_blocks = 31
    policy = TokenFlow(SchedulerConfig(policy="tokenflow", watermark=0.0))
    assert policy.decide(scene.snapshot()).admit == ()
    assert policy.is_fallback


def test_in_the_fallback_memory_that_covers_all_outputs_is_used():
    scene = overloaded()
    scene.num_blocks = 1000
    assert decide(scene).admit == ("c", "d")


def test_share_admits_anyway():
    scene = overloaded()
    scene.num_blocks = 60
    assert decide(scene, overload="share").admit == ("c", "d")


def test_shed_refuses_and_says_when_to_come_back():
    scene = overloaded()
    scene.num_blocks = 60
    decision = decide(scene, overload="shed")
    assert decision.admit == ()
    assert [req for req, _ in decision.reject] == ["c", "d"]
    # Two readers of 25/s each have 800 tokens to go.
    waits = [wait for _, wait in decision.reject]
    assert waits[0] == pytest.approx(32.0, rel=0.05)
    assert waits[0] <= waits[1]


def test_shed_refuses_no_request_without_a_reader():
    scene = overloaded().waiting("batch", rate=None)
    scene.num_blocks = 60
    assert [req for req, _ in decide(scene, overload="shed").reject] == ["c", "d"]


def test_requests_without_a_reader_do_not_change_how_long_a_reader_waits():
    def waits(*background: str) -> list[float]:
        scene = Scene(cost=FlatCost(capacity=100.0)).running("a")
        for req in background:
            scene.running(req, rate=None)
        for number in range(12):
            scene.waiting(f"reader {number}")
        return [predicted_wait_s(scene.snapshot(), SchedulerConfig(), ahead) for ahead in range(12)]

    assert waits("batch") == pytest.approx(waits())
    assert max(waits()) > min(waits())


def test_at_an_idle_node_refused_requests_wait_for_the_admitted_ones():
    scene = Scene(cost=FlatCost(capacity=50.0), num_blocks=1000)
    for number in range(6):
        scene.waiting(f"r{number}", max_tokens=100)
    decision = decide(scene, overload="shed")
    assert decision.admit == ("r0", "r1")
    assert [req for req, _ in decision.reject] == ["r2", "r3", "r4", "r5"]
    # Two readers at 20/s share 50/s: the 100 tokens of each take four seconds.
    waits = [wait for _, wait in decision.reject]
    assert waits == sorted(waits)
    assert waits[0] == pytest.approx(4.0, rel=0.2)
    assert waits[-1] == pytest.approx(8.0, rel=0.2)


def test_predicted_wait_is_nothing_while_there_is_capacity():
    scene = Scene(cost=FlatCost(capacity=500.0)).running("a")
    assert predicted_wait_s(scene.snapshot(), SchedulerConfig()) == 0.0


def test_the_fallback_ends_with_a_tenth_to_spare():
    config = SchedulerConfig(policy="tokenflow")
    limit = AdmissionLimit()

    def room(capacity_of_node: float) -> int:
        snapshot = Scene(cost=FlatCost(capacity=capacity_of_node)).running("a").waiting("b").snapshot()
        newcomer = snapshot.columns.in_state(RequestState.WAITING)
        capacity = estimate_capacity(snapshot, config)
        limit.size = 10.0
        return limit.num_admissible(newcomer, capacity, snapshot, config)

    assert room(39.0) == 0
    assert limit.is_fallback
    assert room(43.0) == 0  # 40 of 43 is above nine tenths
    assert room(45.0) == 1
    assert not limit.is_fallback
    assert room(41.0) == 1


def test_the_working_set_shrinks_while_copies_queue_and_grows_back_by_steps():
    config = scheduler_config(policy="tokenflow", working_set_step=0.1)
    scene = (
        Scene(cost=FlatCost(capacity=2000.0, queue=0.9), num_blocks=10_000, max_num_seqs=1000).running("a").running("b")
    )
    limit, snapshot = AdmissionLimit(), scene.snapshot()
    capacity = estimate_capacity(snapshot, config)
    limit.update(capacity, snapshot, config)
    assert limit.size == pytest.approx(0.9 * capacity.bound)
    limit.update(capacity, snapshot, config)
    assert limit.size == pytest.approx(0.9 * capacity.bound)  # once an interval, however often it is asked
    for _ in range(100):
        scene.now_s += config.schedule_interval_s
        limit.update(capacity, scene.snapshot(), config)
    assert limit.size == 2.0  # never below what is resident
    scene.cost.queue = 0.0
    limit.update(capacity, scene.snapshot(), config)
    assert limit.size == pytest.approx(2.0 + 0.1 * capacity.bound)


def test_an_empty_node_takes_even_what_it_cannot_feed():
    scene = Scene(cost=FlatCost(capacity=5.0)).waiting("fast", rate=100.0)
    assert decide(scene).admit == ("fast",)


# -- prompts beside readers


def test_prompt_tokens_leave_the_tightest_reader_time_to_read():
    scene = Scene(cost=FlatCost(step=0.02, prefill=1e-3)).running("a", unread_s=0.3).prefilling("p")
    assert decide(scene).prefill_tokens == pytest.approx((0.9 * 0.3 - 0.02) / 1e-3, abs=1)


def test_prompts_get_their_share_even_while_readers_are_dry():
    scene = Scene(cost=FlatCost(step=0.02, prefill=1e-3)).running("a", unread_s=-1.0).prefilling("p")
    assert decide(scene, min_prefill_share=0.5).prefill_tokens == pytest.approx(20, abs=1)


def test_where_having_prompts_is_dear_they_come_in_chunks_that_are_worth_it():
    cost = FlatCost(step=0.02, prefill=1e-3, prompts=0.04)
    roomy = Scene(cost=cost).running("a", unread_s=0.4).prefilling("p", prompt=1000)
    assert decide(roomy).prefill_tokens == pytest.approx((0.9 * 0.4 - 0.02 - 0.04) / 1e-3, abs=1)
    # Five times what having any takes are 200 tokens, 0.24 s: the share of eight decoding steps, while a reader is dry.
    dry_cost = FlatCost(step=0.021, prefill=1e-3, prompts=0.04)
    dry = Scene(cost=dry_cost).running("a", unread_s=-1.0).prefilling("p", prompt=1000)
    policy = TokenFlow(scheduler_config(policy="tokenflow", min_prefill_share=0.6))
    tokens = [policy.decide(dry.snapshot()).prefill_tokens for _ in range(18)]
    assert tokens == [*[0] * 7, pytest.approx(212, abs=1)] * 2 + [0, 0]


def test_the_rest_of_a_prompt_is_worth_it_however_short():
    dry = Scene(cost=FlatCost(step=0.02, prefill=1e-3, prompts=0.04)).running("a", unread_s=-1.0)
    dry.prefilling("p", prompt=5)
    policy = TokenFlow(scheduler_config(policy="tokenflow", min_prefill_share=0.6))
    tokens = [policy.decide(dry.snapshot()).prefill_tokens for _ in range(2)]
    assert tokens == [0, pytest.approx(20, abs=1)]


def test_prompts_do_not_wait_for_decodes_that_are_held_back():
    cost = FlatCost(step=0.02, prefill=1e-3, prompts=0.04)
    scene = Scene(cost=cost).running("a", unread_s=0.2).prefilling("p", prompt=1000)
    assert decide(scene).prefill_tokens == 0
    assert decide(scene, generate_ahead_s=0.1).prefill_tokens == pytest.approx(200, abs=1)


def test_a_wait_for_a_first_token_excuses_a_little_stalling():
    scene = Scene(cost=FlatCost(step=0.02, prefill=1e-3))
    # 46 tokens 2 s ago: 0.3 s are left, and no reader has stalled.
    scene.tracker.add("a", arrival_s=scene.now_s - 3, num_prompt=32, max_tokens=1000, rate=20.0)
    scene.tracker.on_tokens(["a"], 46, scene.now_s - 2)
    scene.tracker.set_state("a", RequestState.RUNNING, scene.now_s - 3)
    set_kv(scene.tracker, ["a"], num_computed=77, device_blocks=5)
    scene.held += 5
    scene.prefilling("p", for_s=2.0)
    for share, excused_s in ((0.0, 0.0), (0.05, 0.1), (0.1, 0.2)):
        tokens = decide(scene, stall_budget_per_wait=share).prefill_tokens
        assert tokens == pytest.approx((0.9 * (0.3 + excused_s) - 0.02) / 1e-3, abs=1)


def test_first_tokens_come_before_recomputing():
    scene = Scene().running("again", unread_s=0.0).prefilling("new")
    set_kv(scene.tracker, ["again"], num_computed=0)
    assert decide(scene).order == ("new", "again")
