"""The tokenflow policy: one decision at a time, the paper's example, and whole bursts on a synthetic machine."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.engine.policy_driver import CPU, Ask, Driver, Machine, burst
from tests.engine.scene import FlatCost, Scene
from tfserve.config import SchedulerConfig
from tfserve.engine.columns import Phase
from tfserve.engine.cost_model import StepCoefficients
from tfserve.engine.policies.headroom import gain
from tfserve.engine.policies.tokenflow import TokenFlow, is_stressed
from tfserve.engine.policies.working_set import WorkingSet, measure, predicted_wait_s
from tfserve.engine.policy import ResumeBy
from tfserve.engine.tracker import Tracker

LOAD, RECOMPUTE = ResumeBy.LOAD, ResumeBy.RECOMPUTE


def decide(scene: Scene, **settings):
    return TokenFlow(SchedulerConfig(policy="tokenflow", watermark=0.0, **settings)).decide(scene.snapshot())


# -- the paper's example


class TwoSlots:
    """Fig. 6: two slots of 40 tokens/s each, one block per request; switching is immediate, only judged at 1 s."""

    def __init__(self, policy: TokenFlow) -> None:
        self.policy, self.tracker = policy, Tracker(default_rate=20.0)
        self.cost = FlatCost(step=1 / 40, prefill=10.0, out_s=0.9, back_s=0.1, gamma=80.0)
        self.events: list[tuple[float, str, str]] = []

    def run(self, arrivals: dict[str, tuple[float, float]], until_s: float) -> None:
        for tick in range(round(until_s * 40)):
            now = tick / 40
            for req, (at, rate) in arrivals.items():
                if at == now:
                    self.tracker.add(req, arrival_s=now, num_prompt=1, max_tokens=100_000, rate=rate)
            self._apply(self.policy.decide(self._snapshot(now)), now)
            c = self.tracker.columns(now)
            running = c.ids_of(c.in_phase(Phase.RUNNING))
            assert len(running) <= 2
            self.tracker.on_tokens(running, 1, now + 1 / 40)
            self.tracker.update(running, num_computed=self._tokens(running, now), device_blocks=1)

    def _tokens(self, reqs, now):
        c = self.tracker.columns(now)
        return [int(c.num_tokens[c.ids.index(req)]) - 1 for req in reqs]

    def _snapshot(self, now):
        scene = Scene(now_s=now, num_blocks=2, num_host_blocks=100, max_num_seqs=2, cost=self.cost, block_size=100_001)
        scene.tracker = self.tracker
        scene.held = int(self.tracker.columns(now).device_blocks.sum())
        return scene.snapshot()

    def _apply(self, decision, now):
        for req, by in decision.preempt:
            assert by is LOAD
            self.events.append((now, "preempt", req))
            self.tracker.set_phase(req, Phase.PAUSED, now)
            self.tracker.update([req], device_blocks=0, host_tokens=self._tokens([req], now))
        for req in [req for req, _ in decision.resume] + list(decision.admit):
            self.events.append((now, "run", req))
            self.tracker.set_phase(req, Phase.RUNNING, now)
            self.tracker.update([req], device_blocks=1, host_tokens=0)


def test_the_papers_figure_6():
    # A first token comes one step after it is begun, so buffers are up to one token fuller than the figure's.
    config = SchedulerConfig(
        policy="tokenflow",
        schedule_interval_s=1.0,
        buffer_conservativeness=1.25,
        swap_gap_s=0.5,
        critical_s=0.925,
        watermark=0.0,
    )
    slots = TwoSlots(TokenFlow(config))
    slots.run({"R1": (0.0, 20.0), "R2": (0.0, 30.0), "R3": (2.0, 25.0)}, until_s=30.0)
    assert slots.events[:6] == [
        (0.0, "run", "R1"),
        (0.0, "run", "R2"),
        (3.0, "preempt", "R1"),
        (3.0, "run", "R3"),
        (5.0, "preempt", "R2"),
        (5.0, "run", "R1"),
    ]
    c = slots.tracker.columns(30.0)
    # A reader starts on its first token; nobody stalls for as much as a step after that.
    assert c.stall_s == pytest.approx(np.zeros(3), abs=1 / 40)
    # 75 tokens/s asked, 80 generated: what is unread in all has grown by 5 tokens/s since t = 3.
    assert c.unread.sum() == pytest.approx(60 + 30 + 5 * 27, abs=3)


# -- gain


@given(
    unread=st.lists(st.floats(0, 500), min_size=2, max_size=20, unique=True),
    rate=st.floats(1, 60),
    overhead=st.floats(0, 2),
    length=st.floats(10, 4000),
    speed=st.floats(1, 200),
)
def test_gain_falls_with_the_buffer(unread, rate, overhead, length, speed):
    b = np.sort(np.array(unread))
    values = gain(
        SchedulerConfig(),
        unread=b,
        headroom=b / rate,
        rate=np.full_like(b, rate),
        expected_output=np.full_like(b, length),
        overhead_s=np.full_like(b, overhead),
        speed=speed,
    )
    assert (np.diff(values) <= 1e-12).all()
    assert values[0] > values[-1] or b[-1] - b[0] < 1e-3 * rate or b[0] / rate > 20


def test_gain_of_waiting_goes_on_rising_below_an_empty_buffer():
    values = gain(
        SchedulerConfig(),
        unread=np.zeros(3),
        headroom=np.array([0.0, -1.0, -5.0]),
        rate=np.full(3, 20.0),
        expected_output=np.full(3, 1000.0),
        overhead_s=np.zeros(3),
        speed=50.0,
    )
    assert values[0] < values[1] < values[2]


# -- stress and what goes on without it


def test_without_stress_everybody_keeps_running():
    scene = Scene().running("a").running("b", unread_s=2.0)
    assert not is_stressed(scene.snapshot(), 1.0)
    decision = decide(scene)
    assert (decision.preempt, decision.resume, decision.admit, decision.wake_s) == ((), (), (), None)


@pytest.mark.parametrize(
    "scene",
    [
        Scene().running("a").waiting("b"),
        Scene().running("a").paused("b"),
        Scene().running("a", unread_s=0.5),
        Scene().running("a").loading("b"),
    ],
)
def test_somebody_waiting_away_or_low_is_stress(scene):
    assert is_stressed(scene.snapshot(), 1.0)


# -- admission


def test_newcomers_get_free_memory_in_order_of_arrival():
    scene = Scene(num_blocks=5).waiting("old", for_s=0.9).waiting("mid", for_s=0.5).waiting("new", for_s=0.1)
    assert decide(scene).admit == ("old",)  # 32 + 1 tokens: 3 blocks each
    scene.num_blocks = 6
    assert decide(scene).admit == ("old", "mid")


def test_a_small_newcomer_does_not_overtake_a_large_one():
    scene = Scene(num_blocks=18).running("a", unread_s=0.1, output=200).waiting("large", 300, for_s=1.0)
    scene.waiting("small", 10, for_s=0.5)
    assert decide(scene).admit == ()


def test_a_newcomer_displaces_the_fullest_buffer_that_survives_it():
    scene = Scene(num_blocks=30).running("low", unread_s=2.5).running("full", unread_s=8.0).waiting("new")
    decision = decide(scene)
    assert decision.preempt == (("full", LOAD),)
    assert decision.admit == ("new",)


def test_nobody_is_displaced_who_would_run_dry_meanwhile():
    scene = Scene(num_blocks=30).running("a", unread_s=2.5).running("b", unread_s=2.5).waiting("new", for_s=30.0)
    scene.cost = FlatCost(out_s=1.0, back_s=1.0, prefill=1.0)
    scene.tracker.update(["a", "b"], host_tokens=0)
    # 1.5 x (1 + 1 + 0.5) s of playback are needed.
    assert decide(scene).admit == ()
    assert decide(scene, buffer_conservativeness=0.9).admit == ("new",)


def test_the_longer_a_newcomer_waits_the_shorter_a_victims_buffer_may_be():
    assert decide(Scene(num_blocks=30).running("a", 1.6).running("b", 1.5).waiting("new", for_s=0.3)).preempt == ()
    decision = decide(Scene(num_blocks=30).running("a", 1.6).running("b", 1.5).waiting("new", for_s=0.5))
    assert decision.preempt == (("a", LOAD),)


def test_nobody_leaves_for_a_prompt_whose_turn_is_not_next():
    scene = Scene(num_blocks=70).running("a", unread_s=8.0).running("b", unread_s=8.0).prefilling("long", prompt=600)
    assert decide(scene.waiting("new")).preempt == ()
    scene = Scene(num_blocks=33).running("a", unread_s=8.0).running("b", unread_s=8.0).prefilling("short", prompt=16)
    assert decide(scene.waiting("new", prompt=48)).admit == ("new",)


def test_conservativeness_of_twenty_queues_like_fcfs():
    scene = Scene(num_blocks=30).running("low", unread_s=2.5).running("full", unread_s=8.0).waiting("new")
    assert decide(scene, buffer_conservativeness=20.0).preempt == ()


def test_whoever_has_just_come_stays_a_while():
    scene = Scene(num_blocks=30).running("a", unread_s=8.0, for_s=0.5).running("b", unread_s=8.0, for_s=0.5)
    assert decide(scene.waiting("new")).preempt == ()


def test_several_victims_together_make_room_for_a_long_prompt():
    scene = Scene(num_blocks=47)
    for i in range(3):
        scene.running(f"r{i}", unread_s=5.0 + i)
    decision = decide(scene.waiting("long", prompt=400))
    assert decision.preempt == (("r2", LOAD), ("r1", LOAD))
    assert decision.admit == ("long",)


# -- capacity and overload


def overloaded(**cost) -> Scene:
    scene = Scene(cost=FlatCost(gamma=50.0, **cost)).running("a").running("b")
    return scene.waiting("c", for_s=0.9).waiting("d", for_s=0.5)


def test_queue_lets_in_only_whom_the_capacity_can_feed():
    # Two readers at 20/s run; 50/s feed no third. By memory alone fcfs would let both in, reserving their output.
    scene = overloaded()
    scene.num_blocks = 31
    policy = TokenFlow(SchedulerConfig(policy="tokenflow", watermark=0.0))
    assert policy.decide(scene.snapshot()).admit == ()
    assert policy.is_fallback


def test_in_the_fallback_memory_that_covers_everybodys_output_is_used():
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


def test_predicted_wait_is_nothing_while_there_is_capacity():
    scene = Scene(cost=FlatCost(gamma=500.0)).running("a")
    assert predicted_wait_s(scene.snapshot(), SchedulerConfig()) == 0.0


def test_the_fallback_ends_with_a_tenth_to_spare():
    config = SchedulerConfig(policy="tokenflow")
    working_set = WorkingSet()

    def room(gamma: float) -> int:
        snapshot = Scene(cost=FlatCost(gamma=gamma)).running("a").waiting("b").snapshot()
        newcomer = snapshot.columns.in_phase(Phase.WAITING)
        load = measure(snapshot, config)
        working_set.size = 10.0
        return working_set.room_for(newcomer, load, snapshot, config)

    assert room(39.0) == 0
    assert working_set.is_fallback
    assert room(43.0) == 0  # 40 of 43 is above nine tenths
    assert room(45.0) == 1
    assert not working_set.is_fallback
    assert room(41.0) == 1


def test_the_working_set_shrinks_while_copies_queue_and_grows_back_by_steps():
    config = SchedulerConfig(policy="tokenflow", working_set_step=0.1)
    scene = (
        Scene(cost=FlatCost(gamma=2000.0, queue=0.9), num_blocks=10_000, max_num_seqs=1000).running("a").running("b")
    )
    working_set, snapshot = WorkingSet(), scene.snapshot()
    load = measure(snapshot, config)
    working_set.move(load, snapshot, config)
    assert working_set.size == pytest.approx(0.9 * load.bound)
    for _ in range(100):
        working_set.move(load, snapshot, config)
    assert working_set.size == 2.0  # never below what is resident
    scene.cost.queue = 0.0
    working_set.move(load, snapshot, config)
    assert working_set.size == pytest.approx(2.0 + 0.1 * load.bound)


def test_an_empty_node_takes_even_what_it_cannot_feed():
    scene = Scene(cost=FlatCost(gamma=5.0)).waiting("fast", rate=100.0)
    assert decide(scene).admit == ("fast",)


# -- balance


def test_a_paused_reader_comes_back_when_its_playback_nears_its_end_and_not_before():
    tight = Scene(num_blocks=30).running("a", unread_s=8.0).running("b", unread_s=6.0)
    assert decide(tight.paused("p", unread_s=3.0)).resume == ()
    urgent = Scene(num_blocks=30).running("a", unread_s=8.0).running("b", unread_s=6.0).paused("p", unread_s=0.8)
    decision = decide(urgent)
    assert decision.preempt == (("a", LOAD),)
    assert decision.resume == (("p", LOAD),)


def test_free_memory_is_used_before_anybody_is_in_need():
    scene = Scene(num_blocks=60).running("a", unread_s=8.0).paused("p", unread_s=30.0)
    decision = decide(scene)
    assert (decision.preempt, decision.resume) == ((), (("p", LOAD),))


def test_no_exchange_between_buffers_that_are_nearly_equal():
    scene = Scene(num_blocks=30).running("a", unread_s=2.5).running("b", unread_s=2.0).paused("p", unread_s=0.9)
    assert decide(scene).preempt == ()


def test_a_starving_reader_displaces_even_those_who_cannot_afford_it():
    scene = Scene(num_blocks=30).running("a", unread_s=0.4).running("b", unread_s=0.2).paused("p", unread_s=-6.0)
    decision = decide(scene)
    assert decision.preempt == (("a", LOAD),)
    assert decision.resume == (("p", LOAD),)


def test_growth_without_memory_pauses_the_fullest_buffer():
    scene = Scene(num_blocks=30).running("low", unread_s=1.5, output=209).running("full", unread_s=9.0, output=209)
    # Both stand at 240 computed tokens: 15 full blocks each, and no free one for their next tokens.
    assert decide(scene).preempt == (("full", LOAD),)


def test_those_being_loaded_are_left_alone():
    scene = Scene(num_blocks=30).running("a", unread_s=0.5).loading("l", unread_s=20.0).waiting("new", for_s=9.0)
    assert "l" not in dict(decide(scene, overload="share").preempt)


def test_resume_takes_the_cheaper_way():
    for back_s, prefill, way in ((0.01, 1e-3, LOAD), (1.0, 1e-4, RECOMPUTE)):
        scene = Scene(num_blocks=60, cost=FlatCost(back_s=back_s, prefill=prefill)).running("a")
        assert decide(scene.paused("p", unread_s=0.5)).resume == (("p", way),)


def test_a_full_host_means_recompute():
    scene = Scene(num_blocks=30, num_free_host_blocks=3)
    scene.running("a", unread_s=8.0, clean=False).running("b", unread_s=6.0).paused("p", unread_s=0.5)
    scene.cost = FlatCost(prefill=1e-2)
    assert decide(scene).preempt == (("a", RECOMPUTE),)


def test_without_offload_preemption_recomputes():
    scene = Scene(num_blocks=30).running("low", unread_s=2.5).running("full", unread_s=8.0).waiting("new")
    assert decide(scene, offload=False).preempt == (("full", RECOMPUTE),)


# -- requests without a reader


def test_without_a_rate_one_is_served_with_what_is_left():
    scene = Scene(num_blocks=30).running("reader", unread_s=4.0).running("batch", rate=None).waiting("new")
    assert decide(scene).preempt == (("batch", LOAD),)
    full = Scene(num_blocks=30).running("a", unread_s=4.0).running("b", unread_s=4.0).waiting("batch", rate=None)
    assert decide(full).preempt == ()


def test_without_a_rate_one_still_comes_to_its_turn():
    scene = Scene(num_blocks=30).running("a", unread_s=4.0).running("b", unread_s=4.0)
    assert decide(scene.waiting("batch", rate=None, for_s=12.0)).admit == ("batch",)


def test_priority_orders_those_without_a_rate():
    scene = Scene(num_blocks=6)
    scene.waiting("first", rate=None, priority=5).waiting("second", rate=None, priority=-1).waiting("reader", for_s=0.1)
    assert decide(scene).admit == ("reader", "second")


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
    policy = TokenFlow(SchedulerConfig(policy="tokenflow", min_prefill_share=0.6))
    tokens = [policy.decide(dry.snapshot()).prefill_tokens for _ in range(18)]
    assert tokens == [*[0] * 7, pytest.approx(212, abs=1)] * 2 + [0, 0]


def test_the_rest_of_a_prompt_is_worth_it_however_short():
    dry = Scene(cost=FlatCost(step=0.02, prefill=1e-3, prompts=0.04)).running("a", unread_s=-1.0)
    dry.prefilling("p", prompt=5)
    policy = TokenFlow(SchedulerConfig(policy="tokenflow", min_prefill_share=0.6))
    tokens = [policy.decide(dry.snapshot()).prefill_tokens for _ in range(2)]
    assert tokens == [0, pytest.approx(20, abs=1)]


def test_a_wait_for_a_first_token_excuses_a_little_stalling():
    scene = Scene(cost=FlatCost(step=0.02, prefill=1e-3))
    # 46 tokens 2 s ago: 0.3 s are left, and nobody has stalled.
    scene.tracker.add("a", arrival_s=scene.now_s - 3, num_prompt=32, max_tokens=1000, rate=20.0)
    scene.tracker.on_tokens(["a"], 46, scene.now_s - 2)
    scene.tracker.set_phase("a", Phase.RUNNING, scene.now_s - 3)
    scene.tracker.update(["a"], num_computed=77, device_blocks=5)
    scene.held += 5
    scene.prefilling("p", for_s=2.0)
    for share, excused_s in ((0.0, 0.0), (0.05, 0.1), (0.1, 0.2)):
        tokens = decide(scene, stall_per_wait=share).prefill_tokens
        assert tokens == pytest.approx((0.9 * (0.3 + excused_s) - 0.02) / 1e-3, abs=1)


def test_first_tokens_come_before_recomputing():
    scene = Scene().running("again", unread_s=0.0).prefilling("new")
    scene.tracker.update(["again"], num_computed=0)
    assert decide(scene).order == ("new", "again")


# -- when to look again


def test_events_wake_it_but_not_at_every_step():
    config = SchedulerConfig(policy="tokenflow", schedule_interval_s=1.0, watermark=0.0)
    policy = TokenFlow(config)
    scene = Scene(num_blocks=60).running("a", unread_s=0.5)
    policy.decide(scene.snapshot())
    scene.now_s += 0.02
    scene.waiting("soon", for_s=0.01)
    assert policy.decide(scene.snapshot()).admit == ()
    scene.now_s += 0.03
    assert policy.decide(scene.snapshot()).admit == ("soon",)


def test_a_newcomer_that_has_lacked_memory_for_an_interval_is_looked_after_at_every_step():
    policy = TokenFlow(SchedulerConfig(policy="tokenflow", schedule_interval_s=1.0, watermark=0.0))
    scene = Scene(num_blocks=30).running("a", unread_s=8.0, for_s=0.5).running("b", unread_s=8.0, for_s=0.5)
    scene.waiting("new", for_s=0.4)
    assert policy.decide(scene.snapshot()).admit == ()  # both have only just come
    scene.now_s += 0.55
    assert policy.decide(scene.snapshot()).admit == ()  # has waited for less
    scene.now_s += 0.1
    assert policy.decide(scene.snapshot()).admit == ("new",)


def test_it_asks_to_be_woken_when_a_paused_reader_will_be_due():
    scene = Scene(num_blocks=15, cost=FlatCost(prefill=1e-2)).running("a", unread_s=9.0).paused("p", unread_s=1.25)
    decision = decide(scene, schedule_interval_s=5.0)
    # 1.25 s left, less 1 s of caution and 0.01 s of loading.
    assert decision.wake_s == pytest.approx(scene.now_s + 0.24, abs=0.01)


# -- whole runs

SMALL = Machine(
    StepCoefficients(0.02, 1e-4, 1e-7, 2e-4, 1e-9), 100_000, 16, 200, 4000, 2e9, max_num_seqs=64,
    max_num_batched_tokens=512,
)  # fmt: skip


def test_a_burst_gets_first_tokens_early_and_hardly_stalls():
    asks = burst(40, 100, 200, rate=10.0)
    flow = Driver(asks, SMALL, policy="tokenflow").run()
    fcfs = Driver(asks, SMALL, policy="fcfs").run()
    a, b = flow.report(), fcfs.report()
    assert a.ttft_p99_s < 0.25 * b.ttft_p99_s
    assert a.raw_throughput >= 0.97 * b.raw_throughput
    assert a.stall_share <= 0.02
    assert flow.mean_preemptions <= 10
    assert a.effective_throughput > 1.5 * b.effective_throughput


def test_recomputing_does_not_eat_the_machine():
    # 150 prompt tokens take 0.27 s of this machine, and nothing is offloaded.
    asks = burst(24, 150, 170, rate=2.2)
    machine = replace(CPU, num_blocks=65)
    flow = Driver(asks, machine, policy="tokenflow", offload=False).run()
    fcfs = Driver(asks, machine, policy="fcfs").run()
    assert flow.report().raw_throughput > 0.75 * fcfs.report().raw_throughput
    assert flow.report().ttft_p99_s < fcfs.report().ttft_p99_s
    assert flow.mean_preemptions < 10


def test_rates_above_capacity_queue_or_share():
    asks = burst(30, 100, 150, rate=60.0)
    queue = Driver(asks, SMALL, policy="tokenflow", overload="queue").run().report()
    share = Driver(asks, SMALL, policy="tokenflow", overload="share").run().report()
    assert share.ttft_p99_s < queue.ttft_p99_s
    assert queue.stall_share < share.stall_share


def test_shed_serves_those_it_takes_in():
    driver = Driver(burst(30, 100, 150, rate=60.0), SMALL, policy="tokenflow", overload="shed").run()
    assert 0 < len(driver.rejected) < 30
    assert all(0 < wait < math.inf for wait in driver.rejected.values())
    assert driver.report().ttft_p99_s < 5.0


asks_strategy = st.lists(
    st.builds(
        Ask,
        arrival_s=st.floats(0, 5),
        prompt=st.integers(1, 300),
        output=st.integers(1, 80),
        rate=st.sampled_from([None, 3.0, 10.0, 40.0]),
        max_tokens=st.sampled_from([None, 150, 400]),
        priority=st.integers(-1, 1),
    ),
    min_size=1,
    max_size=12,
)


@settings(max_examples=25, deadline=None)
@given(
    asks=asks_strategy,
    num_blocks=st.integers(44, 80),
    num_host_blocks=st.sampled_from([0, 20, 2000]),
    overload=st.sampled_from(["queue", "share"]),
    offload=st.booleans(),
    write_through=st.booleans(),
    ahead=st.sampled_from([None, 2.0]),
)
def test_every_request_finishes_and_no_block_is_lost(
    asks, num_blocks, num_host_blocks, overload, offload, write_through, ahead
):
    machine = Machine(SMALL.coefficients, 100_000, 16, num_blocks, num_host_blocks, 2e8, 16, 256)
    driver = Driver(
        asks, machine, policy="tokenflow", overload=overload, offload=offload, write_through=write_through,
        generate_ahead_s=ahead,
    )  # fmt: skip
    while driver.step():
        driver.check()
        assert driver.steps < 50_000
        assert_nobody_starves(driver)
    assert all(len(driver.times[req]) == ask.output for req, ask in driver.asks.items())


def assert_nobody_starves(driver: Driver, bound_s: float = 60.0) -> None:
    """No admitted reader goes unserved for long with nothing to read; requests without a rate come to their turn."""
    c = driver.tracker.columns(driver.now)
    started = ~np.isnan(c.first_token_s)
    assert (c.dry_s[started] < bound_s).all()


def test_requests_of_one_kind_get_first_tokens_in_order_of_arrival():
    rng = np.random.default_rng(1)
    asks = [Ask(float(t), 80, 120, 10.0) for t in np.sort(rng.uniform(0, 3, 30))]
    driver = Driver(asks, CPU, policy="tokenflow").run()
    newcomers = list(dict.fromkeys(driver.admitted))
    assert newcomers == sorted(newcomers, key=lambda req: driver.asks[req].arrival_s)
    first = [driver.times[req][0] for req in driver.asks]
    assert all(a <= b + 1e-9 for a, b in pairwise(first))
