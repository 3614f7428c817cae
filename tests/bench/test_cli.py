from __future__ import annotations

import argparse
import asyncio
import json
import re
import sys

import pytest

from tests.bench.fake_server import DONE, ROLE, FakeServer, finish, serving, text, usage
from tests.bench.test_client import closed_port_url
from tfserve.bench.cli import add_bench_parser
from tfserve.errors import TfserveError
from tfserve.install_hint import install_command


def run_bench(*args: object) -> int:
    parser = argparse.ArgumentParser()
    add_bench_parser(parser.add_subparsers())
    parsed = parser.parse_args(["bench", *map(str, args)])
    return parsed.func(parsed)


def run(*args: object) -> int:
    return run_bench("serve", *args)


async def run_against(server: FakeServer, *args: object) -> int:
    async with serving(server):
        return await asyncio.to_thread(run, "--base-url", server.url, *args)


@pytest.fixture
def dataset(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "one"}\n{"prompt": "two"}\n')
    return path


async def test_burst_sends_everything_before_anything_is_answered(dataset, tmp_path):
    server = FakeServer([0.5, ROLE, text("a"), finish(), usage(3, 1), DONE])
    out = tmp_path / "r.json"
    assert (
        await run_against(
            server, "--dataset", dataset, "--num-prompts", 150, "--request-rate", "burst", "--output", out
        )
        == 0
    )
    assert len(server.arrivals) == 150
    assert max(server.arrivals) - min(server.arrivals) < 0.5
    requests = json.loads(out.read_text())["requests"]
    assert max(r["sent_s"] for r in requests) < min(r["chunks"][0][0] for r in requests)


async def test_timed_arrivals_are_kept_while_earlier_requests_are_still_running(dataset, tmp_path):
    server = FakeServer([0.4, text("a"), finish(), usage(3, 1), DONE])
    out = tmp_path / "r.json"
    await run_against(server, "--dataset", dataset, "--num-prompts", 8, "--request-rate", 10, "--output", out)
    result = json.loads(out.read_text())
    assert result["summary"]["send_lag"]["max"] < 0.3
    due = [r["arrival_s"] for r in result["requests"]]
    seen = [arrival - min(server.arrivals) for arrival in sorted(server.arrivals)]
    assert seen == pytest.approx(due, abs=0.3)
    assert due[-1] > 0.4


async def test_random_prompts_reach_the_asked_length_template_included():
    server = FakeServer([text("a"), finish()], template_tokens=30)
    assert await run_against(server, "--input-len", 100, "--num-prompts", 3) == 0
    lengths = [len(body["messages"][0]["content"].split()) for body in server.bodies]
    assert lengths[2:] == [70, 70, 70]
    assert server.bodies[-1]["model"] == "fake-model"


async def test_failures_show_in_table_and_exit_code(dataset, capsys):
    assert await run_against(FakeServer([], status=503), "--dataset", dataset, "--num-prompts", 2) == 1
    shown = capsys.readouterr()
    assert "0 completed, 2 failed, 2 http_503" in shown.out
    assert "no seat free" in shown.err


async def test_the_key_is_used_but_not_written_down(dataset, tmp_path):
    server = FakeServer([text("a"), finish(), DONE])
    out = tmp_path / "r.json"
    await run_against(server, "--dataset", dataset, "--num-prompts", 1, "--api-key", "secret-1", "--output", out)
    assert server.headers[0]["Authorization"] == "Bearer secret-1"
    assert "secret-1" not in out.read_text()
    assert json.loads(out.read_text())["config"]["request_rate"] == "inf"


def test_absent_server_is_a_clear_error():
    with pytest.raises(TfserveError, match="connection refused"):
        run("--base-url", closed_port_url())


def test_length_of_file_prompts_cannot_be_set(dataset):
    with pytest.raises(TfserveError, match="--input-len"):
        run("--base-url", closed_port_url(), "--dataset", dataset, "--input-len", 5)


def test_bad_rate_is_refused_by_name(capsys):
    with pytest.raises(SystemExit):
        run("--base-url", "http://x", "--request-rate", "soon")
    assert "--request-rate" in capsys.readouterr().err


async def test_rates_are_sent_scored_and_written_down(dataset, tmp_path, capsys):
    server = FakeServer([text("a"), 0.05, text("b"), finish(), usage(3, 2), DONE])
    out = tmp_path / "r.json"
    mix = ("--rate-mix", "5:0.25,20:0.75")
    assert await run_against(server, "--dataset", dataset, "--num-prompts", 8, *mix, "--output", out) == 0
    sent = sorted(body["consumption_rate"] for body in server.bodies)
    assert sent == [5.0] * 2 + [20.0] * 6
    result = json.loads(out.read_text())
    assert sorted(request["rate"] for request in result["requests"]) == sent
    assert result["summary"]["quality"]["report"]["num_tokens"] == 16
    assert list(result["summary"]["quality_by_rate"]) == ["5", "20"]
    assert "at 20/s" in capsys.readouterr().out


async def test_a_rate_may_be_scored_without_being_sent(dataset, tmp_path):
    server = FakeServer([text("a"), finish(), usage(3, 1), DONE])
    out = tmp_path / "r.json"
    assert await run_against(server, "--dataset", dataset, "--num-prompts", 1, "--score-rate", 4, "--output", out) == 0
    assert "consumption_rate" not in server.bodies[0]
    assert json.loads(out.read_text())["requests"][0]["rate"] == 4.0


async def test_without_a_rate_the_quality_is_not_available(dataset, capsys):
    await run_against(FakeServer([text("a"), finish(), DONE]), "--dataset", dataset, "--num-prompts", 1)
    rows = {line[:26].strip(): line[26:].split() for line in capsys.readouterr().out.splitlines()}
    for name in ("raw throughput, tok/s", "effective, tok/s", "stall share, %", "QoS *"):
        assert rows[name] == ["n/a"]
    assert rows["preemptions per request"] == ["n/a"] * 4


async def test_real_prompts_come_with_the_lengths_of_their_references():
    server = FakeServer([text("a"), finish(), DONE])
    await run_against(server, "--prompts", "prompts", "--num-prompts", 30, "--reference-len", "96:256")
    asked = {body["max_tokens"] for body in server.bodies}
    assert asked > {96, 256}
    assert min(asked) == 96
    assert max(asked) == 256


def test_bad_options_are_refused_by_name(capsys):
    bad = [("--rate", "burst"), ("--rate-mix", "8:0.4"), ("--reference-len", "9"), ("--score-rate", 0)]
    for option, value in (*bad, ("--score-rate", "inf"), ("--timeout", 0)):
        with pytest.raises(SystemExit):
            run("--base-url", "http://x", option, value)
        assert option in capsys.readouterr().err


async def test_pictures_of_a_run_are_drawn_into_a_directory(dataset, tmp_path):
    pytest.importorskip("matplotlib")
    server = FakeServer([text("a"), finish(), usage(3, 1), DONE])
    assert await run_against(server, "--dataset", dataset, "--num-prompts", 2, "--plots", tmp_path / "plots") == 0
    assert {path.name for path in (tmp_path / "plots").iterdir()} == {"ttft_cdf.png", "timelines.png"}


async def test_what_would_be_missed_at_the_end_is_missed_before_anything_is_sent(dataset, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    (tmp_path / "file").write_text("")
    server = FakeServer([text("a"), finish(), DONE])
    for option, value, message in (
        ("--plots", tmp_path, re.escape(install_command("bench"))),
        ("--output", tmp_path / "file" / "r.json", "--output: cannot write"),
        ("--output", tmp_path, "--output: cannot write"),
    ):
        with pytest.raises(TfserveError, match=message):
            await run_against(server, "--dataset", dataset, "--num-prompts", 1, option, value)
    assert not server.bodies
