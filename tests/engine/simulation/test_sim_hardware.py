"""Simulated hardware: rooflines by hand, whole engines in virtual time, and machines fitted to traces."""

from __future__ import annotations

import itertools

import msgspec
import numpy as np
import pytest

from benchmarks.paper.hardware import PROFILES, Roofline, capacity
from tfserve.config import EngineConfig, SchedulerConfig
from tfserve.engine.core.calibration import calibrate
from tfserve.engine.core.step_trace import CopyTotals, Trace, TraceHead, TraceStep
from tfserve.engine.scheduling.cost_model import CostModel, StepCoefficients
from tfserve.engine.scheduling.qos import score
from tfserve.engine.simulation.clock import SimClock
from tfserve.engine.simulation.engine import SimEngine, SimMachine, SimRequest
from tfserve.engine.simulation.fitted import FitError, FittedProfile, MeasuredCost, fit
from tfserve.engine.simulation.runner import SimRunner
from tfserve.engine.simulation.transfers import SimLinks
from tfserve.errors import TfserveError

RTX = PROFILES["4090-llama3-8b"]
LLAMA3_8B = RTX.model
QWEN25_32B = PROFILES["h200-qwen2.5-32b"].model


def requests(count: int, prompt: int, output: int, gap_s: float = 0.0, looseness: int = 1) -> list[SimRequest]:
    return [
        SimRequest(
            arrival_s=gap_s * i,
            prompt_tokens=prompt + i % 7,
            output_tokens=output + i % 5,
            max_tokens=looseness * (output + i % 5),
            rate=20.0,
            told_rate=20.0,
        )
        for i in range(count)
    ]


def test_sizes_are_those_of_the_models():
    assert LLAMA3_8B.weight_bytes == pytest.approx(16.06e9, rel=1e-3)
    assert LLAMA3_8B.kv_bytes_per_token == 128 * 1024
    assert QWEN25_32B.weight_bytes == pytest.approx(65.5e9, rel=1e-2)
    assert QWEN25_32B.kv_bytes_per_token == 256 * 1024


def test_decoding_is_bound_by_memory_and_long_prompts_by_compute():
    gpu, cost = RTX.gpu, Roofline(RTX.gpu, LLAMA3_8B)
    moved = LLAMA3_8B.weight_bytes - 2 * LLAMA3_8B.head_parameters + 8001 * 131072
    bytes_s = moved / (gpu.memory_bytes_per_s * gpu.memory_share)
    assert cost(1, 8000, 0, 0) == pytest.approx(bytes_s + gpu.step_s + gpu.row_s)
    flops = 2048 * 2 * LLAMA3_8B.linear_parameters
    assert cost(0, 0, 2048, 0) == pytest.approx(flops / (gpu.flops * gpu.compute_share) + gpu.step_s)


@pytest.mark.parametrize("policy", ["fcfs", "fcfs-greedy", "andes", "tokenflow"])
def test_every_request_gets_all_its_tokens_in_order_of_time(policy):
    small = msgspec.structs.replace(RTX.machine(), kv_tokens=1600, max_num_seqs=16)
    asked = requests(24, 60, 80)
    run = SimEngine(small, SchedulerConfig(policy=policy), asked).run()
    assert [len(served.token_s) for served in run.served] == [request.output_tokens for request in asked]
    assert all((np.diff(served.token_s) > 0).all() for served in run.served)
    assert run.num_refused == 0
    assert run.moments[-1].num_running == 0


@pytest.mark.parametrize("overload", ["queue", "share"])
def test_a_long_answer_goes_on_among_short_ones_without_end_where_all_must_be_recomputed(overload):
    rng = np.random.default_rng(1)
    asked = [SimRequest(arrival_s=1.0, prompt_tokens=900, output_tokens=900, max_tokens=900, rate=5.0, told_rate=5.0)]
    short = SimRequest(arrival_s=0.0, prompt_tokens=100, output_tokens=100, max_tokens=100, rate=20.0, told_rate=20.0)
    for arrival_s in np.cumsum(rng.exponential(0.2, 700)).tolist():
        asked.append(msgspec.structs.replace(short, arrival_s=arrival_s))
    machine = SimMachine(
        step_s=lambda n_decode, _, n_prefill, __: 0.01 + 0.001 * n_decode + 0.0001 * n_prefill,
        links=SimLinks(store_bytes_per_s=1e9, load_bytes_per_s=1e9),
        kv_bytes_per_token=10_000,
        kv_tokens=2048,
        host_kv_tokens=0,
        max_num_seqs=32,
        max_num_batched_tokens=256,
        block_size=32,
    )
    run = SimEngine(machine, SchedulerConfig(policy="tokenflow", overload=overload), asked).run()
    times = run.served[0].token_s
    # It takes nearly the whole device, which the short ones would fill for 140 seconds.
    assert np.diff(times).max() < 100.0


def test_answers_end_by_themselves_before_max_tokens():
    asked = requests(5, 60, 30, looseness=4)
    run = SimEngine(RTX.machine(), SchedulerConfig(policy="tokenflow"), asked).run()
    assert [len(served.token_s) for served in run.served] == [request.output_tokens for request in asked]


def test_the_baseline_is_as_fast_as_the_roofline_predicts():
    machine = RTX.machine()
    asked = [
        SimRequest(arrival_s=0, prompt_tokens=128, output_tokens=200, max_tokens=200, rate=20.0, told_rate=20.0)
    ] * 32
    predicted_s = 2 * machine.step_s(0, 0, 2048, 2048 * 64)
    predicted_s += sum(machine.step_s(32, 32 * (128 + k), 0, 0) for k in range(1, 200))
    report = score(SimEngine(machine, SchedulerConfig(policy="fcfs"), asked).run().served)
    assert report.duration_s == pytest.approx(predicted_s, rel=0.01)


def test_capacity_grows_with_memory_and_falls_with_length():
    larger = msgspec.structs.replace(RTX, memory_fraction=0.95)
    assert capacity(larger, 512, 1024) > capacity(RTX, 512, 1024) > capacity(RTX, 1024, 2048)


@pytest.mark.parametrize("kv_tokens", [100_000, 4_000])
def test_a_batch_without_readers_runs_as_it_does_in_order_of_arrival(kv_tokens):
    machine = msgspec.structs.replace(RTX.machine(), kv_tokens=kv_tokens, max_num_seqs=16)
    asked = [
        msgspec.structs.replace(
            one, rate=float("nan"), told_rate=None, output_tokens=100 + 40 * (i % 9), max_tokens=500
        )
        for i, one in enumerate(requests(120, 60, 80))
    ]
    runs = {
        policy: SimEngine(machine, SchedulerConfig(policy=policy), asked).run()
        for policy in ("fcfs-chunked", "tokenflow")
    }
    ends = {policy: max(served.token_s[-1] for served in run.served) for policy, run in runs.items()}
    assert ends["tokenflow"] <= 1.02 * ends["fcfs-chunked"]
    assert runs["tokenflow"].num_preemptions <= len(asked) / 2


def test_charged_cpu_time_slows_every_step():
    asked = requests(4, 60, 50)
    run = [SimEngine(RTX.machine(host), SchedulerConfig(), asked).run() for host in (None, lambda plan: 0.010)]
    ends = [max(served.token_s[-1] for served in one.served) for one in run]
    assert ends[1] - ends[0] == pytest.approx(0.010 * run[0].num_steps, rel=0.05)


TRUE = StepCoefficients(step=20e-3, decode=3e-3, decode_ctx=2e-6, prefill=1e-3, prefill_ctx=1e-7)
HEAD = TraceHead(
    model="made up",
    device="cpu",
    scheduler=SchedulerConfig(),
    max_num_seqs=8,
    max_num_batched_tokens=256,
    block_size=32,
    num_blocks=101,
    num_host_blocks=0,
    kv_bytes_per_token=1000,
)


def made_up(num_steps: int, concave: float = 0.0, cost: StepCoefficients = TRUE) -> Trace:
    """Steps by `cost`, 1 ms + 0.1 ms a row between them, and a nap now and then.

    `concave`: faster per token if large.
    """
    rng = np.random.default_rng(0)
    steps, now_s = [], 0.0
    for number in range(num_steps):
        n, prompt = int(rng.integers(1, 9)), int(rng.choice([0, 0, 64, 200]))
        work = (n, 100.0 * n + number, prompt, prompt * prompt / 2)
        seconds = MeasuredCost(cost)(*work) * (n + prompt) ** -concave * (1 + 0.02 * rng.normal())
        now_s += 1e-3 + 1e-4 * n + seconds + (5.0 if number % 40 == 20 else 0.0)
        steps.append(
            TraceStep(
                step=number,
                end_s=now_s,
                seconds=seconds,
                n_decode=n,
                decode_ctx=work[1],
                n_prefill=prompt,
                prefill_ctx=work[3],
                num_waiting=0,
                num_running=n,
                num_paused=0,
                stored=CopyTotals(1_000_000 * number, 1e-3 * number),
            )
        )
    return Trace(HEAD, steps, [])


def test_a_fit_finds_the_law_and_says_how_far_off_it_is():
    profile = fit(made_up(400))
    cost = MeasuredCost(profile.step, profile.sizes)
    for work in [(1, 300, 0, 0), (8, 1200, 0, 0), (4, 500, 200, 20_000)]:
        assert cost(*work) == pytest.approx(MeasuredCost(TRUE)(*work), rel=0.05)
    assert profile.host_s == pytest.approx(1e-3, rel=0.2)
    assert profile.host_row_s == pytest.approx(1e-4, rel=0.2)
    assert profile.store_bytes_per_s == pytest.approx(1e9)
    assert 0.005 < profile.error.median < 0.03
    assert abs(profile.error.total) < 0.02


def test_a_machine_that_is_faster_per_token_in_large_steps_is_fitted_too():
    profile = fit(made_up(400, concave=0.15))
    machine, plain = MeasuredCost(profile.step, profile.sizes), MeasuredCost(profile.step)
    misses = {True: 0.0, False: 0.0}
    for work in [(1, 300, 0, 0), (8, 1200, 0, 0), (4, 500, 64, 2048), (4, 500, 200, 20_000)]:
        truth = MeasuredCost(TRUE)(*work) * (work[0] + work[2]) ** -0.15
        assert machine(*work) == pytest.approx(truth, rel=0.06)
        misses[True] += abs(machine(*work) / truth - 1)
        misses[False] += abs(plain(*work) / truth - 1)
    assert misses[True] < misses[False]


def test_what_a_step_takes_for_having_prompts_at_all_is_told_from_their_price():
    dear = msgspec.structs.replace(TRUE, prompts=0.1)
    profile = fit(made_up(400, cost=dear))
    assert profile.step.prompts == pytest.approx(0.1, rel=0.15)
    assert fit(made_up(400)).step.prompts < 0.01
    cost = CostModel(kv_bytes_per_token=1000, max_num_seqs=8)
    config = EngineConfig(model="made up", max_num_seqs=8, max_num_batched_tokens=256)
    clock = SimClock()
    runner = SimRunner(clock, MeasuredCost(dear), vocab_size=8)
    calibrate(cost, runner, clock, config, num_blocks=101, block_size=32, max_model_len=1000)
    assert cost.prompts_s == pytest.approx(0.1, rel=0.15)
    assert cost.prefill_s_per_token == pytest.approx(dear.prefill, rel=0.15)


def test_calibration_is_over_sooner_on_a_slow_machine_and_goes_by_its_time_alone(monkeypatch):
    def launched(step_s: float) -> int:
        clock = SimClock()
        runner = SimRunner(clock, lambda *work: step_s, vocab_size=8)
        launch, plans = runner.launch, []
        monkeypatch.setattr(runner, "launch", lambda plan: plans.append(plan) or launch(plan))
        cost = CostModel(kv_bytes_per_token=1000, max_num_seqs=8)
        config = EngineConfig(model="made up", max_num_seqs=8, max_num_batched_tokens=256)
        calibrate(cost, runner, clock, config, num_blocks=101, block_size=32, max_model_len=1000)
        return len(plans)

    quick, slow = launched(0.001), launched(1.0)
    assert slow < quick
    ticks = itertools.count()
    monkeypatch.setattr("time.monotonic", lambda: next(ticks))
    assert (launched(0.001), launched(1.0)) == (quick, slow)


def test_a_trace_that_is_too_short_to_fit_is_refused():
    with pytest.raises(TfserveError, match="too short"):
        fit(made_up(20))


def test_a_fitted_profile_survives_json():
    profile = fit(made_up(100))
    again = msgspec.json.decode(msgspec.json.encode(profile), type=FittedProfile)
    assert again == profile
    assert isinstance(again.error, FitError)
    assert again.machine().kv_tokens == 3200
