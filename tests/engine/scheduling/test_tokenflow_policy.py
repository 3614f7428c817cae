"""The tokenflow policy, one decision at a time: admissions, preemptions, and the times of full passes."""

from __future__ import annotations

import pytest

from tests.engine.scene import FlatCost, Scene, decide, set_kv
from tfserve.config import SchedulerConfig
from tfserve.engine.scheduling.policies.tokenflow.policy import TokenFlow, is_stressed
from tfserve.engine.scheduling.policy import ResumeBy
from tfserve.engine.scheduling.reasons import Cause, Reason

LOAD, RECOMPUTE = ResumeBy.LOAD, ResumeBy.RECOMPUTE


# -- stress and what goes on without it


def test_without_stress_all_requests_keep_running():
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
def test_a_waiting_paused_or_low_request_is_stress(scene):
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
    assert decision.reasons == {"full": Reason(Cause.MAKES_ROOM, pytest.approx(8.0), "new")}


@pytest.mark.parametrize("comes", ["newcomer", "returning"])
def test_of_requests_far_ahead_the_one_read_first_to_its_end_is_preempted(comes):
    # 12 %, 27 % and 40 % are unread; the last two are well ahead, with 180 and 360 tokens still to read.
    scene = Scene(num_blocks=45).running("low", unread_s=2.4, max_tokens=400)
    scene.running("far", unread_s=8.0, max_tokens=400).running("near", unread_s=4.0, max_tokens=300)
    scene = scene.waiting("new") if comes == "newcomer" else scene.paused("p", unread_s=0.5, max_tokens=400)
    assert decide(scene).preempt == (("near", LOAD),)


def test_much_of_a_short_answer_may_be_too_little_to_leave_with():
    # "brief" has 16 % unread, but 0.8 s: it would be due at once.
    scene = Scene(num_blocks=30).running("brief", unread_s=0.8, output=90, max_tokens=100)
    scene.running("full", unread_s=8.0, output=314, max_tokens=1000).waiting("new", for_s=3.0)
    assert decide(scene).preempt == (("full", LOAD),)


def test_a_slow_reader_well_ahead_stays_before_a_fast_one():
    scene = Scene(num_blocks=45).running("fast", unread_s=4.0, max_tokens=400, rate=40.0).running("low", unread_s=2.4)
    assert decide(scene.running("slow", unread_s=8.0, max_tokens=400).waiting("new")).preempt == (("fast", LOAD),)


def test_requests_without_a_reader_are_preempted_first():
    scene = Scene(num_blocks=45).running("far", unread_s=16.0, max_tokens=400).running("batch", rate=None)
    assert decide(scene.running("near", unread_s=4.0, max_tokens=400).waiting("new")).preempt == (("batch", LOAD),)


def test_no_reader_is_displaced_that_would_stall_meanwhile():
    scene = Scene(num_blocks=30).running("a", unread_s=2.5).running("b", unread_s=2.5).waiting("new", for_s=30.0)
    scene.cost = FlatCost(out_s=1.0, back_s=1.0, prefill=1.0)
    set_kv(scene.tracker, ["a", "b"], host_tokens=0)
    # 1.5 x (1 + 1 + 0.5) s of playback are needed.
    assert decide(scene).admit == ()
    assert decide(scene, buffer_conservativeness=0.9).admit == ("new",)


def test_the_longer_a_newcomer_waits_the_shorter_a_victims_buffer_may_be():
    assert decide(Scene(num_blocks=30).running("a", 1.6).running("b", 1.5).waiting("new", for_s=0.3)).preempt == ()
    decision = decide(Scene(num_blocks=30).running("a", 1.6).running("b", 1.5).waiting("new", for_s=0.5))
    assert decision.preempt == (("a", LOAD),)


def test_no_request_is_preempted_for_a_prompt_that_is_not_next():
    scene = Scene(num_blocks=70).running("a", unread_s=8.0).running("b", unread_s=8.0).prefilling("long", prompt=600)
    assert decide(scene.waiting("new")).preempt == ()
    scene = Scene(num_blocks=33).running("a", unread_s=8.0).running("b", unread_s=8.0).prefilling("short", prompt=16)
    assert decide(scene.waiting("new", prompt=48)).admit == ("new",)


def test_conservativeness_of_twenty_queues_like_fcfs():
    scene = Scene(num_blocks=30).running("low", unread_s=2.5).running("full", unread_s=8.0).waiting("new")
    assert decide(scene, buffer_conservativeness=20.0).preempt == ()


def test_a_new_resident_keeps_its_place_for_a_minimum_time():
    scene = Scene(num_blocks=30).running("a", unread_s=8.0, for_s=0.5).running("b", unread_s=8.0, for_s=0.5)
    assert decide(scene.waiting("new")).preempt == ()


def test_several_victims_together_make_room_for_a_long_prompt():
    scene = Scene(num_blocks=47)
    for i in range(3):
        scene.running(f"r{i}", unread_s=5.0 + i)
    decision = decide(scene.waiting("long", prompt=400))
    assert decision.preempt == (("r2", LOAD), ("r1", LOAD))
    assert decision.admit == ("long",)


# -- swaps


def test_a_paused_reader_comes_back_when_its_playback_nears_its_end_and_not_before():
    tight = Scene(num_blocks=30).running("a", unread_s=8.0).running("b", unread_s=6.0)
    assert decide(tight.paused("p", unread_s=3.0)).resume == ()
    urgent = Scene(num_blocks=30).running("a", unread_s=8.0).running("b", unread_s=6.0).paused("p", unread_s=0.8)
    decision = decide(urgent)
    assert decision.preempt == (("a", LOAD),)
    assert decision.resume == (("p", LOAD),)


def test_free_memory_is_used_before_any_buffer_is_low():
    scene = Scene(num_blocks=60).running("a", unread_s=8.0).paused("p", unread_s=30.0)
    decision = decide(scene)
    assert (decision.preempt, decision.resume) == ((), (("p", LOAD),))


def test_no_swap_between_buffers_that_are_nearly_equal():
    scene = Scene(num_blocks=30).running("a", unread_s=2.5).running("b", unread_s=2.0).paused("p", unread_s=0.9)
    assert decide(scene).preempt == ()


def test_a_starving_reader_displaces_even_low_buffers():
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


@pytest.mark.parametrize("comes", ["newcomer", "returning"])
def test_without_a_rate_one_never_displaces_another_without_one(comes):
    scene = Scene(num_blocks=30).running("a", rate=None).running("b", rate=None)
    scene = scene.waiting("c", rate=None, for_s=60) if comes == "newcomer" else scene.paused("c", rate=None, for_s=60)
    decision = decide(scene)
    assert (decision.preempt, decision.admit, decision.resume) == ((), (), ())


def test_without_a_rate_newcomers_do_not_take_the_memory_that_one_waits_for_to_return():
    scene = Scene(num_blocks=42).running("a", rate=None).paused("large", rate=None, output=400, for_s=12.0)
    scene.waiting("small", rate=None, priority=-1)
    assert decide(scene).admit == ()
    assert decide(scene.waiting("reader", for_s=0.1)).admit == ("reader",)
    scene.num_blocks = 80
    decision = decide(scene)
    assert [req for req, _ in decision.resume] == ["large"]
    assert decision.admit == ("reader", "small")


def test_a_reader_passes_requests_without_a_rate_that_lack_memory():
    scene = Scene(num_blocks=30).running("a", rate=None).running("b", rate=None)
    scene.waiting("batch", rate=None, for_s=60).waiting("reader", for_s=0.5)
    decision = decide(scene)
    assert decision.admit == ("reader",)
    assert [req for req, _ in decision.preempt] == ["a"]


def test_without_a_rate_one_comes_only_where_it_can_stay():
    # Each of the residents grows by 50 tokens in the second that one stays at least.
    scene = Scene(num_blocks=30).running("a", rate=None).waiting("batch", rate=None)
    assert decide(scene).admit == ("batch",)
    scene.num_blocks = 20
    assert decide(scene).admit == ()
    assert decide(Scene(num_blocks=3).waiting("alone", rate=None)).admit == ("alone",)


def test_priority_orders_those_without_a_rate():
    scene = Scene(num_blocks=13)
    scene.waiting("first", rate=None, priority=5).waiting("second", rate=None, priority=-1).waiting("reader", for_s=0.1)
    assert decide(scene).admit == ("reader", "second")


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


def test_a_new_request_without_a_reader_forces_no_pass_during_its_slack():
    policy = TokenFlow(SchedulerConfig(policy="tokenflow", schedule_interval_s=1.0, watermark=0.0))
    scene = Scene(num_blocks=30).running("a", unread_s=8.0).running("b", unread_s=8.0)
    scene.waiting("batch", rate=None, for_s=5.0)
    for _ in range(10):
        policy.decide(scene.snapshot())
        scene.now_s += 0.05
    assert policy.num_passes == 1


def test_it_asks_to_be_woken_when_a_paused_reader_will_be_due():
    scene = Scene(num_blocks=15, cost=FlatCost(prefill=1e-2)).running("a", unread_s=9.0).paused("p", unread_s=1.25)
    decision = decide(scene, schedule_interval_s=5.0)
    # 1.25 s left, less 1 s of caution and 0.01 s of loading.
    assert decision.wake_s == pytest.approx(scene.now_s + 0.24, abs=0.01)
