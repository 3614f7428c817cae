from __future__ import annotations

import json

import pytest

from tests.bench.test_cli import run_bench
from tests.bench.test_scoring import record
from tfserve.bench.report import summarize, write_result
from tfserve.errors import TfserveError


def result(path, step_s=0.1, rate=10.0, **config):
    records = [record([1.0 + step_s * k for k in range(10)], rate=rate) for _ in range(3)]
    write_result(path, {"seed": 0, **config}, summarize(records, 2.0, 0.5), records)
    return path


def rows_of(text):
    return {line[:28].strip(): line[28:].split() for line in text.splitlines()}


def test_ratios_are_b_over_a(tmp_path, capsys):
    assert run_bench("compare", result(tmp_path / "a.json"), result(tmp_path / "b.json", step_s=0.2)) == 0
    rows = rows_of(capsys.readouterr().out)
    assert rows["time between chunks P50, s"] == ["0.100", "0.200", "2.000"]
    assert rows["TTFT mean, s"][2] == "1.000"
    assert rows["stalls, s"][2] == "n/a"
    assert rows["preemptions per request"] == ["n/a", "n/a", "n/a"]


def test_another_workload_and_other_rates_are_pointed_out(tmp_path, capsys):
    run_bench("compare", result(tmp_path / "a.json"), result(tmp_path / "b.json", rate=5.0, seed=1))
    shown = capsys.readouterr().out
    assert "not the same workload: seed 0 and 1" in shown
    assert "not scored at the same reading rates" in shown


def test_a_file_that_is_no_result_is_named(tmp_path):
    good = result(tmp_path / "a.json")
    (tmp_path / "text").write_text("{")
    (tmp_path / "bytes").write_bytes(b'{"config": {"a": "\xff"}}')
    (tmp_path / "deep").write_text('{"config": {"a": ' + "[" * 100_000)
    (tmp_path / "other.json").write_text(json.dumps({"cells": []}))
    (tmp_path / "list.json").write_text('{"config": [], "summary": 3}')
    for bad, message in (
        ("text", "no result.*not valid JSON"),
        ("bytes", "no result.*not valid UTF-8"),
        ("deep", "no result.*nested too deeply"),
        ("other.json", "no result.*config is required"),
        ("list.json", "no result.*config must be an object, got a list"),
        ("absent", "cannot read .*absent"),
    ):
        with pytest.raises(TfserveError, match=message):
            run_bench("compare", good, tmp_path / bad)
