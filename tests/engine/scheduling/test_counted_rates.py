"""A rate far beyond what one stream gets of a full device counts as that, however high it is."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.engine.policy_driver import Ask, Driver, Machine
from tests.engine.scene import FlatCost, Scene, decide
from tfserve.engine.scheduling.cost_model import StepCoefficients
from tfserve.engine.scheduling.policies.counted import as_counted, stream_share

CPU_32 = Machine(
    StepCoefficients(0.012, 2.5e-3, 1e-6, 2e-3, 1e-7), 46080, 32, 1400, 5600, 2e9, max_num_seqs=32,
    max_num_batched_tokens=512,
)  # fmt: skip
"""A small model on two cores, as tfserve serves it by default: batch slots are short, memory is not."""

HONEST = [Ask(1.0 + 4.0 * k, 80, 50, 6.0) for k in range(4)]


def first_waits(hostile: list[Ask], machine: Machine = CPU_32, **scheduler) -> list[float]:
    """The wait of honest readers for their first tokens, beside these requests; the run ends with their answers."""
    driver = Driver([*HONEST, *hostile], machine, policy="tokenflow", **scheduler)
    honest = [req for req, ask in driver.asks.items() if any(ask is each for each in HONEST)]
    while any(len(driver.times[req]) < driver.asks[req].output for req in honest):
        assert driver.step()
        driver.check()
        assert driver.now < 300.0, "no end in sight"
    return [driver.times[req][0] - driver.asks[req].arrival_s for req in honest]


def small(num_blocks: int) -> Machine:
    return replace(CPU_32, num_blocks=num_blocks, num_host_blocks=4 * num_blocks)


# -- what counts


def test_rates_up_to_twice_what_a_stream_gets_are_taken_at_their_word():
    scene = Scene(cost=FlatCost(step=0.02)).running("a", rate=99.0).waiting("b", rate=6.0).waiting("c", rate=None)
    snapshot = scene.snapshot()
    share = stream_share(snapshot, 6.0)
    assert share == pytest.approx(50.0)
    assert as_counted(snapshot, share) is snapshot


def test_the_default_rate_is_taken_at_its_word_on_a_slow_device():
    assert stream_share(Scene(cost=FlatCost(step=1.0)).running("a").snapshot(), 6.0) == 6.0


@pytest.mark.parametrize(("unread_s", "on_device"), [(2.0, True), (0.0, True), (-9.0, True), (2.0, False)])
def test_a_rate_far_beyond_counts_as_what_a_stream_gets(unread_s, on_device):
    """Its reading so far is that of a reader of that rate, whatever its reports and its own rate say."""

    def counted(rate):
        scene = Scene(num_blocks=200)
        (scene.running if on_device else scene.paused)("a", unread_s=unread_s, rate=rate, output=2000)
        return as_counted(scene.snapshot(), 30.0).columns

    c = counted(1e6)
    # 2,000 tokens, the first a minute ago.
    assert c.rate[0] == 30.0
    assert c.unread[0] == pytest.approx(2000 - 60 * 30)
    for rate in (61.0, 200.0):
        assert np.array_equal(counted(rate).time_to_empty_s, c.time_to_empty_s)
        assert np.array_equal(counted(rate).current_stall_s, c.current_stall_s)


def test_what_a_high_rate_lacked_on_the_device_is_forgiven_and_off_the_device_counts():
    here = as_counted(Scene().running("a", rate=500.0, output=100).snapshot(), 20.0).columns
    assert (here.time_to_empty_s[0], here.current_stall_s[0]) == (0.0, 0.0)
    away = as_counted(Scene().paused("a", rate=500.0, output=100, for_s=3.0).snapshot(), 20.0).columns
    assert (away.time_to_empty_s[0], away.current_stall_s[0]) == (0.0, pytest.approx(3.0))


def test_one_that_waits_for_its_first_token_has_read_nothing():
    c = as_counted(Scene().waiting("a", rate=500.0).snapshot(), 20.0).columns
    assert (c.unread[0], c.current_stall_s[0], c.stall_s[0]) == (0.0, 0.0, 0.0)


def test_a_high_rate_makes_room_for_a_newcomer_as_any_other_that_is_ahead():
    def moves(rate):
        scene = Scene(num_blocks=145, cost=FlatCost(step=0.05)).running("fast", rate=rate, output=2000, max_tokens=4000)
        return decide(scene.waiting("new", prompt=320, rate=6.0))

    assert moves(1e6).admit == moves(41.0).admit == ("new",)


def test_shed_refuses_no_request_because_of_another_ones_rate():
    scene = Scene(cost=FlatCost(capacity=200.0, step=0.05)).running("fast", rate=1e6)
    for number in range(8):
        scene.waiting(f"honest {number}", rate=6.0)
    assert decide(scene, overload="shed").reject == ()


# -- whole runs


@pytest.mark.parametrize("rate", [50.0, 1e6])
def test_twenty_at_a_high_rate_do_no_more_harm_than_twenty_honest_ones(rate):
    honest = first_waits([Ask(0.0, 80, 400, 6.0) for _ in range(20)])
    assert max(first_waits([Ask(0.0, 80, 400, rate) for _ in range(20)])) < max(honest) + 2.0


@pytest.mark.parametrize("rate", [0.01, 0.1])
def test_slow_readers_keep_no_request_out_of_memory(rate):
    # Device and host hold 16 of them. Their forty prompts come first, 6 s of work.
    slow = first_waits([Ask(0.0, 80, 300, rate) for _ in range(40)], small(30))
    assert max(slow) < 10.0
    assert max(slow[1:]) < 4.0


@settings(max_examples=10, deadline=None)
@given(
    rates=st.lists(st.sampled_from([0.01, 20.0, 100.0, 1e3, 1e6]), min_size=1, max_size=16),
    output=st.integers(50, 200),
    num_blocks=st.integers(60, 200),
    overload=st.sampled_from(["queue", "share"]),
)
def test_no_honest_reader_waits_because_others_name_more_than_they_can_get(rates, output, num_blocks, overload):
    """A full device gives 12 to 25 tokens/s to each request: any much higher rate counts like 100."""

    def longest(highest: float) -> float:
        hostile = [Ask(0.0, 80, output, min(rate, highest)) for rate in rates]
        return max(first_waits(hostile, small(num_blocks), overload=overload))

    assert longest(1e6) == pytest.approx(longest(100.0), abs=1.0)
