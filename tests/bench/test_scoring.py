from __future__ import annotations

import pytest

from tfserve.bench.client import RequestRecord
from tfserve.bench.scoring import quality, quality_by_rate, score_rate, token_times
from tfserve.errors import TfserveError


def record(times, rate=10.0, sent=0.0, tokens=None, error=None) -> RequestRecord:
    return RequestRecord(
        index=0,
        arrival_s=sent,
        sent_s=sent,
        rate=rate,
        chunks=[(when, 1) for when in times],
        output_tokens=tokens,
        error=error,
    )


def test_a_chunk_of_several_tokens_brings_them_at_once():
    both = RequestRecord(index=0, arrival_s=0.0, chunks=[(1.0, 2), (2.0, 1)])
    assert token_times(both) == [1.0, 1.0, 2.0]


def test_tokens_without_a_chunk_are_spread_over_the_chunks():
    assert token_times(record([1.0, 2.0, 3.0], tokens=6)) == [1.0, 1.0, 2.0, 2.0, 3.0, 3.0]
    assert token_times(record([1.0, 2.0, 3.0], tokens=4)) == [1.0, 1.0, 2.0, 3.0]
    assert token_times(record([1.0, 2.0, 3.0], tokens=2)) == [1.0, 2.0]
    assert token_times(record([], tokens=3)) == []


def test_a_stream_at_its_readers_rate_is_all_effective_and_never_stalls():
    scores = quality([record([0.5 + 0.1 * k for k in range(50)])])
    assert scores.report.effective_throughput == pytest.approx(scores.report.raw_throughput)
    assert scores.report.stall_s == pytest.approx(0.0, abs=1e-9)
    assert scores.report.on_time_goodput == pytest.approx(scores.report.raw_throughput)


def test_a_pause_is_a_stall_as_long_as_it_outlasts_what_is_unread():
    scores = quality([record([0.0, 0.0, 3.0])])
    assert scores.report.stall_s == pytest.approx(2.8)
    assert scores.report.stall_share == pytest.approx(2.8 / 3.1)
    assert scores.qos < quality([record([0.0, 0.0, 0.2])]).qos


def test_failed_requests_are_not_scored_and_nothing_is_without_a_rate():
    assert quality([record([0.0]), record([9.0], error="timeout")]).report.num_requests == 1
    assert quality([record([0.0]), record([0.0], rate=None)]) is None
    assert quality([record([0.0], error="timeout")]) is None


def test_classes_of_readers_are_scored_apart():
    mixed = [record([0.0, 1.0], rate=16.0), record([0.0, 0.1], rate=8.0), record([0.0, 1.0], rate=16.0)]
    classes = quality_by_rate(mixed)
    assert list(classes) == ["8", "16"]
    assert [each.report.num_requests for each in classes.values()] == [1, 2]
    assert classes["8"].report.stall_s < 0.01 < classes["16"].report.stall_s
    assert quality_by_rate(mixed[:1]) == {}


def test_what_a_request_is_scored_at():
    assert [score_rate(rate, None) for rate in (7.5, "read", None)] == [7.5, 6.0, None]
    assert [score_rate(rate, 3.0) for rate in (7.5, "auto", None)] == [3.0, 3.0, 3.0]
    with pytest.raises(TfserveError, match="--score-rate"):
        score_rate("auto", None)
