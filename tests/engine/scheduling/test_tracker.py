"""Reader state: the vectorised playback against a token-by-token reference, feedback, and the bookkeeping of rows."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tfserve.engine.scheduling.state import RequestState
from tfserve.engine.scheduling.tracker import Tracker
from tfserve.errors import RequestError


def tracker_with(**rates) -> Tracker:
    tracker = Tracker(default_rate=20.0)
    for req, rate in rates.items():
        tracker.add(req, arrival_s=0.0, num_prompt=10, max_tokens=100, rate=rate)
    return tracker


def test_a_stall_is_known_only_where_the_rate_is():
    tracker = tracker_with(named=10.0, none=None)
    for req in ("assumed", "reported"):
        tracker.add(req, arrival_s=0.0, num_prompt=10, max_tokens=100, rate=10.0, is_rate_assumed=True)
    for req in ("auto", "auto_reported"):
        tracker.add(req, arrival_s=0.0, num_prompt=10, max_tokens=100, rate="auto")
    tracker.on_tokens(["named", "none", "assumed", "reported", "auto", "auto_reported"], 10, 0.0)
    tracker.on_played("auto_reported", 5, 0.25)
    tracker.on_played("reported", 5, 0.5)
    assert tracker.stall_s("named", 3.0) == pytest.approx(2.0)
    assert tracker.stall_s("reported", 3.0) == pytest.approx(2.0)
    assert tracker.stall_s("none", 3.0) is None
    assert tracker.stall_s("assumed", 3.0) is None
    assert tracker.stall_s("auto", 3.0) is None
    assert tracker.stall_s("auto_reported", 3.0) == pytest.approx(2.5)
    # A policy goes by the assumption all the same.
    assert row_of(tracker, "assumed", 3.0)["stall_s"] == pytest.approx(2.0)


def row_of(tracker: Tracker, req: str, now_s: float) -> dict[str, float]:
    c = tracker.columns(now_s)
    i = c.ids.index(req)
    names = ("unread", "consumed", "stall_s", "current_stall_s", "time_to_empty_s", "rate", "num_output", "read_area")
    return {name: float(getattr(c, name)[i]) for name in names}


class SlowReader:
    """The definition: a token is read in 1/r seconds, one after the other, none before it came."""

    def __init__(self, rate: float) -> None:
        self.rate = rate
        self.came: list[float] = []

    def at(self, now: float) -> tuple[float, float]:
        """Tokens read and seconds stalled."""
        read = stall = 0.0
        ready = self.came[0] if self.came else now
        for came in self.came:
            stall += max(min(came, now) - ready, 0.0)
            start = max(came, ready)
            read += min(max((now - start) * self.rate, 0.0), 1.0)
            ready = start + 1 / self.rate
        return read, stall + max(now - ready, 0.0)


@settings(max_examples=100, deadline=None)
@given(
    rates=st.lists(st.floats(0.5, 50.0), min_size=1, max_size=4),
    steps=st.lists(
        st.tuples(st.floats(0.0, 0.7), st.lists(st.integers(0, 3), min_size=4, max_size=4)), min_size=1, max_size=25
    ),
    look_s=st.floats(0.0, 3.0),
)
def test_playback_equals_the_token_by_token_reference(rates, steps, look_s):
    reqs = [f"r{i}" for i in range(len(rates))]
    tracker = tracker_with(**dict(zip(reqs, rates, strict=True)))
    slow = [SlowReader(rate) for rate in rates]
    now = 0.0
    for dt, counts in steps:
        now += dt
        tracker.on_tokens(reqs, counts[: len(reqs)], now)
        for reader, n in zip(slow, counts, strict=False):
            reader.came += [now] * n
    now += look_s
    for req, reader in zip(reqs, slow, strict=True):
        row = row_of(tracker, req, now)
        read, stall = reader.at(now)
        assert row["consumed"] == pytest.approx(read, abs=1e-6)
        assert row["unread"] == pytest.approx(len(reader.came) - read, abs=1e-6)
        assert row["stall_s"] == pytest.approx(stall, abs=1e-6)


def test_reading_starts_with_the_first_token():
    tracker = tracker_with(a=10.0)
    assert row_of(tracker, "a", 5.0)["stall_s"] == 0
    tracker.on_tokens(["a"], 20, 5.0)
    row = row_of(tracker, "a", 6.0)
    assert (row["consumed"], row["unread"], row["time_to_empty_s"]) == (10.0, 10.0, 1.0)


def test_an_empty_buffer_stalls_until_the_next_token():
    tracker = tracker_with(a=10.0)
    tracker.on_tokens(["a"], 5, 0.0)
    row = row_of(tracker, "a", 2.0)
    assert (row["current_stall_s"], row["stall_s"], row["unread"]) == (1.5, 1.5, 0.0)
    tracker.on_tokens(["a"], 10, 2.0)
    row = row_of(tracker, "a", 2.5)
    assert (row["current_stall_s"], row["stall_s"], row["unread"]) == (0.0, 1.5, 5.0)


def test_read_area_is_the_integral_of_what_was_read():
    tracker = tracker_with(a=10.0)
    tracker.on_tokens(["a"], 5, 0.0)
    # A ramp to 5 in half a second, then flat for a second and a half.
    assert row_of(tracker, "a", 2.0)["read_area"] == pytest.approx(0.5 * 5 / 2 + 1.5 * 5)


def test_without_a_rate_there_is_no_buffer():
    tracker = tracker_with(a=None)
    tracker.on_tokens(["a"], 5, 0.0)
    row = row_of(tracker, "a", 9.0)
    assert (row["unread"], row["stall_s"], row["current_stall_s"]) == (0.0, 0.0, 0.0)
    assert row["time_to_empty_s"] == math.inf
    assert math.isnan(row["rate"])


def test_a_report_replaces_the_estimate_and_reading_goes_on_from_it():
    tracker = tracker_with(a=10.0)
    tracker.on_tokens(["a"], 50, 0.0)
    tracker.on_played("a", 4, 1.0)
    assert row_of(tracker, "a", 1.0)["unread"] == 46
    assert row_of(tracker, "a", 2.0)["unread"] == 36


def test_a_report_beyond_what_was_generated_is_cut_and_one_before_the_first_token_ignored():
    tracker = tracker_with(a=10.0)
    tracker.on_played("a", 3, 0.5)
    assert row_of(tracker, "a", 2.0)["stall_s"] == 0
    tracker.on_tokens(["a"], 5, 2.0)
    tracker.on_played("a", 400, 2.1)
    assert row_of(tracker, "a", 2.1)["unread"] == 0


def test_auto_follows_the_reports_and_a_named_rate_does_not():
    tracker = tracker_with(auto="auto", fixed="read")
    for req in ("auto", "fixed"):
        tracker.on_tokens([req], 500, 0.0)
        for i in range(1, 12):
            tracker.on_played(req, 5 * i, float(i))
    assert row_of(tracker, "auto", 12.0)["rate"] == pytest.approx(5.0, abs=0.1)
    assert row_of(tracker, "fixed", 12.0)["rate"] == 6.0


def test_auto_does_not_learn_from_a_reader_that_had_nothing_to_read():
    tracker = tracker_with(a="auto")
    tracker.on_tokens(["a"], 10, 0.0)
    tracker.on_played("a", 0, 0.0)
    tracker.on_played("a", 10, 5.0)
    assert row_of(tracker, "a", 5.0)["rate"] == 20.0


@pytest.mark.parametrize(("rate", "expected"), [("read", 6.0), ("listen", 4.0), ("fast", 12.0), ("auto", 20.0), (3, 3)])
def test_rates_by_name(rate, expected):
    assert row_of(tracker_with(a=rate), "a", 0.0)["rate"] == expected


@pytest.mark.parametrize("rate", ["slow", 0, -1.0, 1e-300, 1.1e6, 1e308, math.inf, math.nan])
def test_a_rate_that_means_nothing_is_refused(rate):
    with pytest.raises(RequestError, match="consumption_rate"):
        tracker_with(a=rate)


def test_rows_stay_dense_and_keep_their_values_when_requests_leave():
    tracker = Tracker(default_rate=20.0)
    rng = np.random.default_rng(0)
    live: dict[str, int] = {}
    for i in range(500):
        req = f"r{i}"
        tracker.add(req, arrival_s=float(i), num_prompt=i, max_tokens=10 * i + 1, rate=None)
        live[req] = i
        if rng.random() < 0.6:
            gone = rng.choice(list(live))
            tracker.remove(gone, completed=False)
            del live[gone]
    c = tracker.columns(500.0)
    assert dict(zip(c.ids, c.num_prompt.tolist(), strict=True)) == live
    assert dict(zip(c.ids, c.arrival_s.tolist(), strict=True)) == live
    assert len(tracker) == len(live)


def test_phases_in_order_of_arrival_and_preemptions_counted():
    tracker = tracker_with(a=1, b=1, c=1)
    for req in ("c", "a"):
        tracker.set_state(req, RequestState.RUNNING, 1.0)
    events = tracker.columns(1.0).num_events
    tracker.set_state("a", RequestState.PAUSED, 2.0)
    tracker.set_state("a", RequestState.LOADING, 3.0)
    tracker.set_state("a", RequestState.RUNNING, 4.0)
    c = tracker.columns(5.0)
    assert c.ids_of(c.in_state(RequestState.RUNNING)) == ("a", "c")
    assert c.num_preemptions[c.ids.index("a")] == c.total_preemptions == 1
    assert c.state_since_s[c.ids.index("a")] == 4.0
    assert c.num_events == events + 1  # the completed load


def test_expected_output_follows_completed_requests_but_never_passes_max_tokens():
    tracker = tracker_with(a=1, b=1, short=1)
    assert row_of(tracker, "a", 0.0)["num_output"] == 0
    tracker.on_tokens(["short"], 20, 0.0)
    tracker.on_tokens(["b"], 90, 0.0)
    tracker.remove("short", completed=True)
    c = tracker.columns(0.0)
    assert dict(zip(c.ids, c.expected_output.tolist(), strict=True)) == {"a": 20.0, "b": 100.0}


def test_an_answer_cut_at_its_max_tokens_only_says_that_answers_can_be_that_long():
    tracker = tracker_with(a=1, cut=1, short=1, long=1)
    tracker.on_tokens(["cut"], 100, 0.0)
    tracker.remove("cut", completed=True)
    assert row_of(tracker, "a", 0.0)["num_output"] == 0
    assert tracker.columns(0.0).expected_output.tolist() == [100.0, 100.0, 100.0]
    tracker.on_tokens(["short"], 20, 0.0)
    tracker.remove("short", completed=True)
    tracker.on_tokens(["long"], 100, 0.0)
    tracker.remove("long", completed=True)
    assert 20.0 < tracker.columns(0.0).expected_output[0] < 30.0


@pytest.mark.parametrize("at_s", [1.0, 3.0])
def test_a_report_claims_no_more_than_the_highest_rate_can_have_read(at_s):
    tracker = Tracker(default_rate=6.0, max_rate=50.0)
    for req, rate in (("read", "read"), ("auto", "auto"), ("fast", 200.0)):
        tracker.add(req, arrival_s=0.0, num_prompt=10, max_tokens=1000, rate=rate)
        tracker.on_tokens([req], 900, 0.0)
        tracker.on_played(req, 900, at_s)
    assert row_of(tracker, "read", at_s)["consumed"] == 50 * at_s
    assert row_of(tracker, "auto", at_s)["consumed"] == 50 * at_s
    # A rate that was named above it, as only an embedded engine takes it, is believed.
    assert row_of(tracker, "fast", at_s)["consumed"] == 200 * at_s


@given(
    steps=st.lists(st.tuples(st.floats(0.0, 3.0), st.integers(0, 60), st.integers(0, 2000)), min_size=1, max_size=40),
    max_rate=st.floats(6.0, 100.0),
)
def test_no_reports_raise_auto_above_what_was_delivered_or_the_highest_rate(steps, max_rate):
    tracker = Tracker(default_rate=6.0, max_rate=max_rate)
    tracker.add("a", arrival_s=0.0, num_prompt=10, max_tokens=10_000, rate="auto")
    tracker.on_tokens(["a"], 1, 0.0)
    now, delivered, fastest = 0.0, 1, 0.0
    for pause, tokens, played in steps:
        now += pause
        tracker.on_tokens(["a"], tokens, now)
        delivered += tokens
        tracker.on_played("a", played, now)
        if now:
            fastest = max(fastest, delivered / now)
        assert row_of(tracker, "a", now)["rate"] <= max(6.0, min(max_rate, fastest)) + 1e-9
        assert row_of(tracker, "a", now)["consumed"] <= min(delivered, max_rate * now) + 1e-9
