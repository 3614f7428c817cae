"""`bench fit` and `bench replay` from the command line: a profile predicts the run that it was fitted to."""

from __future__ import annotations

import json
from pathlib import Path

import msgspec
import pytest

from tests.bench.test_cli import run_bench
from tests.engine.simulation.test_sim_hardware import HEAD, made_up, requests
from tfserve.config import SchedulerConfig
from tfserve.engine.core.step_trace import TraceLine, TraceRequest
from tfserve.engine.simulation.engine import SimEngine
from tfserve.engine.simulation.fitted import FittedProfile
from tfserve.errors import TfserveError


def write_trace(path: Path, *lines: TraceLine) -> Path:
    path.write_bytes(b"".join(msgspec.json.encode(line) + b"\n" for line in (HEAD, *lines)))
    return path


@pytest.fixture
def profile(tmp_path) -> Path:
    path = tmp_path / "profile.json"
    assert run_bench("fit", write_trace(tmp_path / "fitted.jsonl", *made_up(400).steps), "--out", path) == 0
    return path


def ended(arrival_s: float, first_token_s: float | None, finished_s: float, **figures: int) -> TraceRequest:
    return TraceRequest(
        arrival_s=arrival_s, first_token_s=first_token_s, finished_s=finished_s, rate=20.0, num_preemptions=0, **figures
    )


def test_a_run_that_was_itself_simulated_is_foretold_exactly(profile, tmp_path, capsys):
    asked = requests(12, 60, 40, gap_s=0.5)
    machine = msgspec.json.decode(profile.read_bytes(), type=FittedProfile).machine()
    run = SimEngine(machine, HEAD.scheduler, asked).run()
    lines = [
        ended(
            100.0 + request.arrival_s,
            100.0 + float(served.token_s[0]),
            100.0 + float(served.token_s[-1]),
            prompt_tokens=request.prompt_tokens,
            output_tokens=request.output_tokens,
            max_tokens=request.max_tokens,
        )
        for request, served in zip(asked, run.served, strict=True)
    ]
    trace = write_trace(tmp_path / "other.jsonl", *made_up(40).steps, *lines)
    assert run_bench("replay", trace, "--profile", profile, "--out", tmp_path / "out.json") == 0
    (found,) = json.loads((tmp_path / "out.json").read_text())
    assert found["simulated"] == pytest.approx(found["measured"])
    assert found["ttft_distance"] == pytest.approx(0.0, abs=1e-9)
    assert found["measured"]["ttft_mean_s"] > 0
    assert f"other.jsonl: {HEAD.scheduler.policy}, 12 requests" in capsys.readouterr().out


def test_a_run_that_took_longer_shows_as_much(profile, tmp_path):
    line = ended(0.0, 60.0, 61.0, prompt_tokens=30, output_tokens=10, max_tokens=10)
    trace = write_trace(tmp_path / "slow.jsonl", *made_up(40).steps, line)
    run_bench("replay", trace, "--profile", profile, "--out", tmp_path / "out.json")
    (found,) = json.loads((tmp_path / "out.json").read_text())
    assert found["measured"]["ttft_mean_s"] == 60.0
    assert found["simulated"]["ttft_mean_s"] < 1.0


def test_a_trace_without_answered_requests_is_refused(profile, tmp_path):
    unanswered = ended(0.0, None, 2.0, prompt_tokens=30, output_tokens=0, max_tokens=10)
    for lines in ([], [unanswered]):
        trace = write_trace(tmp_path / "silent.jsonl", *made_up(40).steps, *lines)
        with pytest.raises(TfserveError, match=r"silent\.jsonl has no answered requests"):
            run_bench("replay", trace, "--profile", profile)


def test_what_the_engine_of_the_trace_could_not_hold_is_refused(profile, tmp_path):
    line = ended(0.0, 1.0, 2.0, prompt_tokens=10_000, output_tokens=10, max_tokens=10)
    trace = write_trace(tmp_path / "long.jsonl", *made_up(40).steps, line)
    with pytest.raises(TfserveError, match=r"long\.jsonl has a request of 10010 tokens and KV for \d+"):
        run_bench("replay", trace, "--profile", profile)


def test_a_trace_without_steps_or_with_blocks_of_another_size_is_replayed(profile, tmp_path, capsys):
    line = ended(0.0, 0.0, 0.0, prompt_tokens=30, output_tokens=10, max_tokens=10)
    head = msgspec.structs.replace(HEAD, block_size=48, scheduler=SchedulerConfig(policy="tokenflow"))
    path = tmp_path / "bare.jsonl"
    path.write_bytes(msgspec.json.encode(head) + b"\n" + msgspec.json.encode(line) + b"\n")
    assert run_bench("replay", path, "--profile", profile) == 0
    shown = capsys.readouterr().out
    assert "bare.jsonl: tokenflow, 1 requests" in shown
    assert "its steps by the profile" not in shown


def test_what_is_no_profile_is_named(tmp_path):
    (tmp_path / "other.json").write_text("[]")
    trace = write_trace(tmp_path / "trace.jsonl", *made_up(40).steps)
    with pytest.raises(TfserveError, match=r"--profile: .*other\.json is no profile"):
        run_bench("replay", trace, "--profile", tmp_path / "other.json")
