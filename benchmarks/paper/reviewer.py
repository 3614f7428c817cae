"""Experiments that a systems reviewer would ask for."""

from __future__ import annotations

import msgspec

from benchmarks.paper.cases import BASELINE, BURST_A, MAIN, PAIR, POLICIES, RTX, SHORT, Case, Experiment, against
from benchmarks.paper.hardware import Profile, capacity
from benchmarks.paper.workloads import Burst, Poisson, Workload


def reviewers_questions() -> list[Experiment]:
    """All of them."""
    return [_load_sweep(), _loose(), _wrong_rates(), _perturbed(), _host_time()]


def _load_sweep() -> Experiment:
    output = SHORT.output
    top = capacity(RTX, SHORT.prompt, output)
    variants = {
        f"load {load:g}": (RTX, Workload(arrivals=Poisson(150, load * top / output), lengths=SHORT))
        for load in (0.5, 0.75, 0.9, 1.0, 1.25, 1.5, 2.0)
    }
    contenders = {**MAIN, "tokenflow (share)": POLICIES["tokenflow (share)"]}
    return Experiment(
        key="load",
        section="A reviewer's questions",
        title=f"{RTX.name}: 150 Poisson arrivals, short, at shares of the capacity ({top:.0f} tokens/s)",
        claim="not in the paper",
        cases=against(variants, contenders, 1),
        seeds=3,
    )


def _loose() -> Experiment:
    variants = {
        f"max_tokens x{looseness:g}": (RTX, msgspec.structs.replace(BURST_A, looseness=looseness))
        for looseness in (1.0, 2.0, 4.0)
    }
    return Experiment(
        key="loose",
        section="A reviewer's questions",
        title=f"{RTX.name}: burst of 60, short, answers end by themselves before max_tokens",
        claim="not in the paper",
        cases=against(variants, MAIN),
        seeds=3,
    )


def _wrong_rates() -> Experiment:
    mixed = msgspec.structs.replace(BURST_A, rates=((0.3, 10.0), (0.4, 20.0), (0.3, 30.0)))
    variants = {
        "true rates": (RTX, mixed),
        "all told the mean": (RTX, msgspec.structs.replace(mixed, told="blunt")),
        "each off by up to 2x": (RTX, msgspec.structs.replace(mixed, told="wrong")),
    }
    return Experiment(
        key="wrong-rates",
        section="A reviewer's questions",
        title=f"{RTX.name}: burst of 60, short, readers of 10, 20 and 30 tokens/s, what the server is told of them",
        claim="not in the paper",
        cases=against(variants, PAIR),
    )


def _perturbed() -> Experiment:
    def with_gpu(**factors: float) -> Profile:
        gpu = RTX.gpu
        values = {name: getattr(gpu, name) * factor for name, factor in factors.items()}
        return msgspec.structs.replace(RTX, gpu=msgspec.structs.replace(gpu, **values))

    variants = {"as assumed": RTX}
    for label, field in (("compute", "flops"), ("memory speed", "memory_bytes_per_s"), ("link", "link_bytes_per_s")):
        for sign, factor in (("-", 0.8), ("+", 1.2)):
            variants[f"{label} {sign}20 %"] = with_gpu(**{field: factor})
    variants["blocks of 256 tokens"] = msgspec.structs.replace(RTX, block_size=256)
    workload = msgspec.structs.replace(BURST_A, arrivals=Burst(80))
    return Experiment(
        key="perturbed",
        section="A reviewer's questions",
        title=f"{RTX.name}: burst of 80, short, with the profile's numbers off",
        claim="not in the paper",
        cases=against({name: (profile, workload) for name, profile in variants.items()}, PAIR),
        seeds=3,
    )


def _host_time() -> Experiment:
    cases = [
        Case(
            name=f"{label}: {name}",
            profile=RTX,
            workload=BURST_A,
            settings=settings,
            baseline=f"{label}: {BASELINE}",
            host_s=step_s,
            host_row_s=row_s,
        )
        for label, step_s, row_s in (("+0 ms", 0.0, 0.0), ("+1 ms", 0.5e-3, 10e-6), ("+5 ms", 2.5e-3, 50e-6))
        for name, settings in PAIR.items()
    ]
    return Experiment(
        key="host-time",
        section="A reviewer's questions",
        title=f"{RTX.name}: burst of 60, short, with more CPU time charged to each step (at 50 requests)",
        claim="scheduler overhead 0.07 -> 0.4 ms",
        cases=cases,
    )
