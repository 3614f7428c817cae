"""The experiments of tokenflow.md section 8 as data: what runs on what, beside what the paper says."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from tfserve.bench.paper.workloads import Burst, Normal, Poisson, Sampled, Trace, Workload
from tfserve.engine.sim.hardware import PROFILES, Profile, capacity

BASELINE = "fcfs"
"""The case that ratios are taken against, where an experiment has it."""

_CAP_S = 5.0
"""generate_ahead_s of the capped cases: the tenth of a short answer at 20 tokens/s, where weights start to fall."""


class Case(msgspec.Struct, frozen=True, kw_only=True):
    """One line of an experiment: `settings` are of SchedulerConfig.

    `host_s` is charged for CPU work before each launch, and `host_row_s` for each request in it, beside the profile's
    own overhead; `baseline` names the case that it is compared with. `seeds`, where set, is fewer than the others get.
    """

    name: str
    profile: Profile
    workload: Workload
    settings: Mapping[str, Any]
    baseline: str | None = BASELINE
    host_s: float = 0.0
    host_row_s: float = 0.0
    seeds: int | None = None


class Experiment(msgspec.Struct, frozen=True, kw_only=True):
    """Cases to be seen side by side. `section` groups experiments on the page; `claim` is the paper's result.

    `seeds` is how many runs each case gets, `in_quick` whether `--quick` runs it. `plots` of PLOTS are drawn of seed 0.
    """

    key: str
    section: str
    title: str
    claim: str
    cases: Sequence[Case]
    seeds: int = 5
    in_quick: bool = False
    plots: Sequence[str] = ()


PLOTS = ("ttft", "throughput", "queue", "timelines", "fans")

Settings = Mapping[str, Any]

POLICIES: Mapping[str, Settings] = {
    "fcfs": {"policy": "fcfs"},
    "fcfs-chunked": {"policy": "fcfs-chunked"},
    "fcfs-reserve": {"policy": "fcfs-reserve"},
    "fcfs-greedy": {"policy": "fcfs-greedy"},
    "round-robin": {"policy": "round-robin"},
    "earliest-underflow": {"policy": "earliest-underflow"},
    "andes": {"policy": "andes"},
    "andes-offload": {"policy": "andes-offload"},
    "tokenflow": {"policy": "tokenflow", "overload": "queue"},
    "tokenflow (share)": {"policy": "tokenflow", "overload": "share"},
}
"""Every policy of section 7, and tokenflow in both ways of meeting more demand than there is capacity."""

_CAPPED: Mapping[str, Settings] = {
    "fcfs, capped": {"policy": "fcfs", "generate_ahead_s": _CAP_S},
    "tokenflow, capped": {"policy": "tokenflow", "generate_ahead_s": _CAP_S},
}
_MAIN: Mapping[str, Settings] = {name: POLICIES[name] for name in ("fcfs", "fcfs-chunked", "andes", "tokenflow")}
_PAIR: Mapping[str, Settings] = {name: POLICIES[name] for name in ("fcfs", "tokenflow")}

_RTX, _H200 = PROFILES["4090-llama3-8b"], PROFILES["h200-llama3-8b"]
_SHORT, _LONG = Normal(512, 1024), Normal(1024, 2048)
_SHORT_H200, _LONG_H200 = Normal(512, 2048), Normal(1024, 4096)
_BURST_A = Workload(arrivals=Burst(60), lengths=_SHORT)
_BURST_B = Workload(arrivals=Burst(80), lengths=_LONG)
_POISSON_C = Workload(arrivals=Poisson(100, 2.0), lengths=_SHORT)


def _cases(
    profile: Profile, workload: Workload, contenders: Mapping[str, Settings], seeds_of_others: int | None = None
) -> list[Case]:
    """A case for each contender; those that no target is about get `seeds_of_others`."""
    return [
        Case(
            name=name,
            profile=profile,
            workload=workload,
            settings=settings,
            seeds=None if name in _PAIR else seeds_of_others,
        )
        for name, settings in contenders.items()
    ]


def experiments(*, long_answers: bool = False) -> list[Experiment]:
    """All of them, in the order of the page.

    `long_answers` reads the paper's "short" on the RTX 4090 as 512 in and 2048 out, in the set-ups.
    """
    return [
        *_setups(Normal(512, 2048) if long_answers else _SHORT),
        *_traces(),
        *_rates(),
        *_sensitivity(),
        _ablation(),
        *_reviewer(),
    ]


def _setups(short: Normal) -> list[Experiment]:
    """The eight set-ups: bursts and Poisson arrivals on both devices, all policies."""
    rows = [
        ("4090-a", "burst of 60, short", _RTX, Workload(arrivals=Burst(60), lengths=short)),
        ("4090-b", "burst of 80, long", _RTX, _BURST_B),
        ("4090-c", "Poisson 2/s, short", _RTX, Workload(arrivals=Poisson(100, 2.0), lengths=short)),
        ("4090-d", "Poisson 4/s, short", _RTX, Workload(arrivals=Poisson(100, 4.0), lengths=short)),
        ("h200-a", "burst of 400, short", _H200, Workload(arrivals=Burst(400), lengths=_SHORT_H200)),
        ("h200-b", "burst of 200, long", _H200, Workload(arrivals=Burst(200), lengths=_LONG_H200)),
        ("h200-c", "Poisson 5/s, short", _H200, Workload(arrivals=Poisson(400, 5.0), lengths=_SHORT_H200)),
        ("h200-d", "Poisson 10/s, short", _H200, Workload(arrivals=Poisson(400, 10.0), lengths=_SHORT_H200)),
    ]
    burst = "P99 TTFT down to -80.2 %, mean TTFT -48.4 %, effective up to +52.9 %, raw equal"
    poisson = "effective up to +82.5 % (4090), TTFT -53.7 % (H200)"
    return [
        Experiment(
            key=key,
            section="The eight set-ups",
            title=f"{profile.name}: {title}",
            claim=burst if isinstance(workload.arrivals, Burst) else poisson,
            # A run on the H200 takes twenty seconds.
            cases=_cases(profile, workload, {**POLICIES, **_CAPPED}, 1 if profile is _H200 else 3),
            in_quick=key in {"4090-a", "4090-c"},
            plots=("ttft", "throughput", "queue", "timelines") if key in {"4090-b", "h200-a"} else ("ttft", "queue"),
        )
        for key, title, profile, workload in rows
    ]


def _traces() -> list[Experiment]:
    """Recorded arrivals; none of them are the paper's BurstGPT windows, which cannot be had."""
    replay = Trace("burstgpt_day1_compressed_20min.csv", speed=8.0)
    code = Trace("azure_code_20min.csv", window_s=240.0, own_lengths=False)
    conv = Trace("azure_conv_20min.csv", speed=0.6)
    rows = [
        (
            "trace-a6000",
            "BurstGPT day 1, 10 h compressed to 150 s (249 times as fast as life)",
            "mean TTFT -52.6 % on average, effective +45.1 % (A6000)",
            PROFILES["a6000-llama3-8b"],
            Workload(arrivals=replay, lengths=Sampled()),
            _MAIN,
            1,
        ),
        (
            "trace-h200",
            "arrivals of Azure code (first 240 s, native speed) with lengths of ShareGPT",
            "mean TTFT -52.6 % on average, effective +37.1 % (H200)",
            _H200,
            Workload(arrivals=code, lengths=Sampled()),
            _MAIN,
            5,
        ),
        (
            "trace-32b",
            "Azure conversations, 20 min stretched to 33",
            "fewer queued, more running at the peaks (20 min of BurstGPT)",
            PROFILES["h200-qwen2.5-32b"],
            Workload(arrivals=conv, lengths=Sampled()),
            _PAIR,
            1,
        ),
    ]
    return [
        Experiment(
            key=key,
            section="Recorded arrivals",
            title=f"{profile.name}: {title}",
            claim=claim,
            cases=_cases(profile, workload, contenders),
            seeds=seeds,
            plots=("queue", "throughput"),
        )
        for key, title, claim, profile, workload, contenders, seeds in rows
    ]


def _rates() -> list[Experiment]:
    """Readers of several speeds."""
    mixed = msgspec.structs.replace(_BURST_A, rates=((0.4, 15.0), (0.6, 20.0)))
    paper = {20: "+53.7 %", 25: "+48.7 %", 30: "+52.9 %"}
    return [
        Experiment(
            key="mixed",
            section="Readers' rates",
            title=f"{_RTX.name}: burst of 60, short, 40 % read 15 and 60 % read 20 tokens/s",
            claim="each class holds its own rate",
            cases=_cases(_RTX, mixed, _MAIN),
            in_quick=True,
            plots=("fans",),
        ),
        *(
            Experiment(
                key=f"rate-{rate}",
                section="Readers' rates",
                title=f"{_RTX.name}: burst of 60, short, everybody reads {rate} tokens/s",
                claim=f"effective {gain}",
                cases=_cases(_RTX, msgspec.structs.replace(_BURST_A, rates=((1.0, float(rate)),)), _PAIR),
            )
            for rate, gain in paper.items()
        ),
    ]


def _sweep(key: str, title: str, claim: str, setting: str, values: Sequence[float]) -> Experiment:
    cases = [Case(name=BASELINE, profile=_RTX, workload=_POISSON_C, settings=POLICIES["fcfs"])]
    for value in values:
        settings = {**POLICIES["tokenflow"], setting: value}
        cases.append(Case(name=f"{value:g}", profile=_RTX, workload=_POISSON_C, settings=settings))
    return Experiment(key=key, section="Sensitivity", title=title, claim=claim, cases=cases, seeds=3)


def _sensitivity() -> list[Experiment]:
    where = f"{_RTX.name}: Poisson 2/s, short"
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
            "buffer_conservativeness",
            (1.0, 1.5, 5.0, 20.0),
        ),
        _sweep("swap-gap", f"{where}, swap_gap_s", "not in the paper", "swap_gap_s", (0.5, 2.0, 8.0)),
        _sweep("critical", f"{where}, critical_s", "not in the paper", "critical_s", (0.25, 1.0, 4.0)),
    ]


def _ablation() -> Experiment:
    parts = {
        "full": {},
        "no offload": {"offload": False},
        "no write-through": {"write_through": False},
        "no load-evict overlap": {"load_evict_overlap": False},
        "no priority in writes": {"priority_writes": False},
    }
    contenders = {name: {**POLICIES["tokenflow"], **off} for name, off in parts.items()}
    return Experiment(
        key="ablation",
        section="Ablation",
        title=f"{_RTX.name}: burst of 80, long",
        claim="full 66.0 s; no offload 127.3; no write-through 82.8; no load-evict overlap 74.4 (of what is not said)",
        cases=_cases(_RTX, _BURST_B, {BASELINE: POLICIES["fcfs"], **contenders}),
        seeds=3,
        in_quick=True,
    )


def _reviewer() -> list[Experiment]:
    """What a systems reviewer would ask (end of section 8)."""
    return [_load_sweep(), _loose(), _wrong_rates(), _perturbed(), _host_time()]


def _against(variants: Mapping[str, tuple[Profile, Workload]], contenders: Mapping[str, Settings]) -> list[Case]:
    """Every contender on every variant, compared with fcfs on the same one."""
    return [
        Case(
            name=f"{variant}: {name}",
            profile=profile,
            workload=workload,
            settings=settings,
            baseline=f"{variant}: {BASELINE}",
        )
        for variant, (profile, workload) in variants.items()
        for name, settings in contenders.items()
    ]


def _load_sweep() -> Experiment:
    output = _SHORT.output
    top = capacity(_RTX, _SHORT.prompt, output)
    variants = {
        f"load {load:g}": (_RTX, Workload(arrivals=Poisson(150, load * top / output), lengths=_SHORT))
        for load in (0.5, 0.75, 0.9, 1.0, 1.25, 1.5, 2.0)
    }
    contenders = {**_MAIN, "tokenflow (share)": POLICIES["tokenflow (share)"]}
    return Experiment(
        key="load",
        section="A reviewer's questions",
        title=f"{_RTX.name}: 150 Poisson arrivals, short, at shares of the capacity ({top:.0f} tokens/s)",
        claim="not in the paper",
        cases=_against(variants, contenders),
        seeds=3,
    )


def _loose() -> Experiment:
    variants = {
        f"max_tokens x{looseness:g}": (_RTX, msgspec.structs.replace(_BURST_A, looseness=looseness))
        for looseness in (1.0, 2.0, 4.0)
    }
    return Experiment(
        key="loose",
        section="A reviewer's questions",
        title=f"{_RTX.name}: burst of 60, short, answers end by themselves before max_tokens",
        claim="not in the paper",
        cases=_against(variants, _MAIN),
        seeds=3,
    )


def _wrong_rates() -> Experiment:
    mixed = msgspec.structs.replace(_BURST_A, rates=((0.3, 10.0), (0.4, 20.0), (0.3, 30.0)))
    variants = {
        "true rates": (_RTX, mixed),
        "all told the mean": (_RTX, msgspec.structs.replace(mixed, told="blunt")),
        "each off by up to 2x": (_RTX, msgspec.structs.replace(mixed, told="wrong")),
    }
    return Experiment(
        key="wrong-rates",
        section="A reviewer's questions",
        title=f"{_RTX.name}: burst of 60, short, readers of 10, 20 and 30 tokens/s, what the server is told of them",
        claim="not in the paper",
        cases=_against(variants, _PAIR),
    )


def _perturbed() -> Experiment:
    def with_gpu(**factors: float) -> Profile:
        gpu = _RTX.gpu
        values = {name: getattr(gpu, name) * factor for name, factor in factors.items()}
        return msgspec.structs.replace(_RTX, gpu=msgspec.structs.replace(gpu, **values))

    variants = {"as assumed": _RTX}
    for label, field in (("compute", "flops"), ("memory speed", "memory_bytes_per_s"), ("link", "link_bytes_per_s")):
        for sign, factor in (("-", 0.8), ("+", 1.2)):
            variants[f"{label} {sign}20 %"] = with_gpu(**{field: factor})
    variants["blocks of 256 tokens"] = msgspec.structs.replace(_RTX, block_size=256)
    workload = msgspec.structs.replace(_BURST_A, arrivals=Burst(80))
    return Experiment(
        key="perturbed",
        section="A reviewer's questions",
        title=f"{_RTX.name}: burst of 80, short, with the profile's numbers off",
        claim="not in the paper",
        cases=_against({name: (profile, workload) for name, profile in variants.items()}, _PAIR),
        seeds=3,
    )


def _host_time() -> Experiment:
    cases = [
        Case(
            name=f"{label}: {name}",
            profile=_RTX,
            workload=_BURST_A,
            settings=settings,
            baseline=f"{label}: {BASELINE}",
            host_s=step_s,
            host_row_s=row_s,
        )
        for label, step_s, row_s in (("+0 ms", 0.0, 0.0), ("+1 ms", 0.5e-3, 10e-6), ("+5 ms", 2.5e-3, 50e-6))
        for name, settings in _PAIR.items()
    ]
    return Experiment(
        key="host-time",
        section="A reviewer's questions",
        title=f"{_RTX.name}: burst of 60, short, with more CPU time charged to each step (at 50 requests)",
        claim="scheduler overhead 0.07 -> 0.4 ms",
        cases=cases,
    )
