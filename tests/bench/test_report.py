from __future__ import annotations

import json

import pytest

from tfserve.bench.client import RequestRecord
from tfserve.bench.report import summarize, table, write_result
from tfserve.errors import TfserveError


def record(index=0, sent=0.0, times=(), tokens=None, error=None) -> RequestRecord:
    return RequestRecord(
        index=index,
        arrival_s=sent - 0.5,
        sent_s=sent,
        end_s=(times[-1] if times else sent) + 0.1,
        chunks=[(t, 1) for t in times],
        output_tokens=tokens,
        error=error,
    )


def test_summary_of_known_times():
    runs = [record(0, 0.5, (1.5, 2.0, 3.0), tokens=3), record(1, 1.5, (2.0, 2.5), tokens=2)]
    summary = summarize(runs, wall_s=4.0, cpu_s=1.0)
    assert summary.duration_s == 3.0
    assert summary.output_tokens_per_s == pytest.approx(5 / 3)
    assert summary.requests_per_s == pytest.approx(2 / 3)
    assert (summary.ttft.mean, summary.ttft.p50, summary.ttft.max) == (0.75, 0.75, 1.0)
    assert summary.tbt.mean == pytest.approx(2 / 3)
    assert summary.tpot.mean == pytest.approx((0.75 + 0.5) / 2)
    assert summary.e2e.mean == pytest.approx((2.6 + 1.1) / 2)
    assert summary.send_lag.mean == 0.5
    assert summary.client_cpu_share == 0.25


def test_failures_are_counted_by_kind_and_kept_out_of_the_rates():
    runs = [record(0, 0.5, (1.0, 2.0)), record(1, 0.5, (1.0,), error="timeout"), record(2, 0.5, error="http_429")]
    summary = summarize(runs, wall_s=4.0, cpu_s=0.0)
    assert (summary.num_completed, summary.failures) == (1, {"timeout": 1, "http_429": 1})
    assert (summary.output_tokens, summary.failed_output_tokens) == (2, 1)
    assert "2 failed, 1 http_429, 1 timeout" in table(summary)


def test_what_was_not_measured_prints_as_such():
    text = table(summarize([record(error="connect")], wall_s=1.0, cpu_s=0.0))
    rows = {line[:26].strip(): line[26:].split() for line in text.splitlines()}
    for name in ("duration", "prompt tokens", "output throughput", "request throughput"):
        assert rows[name][0] == "n/a"
    assert rows["time to first token, ms"] == ["n/a"] * 4


def test_reading_without_a_visible_chunk_has_no_stall_share():
    blind = record(tokens=4)
    blind.rate = 5.0
    rows = {line[:26].strip(): line[26:].split() for line in table(summarize([blind], 1.0, 0.0)).splitlines()}
    assert rows["stall share, %"] == ["n/a"]


def test_how_tokens_were_counted_is_said():
    assert "counted by usage)" in table(summarize([record(times=(1.0,), tokens=4)], 1.0, 0.0))
    assert "counted by chunks)" in table(summarize([record(times=(1.0,))], 1.0, 0.0))
    assert "1 more chunks came" in table(summarize([record(times=(1.0, 2.0), tokens=1)], 1.0, 0.0))
    assert "75.0% of the tokens" in table(summarize([record(times=(1.0,), tokens=4)], 1.0, 0.0))


def test_result_file_holds_every_request(tmp_path):
    runs = [record(0, 0.5, (1.0, 2.0)), record(1, 0.5, error="timeout")]
    write_result(tmp_path / "deep" / "r.json", {"seed": 3}, summarize(runs, 1.0, 0.0), runs)
    result = json.loads((tmp_path / "deep" / "r.json").read_text())
    assert result["config"] == {"seed": 3}
    assert {"date", "platform", "tfserve"} <= result["environment"].keys()
    assert result["requests"][0]["chunks"] == [[1.0, 1], [2.0, 1]]
    assert result["requests"][1]["error"] == "timeout"


def test_unwritable_output_is_a_clear_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(TfserveError, match="--output"):
        write_result(tmp_path / "file" / "r.json", {}, summarize([record()], 1.0, 0.0), [])
