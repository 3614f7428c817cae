"""The TokenFlow paper's experiments as data: workloads, machines, policies, and the paper's results."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from benchmarks.paper.cases import (
    BASELINE,
    BURST_A,
    CAPPED,
    H200,
    MAIN,
    PAIR,
    POISSON_D,
    POLICIES,
    RTX,
    SHORT,
    Case,
    Experiment,
    cases_of,
)
from benchmarks.paper.hardware import PROFILES
from benchmarks.paper.reviewer import reviewers_questions
from benchmarks.paper.workloads import Burst, Normal, Poisson, Sampled, Trace, Workload

_SHORT_H200, _LONG_H200 = Normal(512, 2048), Normal(1024, 4096)
_BURST_B = Workload(arrivals=Burst(80), lengths=Normal(1024, 2048))


def experiments(*, long_answers: bool = False) -> list[Experiment]:
    """All of them, in the order of the page.

    `long_answers` reads the paper's "short" on the RTX 4090 as 512 in and 2048 out, in the set-ups.
    """
    return [
        *_setups(Normal(512, 2048) if long_answers else SHORT),
        *_traces(),
        *_rates(),
        *_sensitivity(),
        _ablation(),
        *reviewers_questions(),
    ]


def _setups(short: Normal) -> list[Experiment]:
    """The eight set-ups: bursts and Poisson arrivals on both devices, all policies."""
    rows = [
        ("4090-a", "burst of 60, short", RTX, Workload(arrivals=Burst(60), lengths=short)),
        ("4090-b", "burst of 80, long", RTX, _BURST_B),
        ("4090-c", "Poisson 2/s, short", RTX, Workload(arrivals=Poisson(100, 2.0), lengths=short)),
        ("4090-d", "Poisson 4/s, short", RTX, Workload(arrivals=Poisson(100, 4.0), lengths=short)),
        ("h200-a", "burst of 400, short", H200, Workload(arrivals=Burst(400), lengths=_SHORT_H200)),
        ("h200-b", "burst of 200, long", H200, Workload(arrivals=Burst(200), lengths=_LONG_H200)),
        ("h200-c", "Poisson 5/s, short", H200, Workload(arrivals=Poisson(400, 5.0), lengths=_SHORT_H200)),
        ("h200-d", "Poisson 10/s, short", H200, Workload(arrivals=Poisson(400, 10.0), lengths=_SHORT_H200)),
    ]
    burst = "P99 TTFT down to -80.2 %, mean TTFT -48.4 %, effective up to +52.9 %, raw equal"
    poisson = "effective up to +82.5 % (4090), TTFT -53.7 % (H200)"
    return [
        Experiment(
            key=key,
            section="The eight set-ups",
            title=f"{profile.name}: {title}",
            claim=burst if isinstance(workload.arrivals, Burst) else poisson,
            cases=cases_of(profile, workload, {**POLICIES, **CAPPED}, 1),
            # A run on the H200 takes twenty seconds.
            seeds=3 if profile is H200 else 5,
            in_quick=key in {"4090-a", "4090-c"},
            plots=("ttft", "throughput", "queue", "timelines") if key in {"4090-b", "h200-a"} else ("ttft", "queue"),
        )
        for key, title, profile, workload in rows
    ]


def _traces() -> list[Experiment]:
    """Recorded arrivals; none of them are the paper's BurstGPT windows, which cannot be had."""
    replay = Trace("burstgpt_day1_compressed_20min.csv", speed=16.0)
    code = Trace("azure_code_20min.csv", window_s=240.0, own_lengths=False)
    conv = Trace("azure_conv_20min.csv", speed=0.9)
    rows = [
        (
            "trace-a6000",
            "BurstGPT day 1, 10 h compressed to 75 s (497 times as fast as life)",
            "mean TTFT -52.6 % on average, effective +45.1 % (A6000)",
            PROFILES["a6000-llama3-8b"],
            Workload(arrivals=replay, lengths=Sampled()),
            MAIN,
            1,
        ),
        (
            "trace-h200",
            "arrivals of Azure code (first 240 s, native speed) with short requests",
            "mean TTFT -52.6 % on average, effective +37.1 % (H200)",
            H200,
            Workload(arrivals=code, lengths=_SHORT_H200),
            MAIN,
            3,
        ),
        (
            "trace-32b",
            "Azure conversations, 20 min stretched to 22",
            "fewer queued, more running at the peaks (20 min of BurstGPT)",
            PROFILES["h200-qwen2.5-32b"],
            Workload(arrivals=conv, lengths=Sampled()),
            PAIR,
            1,
        ),
    ]
    return [
        Experiment(
            key=key,
            section="Recorded arrivals",
            title=f"{profile.name}: {title}",
            claim=claim,
            cases=cases_of(profile, workload, contenders, 1),
            seeds=seeds,
            plots=("queue", "throughput"),
        )
        for key, title, claim, profile, workload, contenders, seeds in rows
    ]


def _rates() -> list[Experiment]:
    """Readers of several speeds."""
    mixed = msgspec.structs.replace(BURST_A, rates=((0.4, 15.0), (0.6, 20.0)))
    paper = {20: "+53.7 %", 25: "+48.7 %", 30: "+52.9 %"}
    return [
        Experiment(
            key="mixed",
            section="Readers' rates",
            title=f"{RTX.name}: burst of 60, short, 40 % read 15 and 60 % read 20 tokens/s",
            claim="each class holds its own rate",
            cases=cases_of(RTX, mixed, MAIN),
            in_quick=True,
            plots=("fans",),
        ),
        *(
            Experiment(
                key=f"rate-{rate}",
                section="Readers' rates",
                title=f"{RTX.name}: burst of 60, short, everybody reads {rate} tokens/s",
                claim=f"effective {gain}",
                cases=cases_of(RTX, msgspec.structs.replace(BURST_A, rates=((1.0, float(rate)),)), PAIR),
            )
            for rate, gain in paper.items()
        ),
    ]


def _sweep(key: str, title: str, claim: str, setting: str, values: Sequence[float]) -> Experiment:
    cases = [Case(name=BASELINE, profile=RTX, workload=POISSON_D, settings=POLICIES["fcfs"])]
    for value in values:
        settings = {**POLICIES["tokenflow"], setting: value}
        cases.append(Case(name=f"{value:g}", profile=RTX, workload=POISSON_D, settings=settings))
    return Experiment(key=key, section="Sensitivity", title=title, claim=claim, cases=cases, seeds=3)


def _sensitivity() -> list[Experiment]:
    where = f"{RTX.name}: Poisson 4/s, short"
    return [
        _sweep(
            "interval",
            f"{where}, schedule_interval_s",
            "0.5 / 1.0 / 1.5 s: shorter is slightly better",
            "schedule_interval_s",
            (0.25, 0.5, 1.0, 1.5),
        ),
        _sweep(
            "conservativeness",
            f"{where}, buffer_conservativeness",
            "1 / 20: 20 behaves like FCFS",
            "tokenflow.buffer_conservativeness",
            (1.0, 1.5, 5.0, 20.0),
        ),
        _sweep(
            "swap-gap", f"{where}, min_swap_gain_s", "not in the paper", "tokenflow.min_swap_gain_s", (0.5, 2.0, 8.0)
        ),
        _sweep("critical", f"{where}, low_buffer_s", "not in the paper", "tokenflow.low_buffer_s", (0.25, 1.0, 4.0)),
    ]


def _ablation() -> Experiment:
    parts = {
        "full": {},
        "no offload": {"ablation.offload": False},
        "no write-through": {"ablation.write_through": False},
        "no load-evict overlap": {"ablation.load_evict_overlap": False},
        "no priority in writes": {"ablation.priority_writes": False},
    }
    contenders = {name: {**POLICIES["tokenflow"], **off} for name, off in parts.items()}
    return Experiment(
        key="ablation",
        section="Ablation",
        title=f"{RTX.name}: burst of 80, long",
        claim="full 66.0 s; no offload 127.3; no write-through 82.8; no load-evict overlap 74.4 (of what is not said)",
        cases=cases_of(RTX, _BURST_B, {BASELINE: POLICIES["fcfs"], **contenders}),
        seeds=3,
        in_quick=True,
    )
