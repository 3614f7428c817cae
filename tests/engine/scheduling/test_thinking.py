"""Thinking has no reader: what the tracker counts of it, and how policies rank a request that thinks."""

from __future__ import annotations

import math

import numpy as np
import pytest

from tests.engine.policy_driver import Ask, Driver, Machine
from tests.engine.scene import FlatCost, Scene, decide, set_kv
from tfserve.arrays import Floats
from tfserve.engine.scheduling.policies.headroom import headroom_s
from tfserve.engine.scheduling.policy import held_back
from tfserve.engine.scheduling.qos import buffer_sizes
from tfserve.engine.scheduling.state import RequestState
from tfserve.engine.scheduling.tracker import Tracker

RATE = 10.0


def thinker(num_thoughts: int = 0, rate: float | str | None = RATE) -> Tracker:
    """One request `a`, whose thoughts come one a second from time 0."""
    tracker = Tracker(default_rate=RATE)
    tracker.add("a", arrival_s=0.0, num_prompt=10, max_tokens=500, rate=rate, may_think=True)
    for second in range(num_thoughts):
        tracker.on_planned(["a"])
        tracker.on_tokens(["a"], 1, float(second))
    return tracker


def seen(tracker: Tracker, now_s: float) -> dict[str, float]:
    c = tracker.columns(now_s)
    names = ("num_output", "num_thoughts", "unread", "consumed", "stall_s", "current_stall_s", "read_area")
    return {name: float(getattr(c, name)[0]) for name in names}


def test_thoughts_are_neither_unread_nor_read_and_no_reader_stalls_for_them():
    tracker = thinker(30)
    tracker.on_planned(["a"])  # a step under way samples one more
    now = seen(tracker, 100.0)
    assert (now.pop("num_output"), now.pop("num_thoughts")) == (31, 30)
    assert set(now.values()) == {0.0}
    assert math.isinf(tracker.columns(100.0).time_to_empty_s[0])
    assert math.isnan(tracker.columns(100.0).first_token_s[0])
    assert tracker.stall_s("a", 100.0) == 0


def test_playback_starts_with_the_first_token_of_the_answer():
    tracker = thinker(30)
    tracker.on_answer("a", 30, 29.0)
    assert seen(tracker, 40.0)["stall_s"] == 0
    tracker.on_tokens(["a"], 20, 50.0)
    now = seen(tracker, 51.0)
    assert (now["unread"], now["consumed"]) == (10.0, 10.0)
    assert tracker.columns(51.0).time_to_empty_s[0] == 1.0
    assert now["read_area"] == pytest.approx(5.0)
    assert tracker.columns(51.0).first_token_s[0] == 50.0
    assert tracker.stall_s("a", 55.0) == pytest.approx(3.0)


@pytest.mark.parametrize("num_in_flight", [0, 1])
def test_a_text_that_turns_out_not_to_think_begins_with_the_token_that_shows_it(num_in_flight: int):
    tracker = thinker(3)  # white space, which may come before a tag
    if num_in_flight:
        tracker.on_planned(["a"])
    tracker.on_answer("a", 0, 2.0)
    now = seen(tracker, 2.1)
    assert (now["num_thoughts"], now["consumed"]) == (0, pytest.approx(1.0))
    assert now["unread"] == pytest.approx(2.0 + num_in_flight)
    assert tracker.columns(2.1).first_token_s[0] == 2.0


def test_a_report_counts_tokens_of_the_answer_and_is_ignored_before_it():
    tracker = thinker(30, rate="auto")
    tracker.on_played("a", 25, 30.0)
    tracker.on_answer("a", 30, 29.0)
    assert seen(tracker, 31.0)["consumed"] == 0
    tracker.on_tokens(["a"], 40, 31.0)
    tracker.on_played("a", 500, 33.0)
    now = seen(tracker, 33.0)
    assert (now["consumed"], now["unread"]) == (40.0, 0.0)


def test_a_thought_in_flight_is_none_to_read_and_the_token_behind_them_is():
    tracker = thinker(30)
    for may_think in (True, False):
        if not may_think:
            tracker.on_answer("a", 30, 29.0)
        tracker.on_planned(["a"])
        c = tracker.columns(30.0)
        assert (bool(c.has_started[0]), bool(c.thinks[0])) == (not may_think, may_think)
    assert seen(tracker, 30.0)["unread"] == 2.0


# -- how it ranks


def preempted(scene: Scene) -> list[str]:
    return [req for req, _ in decide(scene).preempt]


def test_it_waits_as_any_request_before_its_output_and_then_counts_as_one_without_a_reader():
    scene = Scene().waiting("new", for_s=3.0, may_think=True).running("on", may_think=True)
    scene.paused("off", may_think=True, for_s=4.0).paused("batch", rate=None, for_s=4.0)
    c = scene.snapshot().columns
    assert headroom_s(c, scene.now_s, 10.0).tolist() == [-3.0, 10.0, 6.0, 6.0]


def test_it_gives_way_at_once_to_readers_and_the_latest_goes_first():
    scene = Scene(num_blocks=30).running("first", may_think=True).running("second", may_think=True)
    assert preempted(scene.waiting("new", for_s=0.1)) == ["second"]
    scene = Scene(num_blocks=30).running("ahead", unread_s=30.0).running("thinks", may_think=True)
    assert preempted(scene.paused("low", unread_s=0.5)) == ["thinks"]


@pytest.mark.parametrize(
    ("away_s", "unread_s", "leaves"),
    [(5.0, 30.0, False), (11.0, 5.0, True), (11.0, 1.0, False), (17.0, 1.0, True)],
)
def test_it_takes_the_place_of_a_reader_once_its_patience_is_over(away_s: float, unread_s: float, leaves: bool):
    scene = Scene(num_blocks=15).running("reads", unread_s=unread_s).paused("thinks", may_think=True, for_s=away_s)
    decision = decide(scene)
    assert [req for req, _ in decision.preempt] == ["reads"] * leaves
    assert [req for req, _ in decision.resume] == ["thinks"] * leaves


def test_between_two_that_think_no_switch_is_made():
    assert preempted(Scene(num_blocks=15).running("on", may_think=True).paused("off", may_think=True, for_s=60)) == []


def test_it_returns_at_once_into_free_memory():
    decision = decide(Scene().running("reads", unread_s=0.5).paused("thinks", may_think=True, for_s=1.0))
    assert [req for req, _ in decision.resume] == ["thinks"]


def test_one_that_lost_its_kv_is_no_newcomer():
    scene = Scene(cost=FlatCost(capacity=30.0)).running("reader", unread_s=0.5).waiting("new", for_s=60.0)
    scene.paused("lost", may_think=True)
    scene.tracker.set_state("lost", RequestState.WAITING, scene.now_s - 1)
    set_kv(scene.tracker, ["lost"], num_computed=0, host_tokens=0)
    # The rates are beyond the capacity: a newcomer waits, what was let in goes on.
    assert decide(scene, overload="shed").admit == ("lost",)


def test_prompts_beside_it_are_limited_for_readers_only():
    cost = FlatCost(step=0.02, prefill=1e-3)
    alone = Scene(cost=cost).running("thinker", may_think=True).prefilling("p", prompt=1000)
    assert decide(alone).prefill_tokens is None
    beside = alone.running("reader", unread_s=0.3)
    assert decide(beside).prefill_tokens == pytest.approx((0.9 * 0.3 - 0.02) / 1e-3, abs=1)


def test_it_is_not_held_back_for_generating_ahead():
    c = Scene().running("thinker", may_think=True, rate=0.1).running("reader", unread_s=5.0).snapshot().columns
    assert held_back(c, 1.0).tolist() == [False, True]


def test_thoughts_starve_no_reader_and_are_not_starved_by_readers():
    """A stream of requests beyond the memory, of which every third thinks for three times as long as it answers."""

    def run(policy: str, thoughts: int = 1200) -> tuple[Floats, Floats]:
        """The longest stall and the latest first token in seconds, each of those that only answer and of the others."""
        asks = [Ask(0.15 * i, 800, 400 + t, thoughts=t) for i in range(240) for t in (0 if i % 3 else thoughts,)]
        driver = Driver(asks, Machine(num_blocks=250), policy=policy).run()
        worst = np.zeros((2, 2))
        for ask, served in zip(driver.asks.values(), driver.served(), strict=True):
            found = buffer_sizes(served)[1], served.token_s[0] - served.arrival_s
            worst[:, int(ask.thoughts > 0)] = np.maximum(worst[:, int(ask.thoughts > 0)], found)
        return worst[0], worst[1]

    stall_s, ttft_s = run("tokenflow")
    assert stall_s.max() < 0.1
    assert ttft_s[0] < 1.0
    assert ttft_s[1] < 1.25 * run("fcfs-chunked")[1][1]
