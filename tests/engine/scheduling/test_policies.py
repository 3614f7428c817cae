"""The baselines, one decision at a time and over whole bursts."""

from __future__ import annotations

from typing import get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.engine.policy_driver import Ask, Driver, Machine, burst
from tests.engine.scene import FlatCost, Scene
from tests.scheduler_settings import scheduler_config
from tfserve import config
from tfserve.config import SchedulerConfig
from tfserve.engine.scheduling.cost_model import StepCoefficients
from tfserve.engine.scheduling.policies import POLICIES, make_policy
from tfserve.engine.scheduling.policy import ResumeBy, held_back, held_on_device, write_order

LOAD, RECOMPUTE = ResumeBy.LOAD, ResumeBy.RECOMPUTE
ALL = sorted(POLICIES)


def test_the_settings_name_every_policy_that_is_registered():
    assert set(get_args(config.Policy)) == set(POLICIES)


def decide(policy: str, scene: Scene, **settings):
    settings = {"watermark": 0.0} | settings
    return make_policy(scheduler_config(policy=policy, **settings)).decide(scene.snapshot())


# -- fcfs and its kin


@pytest.mark.parametrize(("policy", "beside"), [("fcfs", False), ("fcfs-chunked", True), ("fcfs-reserve", False)])
def test_prefill_goes_first_or_beside_decodes(policy, beside):
    scene = Scene().running("a").prefilling("b")
    assert decide(policy, scene).decode is beside
    assert decide(policy, Scene().running("a")).decode is True


def test_fcfs_charges_a_newcomer_everything_and_residents_a_share():
    # The newcomer needs 132 tokens: 9 blocks. The resident has 15 and may take 800 more, of which it is charged a half.
    scene = Scene(num_blocks=15 + 25 + 9, max_num_seqs=4).running("a", output=200).waiting("b")
    assert decide("fcfs", scene, reserve_ratio=0.5).admit == ("b",)
    scene.num_blocks -= 1
    assert decide("fcfs", scene, reserve_ratio=0.5).admit == ()


def test_the_clip_bounds_what_one_is_charged():
    scene = Scene(num_blocks=20).waiting("a", max_tokens=100_000).waiting("b", max_tokens=100_000)
    assert decide("fcfs", scene, reserve_clip_tokens=64).admit == ("a", "b")


def test_an_empty_engine_takes_anything_and_then_only_one():
    scene = Scene(num_blocks=5).waiting("a", max_tokens=1000, for_s=2).waiting("b", max_tokens=1000, for_s=1)
    assert decide("fcfs", scene).admit == ("a",)


def test_admission_keeps_the_order_of_arrival():
    scene = Scene(num_blocks=12).waiting("large", prompt=500, for_s=2.0).waiting("small", prompt=10, for_s=1.0)
    scene.running("a", output=5, max_tokens=10)
    assert decide("fcfs", scene).admit == ()


def test_out_of_blocks_fcfs_retracts_the_fewest_outputs_and_raises_its_ratio():
    policy = make_policy(scheduler_config(policy="fcfs", reserve_ratio=0.1, reserve_min_ratio=0.0))
    scene = Scene(num_blocks=31).running("long", output=225).running("short", output=209)
    assert policy.decide(scene.snapshot()).preempt == (("short", RECOMPUTE),)
    assert policy.ratio == pytest.approx((225 + 20) / 1000)


def test_the_ratio_decays_while_decoding_and_starts_again_when_idle():
    policy = make_policy(scheduler_config(policy="fcfs", reserve_ratio=0.7, reserve_min_ratio=0.1))
    for _ in range(300):
        policy.decide(Scene().running("a").snapshot())
    assert policy.ratio == pytest.approx(0.4)
    policy.decide(Scene().snapshot())
    assert policy.ratio == pytest.approx(0.7, abs=0.002)


def test_reserve_never_overcommits_and_greedy_admits_whatever_prompt_fits():
    scene = Scene(num_blocks=8).waiting("a", for_s=2.0).waiting("b", for_s=1.0)
    assert decide("fcfs-reserve", scene).admit == ("a",)
    assert decide("fcfs-greedy", scene).admit == ("a", "b")


def test_greedy_preempts_the_youngest():
    scene = Scene(num_blocks=31).running("old", output=209, for_s=50).running("young", output=225, for_s=1)
    assert decide("fcfs-greedy", scene).preempt == (("young", RECOMPUTE),)


# -- the ones that share time


def test_round_robin_swaps_the_longest_running_for_the_longest_waiting():
    # 15 blocks each, and 25 tokens within the interval take two more.
    scene = Scene(num_blocks=34, cost=FlatCost(prefill=1e-2))
    scene.running("old", for_s=9.0, unread_s=0.0).running("young", for_s=2.0, unread_s=30.0)
    scene.paused("away", for_s=3.0, unread_s=50.0)
    decision = decide("round-robin", scene)
    assert decision.preempt == (("old", LOAD),)
    assert decision.resume == (("away", LOAD),)


def test_earliest_underflow_runs_the_emptiest_buffers():
    scene = Scene(num_blocks=34, cost=FlatCost(prefill=1e-2))
    scene.running("full", unread_s=4.0).running("low", unread_s=1.0).paused("mid", unread_s=3.0)
    decision = decide("earliest-underflow", scene)
    assert decision.preempt == (("full", LOAD),)
    assert decision.resume == (("mid", LOAD),)


@pytest.mark.parametrize("policy", ["round-robin", "earliest-underflow"])
def test_between_intervals_baselines_only_fill_up(policy):
    baseline = make_policy(SchedulerConfig(policy=policy, watermark=0.0))
    scene = Scene(num_blocks=34).running("a", unread_s=9.0).running("b", unread_s=9.0)
    baseline.decide(scene.snapshot())
    scene.now_s += 0.1
    scene.paused("p", unread_s=0.0)
    assert baseline.decide(scene.snapshot()).preempt == ()


@pytest.mark.parametrize(("policy", "by"), [("andes", RECOMPUTE), ("andes-offload", LOAD)])
def test_andes_prefers_the_highest_gain_of_experience_per_token(policy, by):
    scene = Scene(num_blocks=34, cost=FlatCost(prefill=1e-2))
    scene.running("full", unread_s=9.5).running("low", unread_s=1.0).waiting("new", prompt=200, for_s=3.0)
    decision = decide(policy, scene)
    assert decision.preempt == (("full", by),)
    assert decision.admit == ("new",)


def test_andes_keeps_its_preemptions_to_one_per_request():
    scene = Scene(num_blocks=34)
    scene.running("full", unread_s=9.5).running("low", unread_s=1.0).waiting("new", prompt=200, for_s=3.0)
    for _ in range(3):
        for phase in (2, 1):
            scene.tracker.set_state("low", phase, scene.now_s)
    assert decide("andes", scene).preempt == ()


# -- for every policy


def test_generating_ahead_is_capped_per_reader():
    scene = Scene().running("full", unread_s=9.0).running("low", unread_s=2.0).running("batch", rate=None)
    c = scene.snapshot().columns
    assert c.ids_of(held_back(c, 5.0).nonzero()[0]) == ("full",)
    rows, release_s = held_on_device(c, 5.0)
    assert c.ids_of(rows) == ("full",)
    assert release_s == pytest.approx(scene.now_s + 4.0)
    assert not held_back(c, None).any()
    for held in (held_on_device(c, 10.0), held_on_device(c, None)):
        assert not len(held[0])
        assert held[1] is None


def test_the_fullest_buffer_is_written_first():
    scene = Scene(num_blocks=200).running("low", unread_s=1.0, clean=False).running("full", unread_s=9.0, clean=False)
    scene.running("clean", unread_s=99.0, output=2000, max_tokens=3000).paused("away")
    assert write_order(scene.snapshot().columns) == ("full", "low")


SMALL = Machine(
    StepCoefficients(0.02, 1e-4, 1e-7, 2e-4, 1e-9), 100_000, 16, 100, 500, 2e9, max_num_seqs=16,
    max_num_batched_tokens=128,
)  # fmt: skip


@settings(max_examples=40, deadline=None)
@given(
    policy=st.sampled_from(ALL),
    asks=st.lists(
        st.builds(
            Ask,
            arrival_s=st.floats(0, 3),
            prompt=st.integers(1, 200),
            output=st.integers(1, 60),
            rate=st.sampled_from([None, 5.0, 30.0]),
        ),
        min_size=1,
        max_size=10,
    ),
    num_blocks=st.integers(28, 60),
)
def test_every_policy_finishes_every_request_and_loses_no_block(policy, asks, num_blocks):
    machine = Machine(SMALL.coefficients, 100_000, 16, num_blocks, 500, 2e9, 16, 128)
    driver = Driver(asks, machine, policy=policy)
    while driver.step():
        driver.check()
        assert driver.steps < 20_000
    assert all(len(driver.times[req]) == ask.output for req, ask in driver.asks.items())
    assert driver.free == num_blocks


def test_tokenflow_beats_blind_sharing_in_preemptions_at_no_worse_stalls():
    asks = burst(24, 60, 120, rate=12.0)
    runs = {name: Driver(asks, SMALL, policy=name).run() for name in ("tokenflow", "round-robin")}
    assert runs["tokenflow"].mean_preemptions < 0.5 * runs["round-robin"].mean_preemptions
    assert runs["tokenflow"].report().stall_s <= runs["round-robin"].report().stall_s + 1e-9
