"""The parts of experiments: cases, the policies that they compare, and shared set-ups."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from benchmarks.paper.hardware import PROFILES, Profile
from benchmarks.paper.workloads import Burst, Normal, Poisson, Workload

BASELINE = "fcfs"
"""The case that ratios are taken against, where an experiment has it."""

_CAP_S = 5.0
"""generate_ahead_s of the capped cases: the tenth of a short answer at 20 tokens/s, where weights start to fall."""


class Case(msgspec.Struct, frozen=True, kw_only=True):
    """One line of an experiment: `settings` are the scheduler's, by their dotted names.

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
"""Every policy, and tokenflow in both ways of meeting more demand than there is capacity."""

CAPPED: Mapping[str, Settings] = {
    "fcfs, capped": {"policy": "fcfs", "generate_ahead_s": _CAP_S},
    "tokenflow, capped": {"policy": "tokenflow", "generate_ahead_s": _CAP_S},
}
MAIN: Mapping[str, Settings] = {name: POLICIES[name] for name in ("fcfs", "fcfs-chunked", "andes", "tokenflow")}
PAIR: Mapping[str, Settings] = {name: POLICIES[name] for name in ("fcfs", "tokenflow")}

RTX, H200 = PROFILES["4090-llama3-8b"], PROFILES["h200-llama3-8b"]
SHORT = Normal(512, 1024)
BURST_A = Workload(arrivals=Burst(60), lengths=SHORT)
POISSON_D = Workload(arrivals=Poisson(100, 4.0), lengths=SHORT)
"""Set-ups (a) and (d) of the RTX 4090, which most other experiments vary."""


def cases_of(
    profile: Profile, workload: Workload, contenders: Mapping[str, Settings], seeds_of_others: int | None = None
) -> list[Case]:
    """A case for each contender; contenders without a target get `seeds_of_others`."""
    return [
        Case(
            name=name,
            profile=profile,
            workload=workload,
            settings=settings,
            seeds=None if name in PAIR else seeds_of_others,
        )
        for name, settings in contenders.items()
    ]


def against(
    variants: Mapping[str, tuple[Profile, Workload]],
    contenders: Mapping[str, Settings],
    seeds_of_others: int | None = None,
) -> list[Case]:
    """Every contender on every variant, compared with fcfs on the same one; seeds as in `cases_of`."""
    return [
        msgspec.structs.replace(case, name=f"{variant}: {case.name}", baseline=f"{variant}: {BASELINE}")
        for variant, (profile, workload) in variants.items()
        for case in cases_of(profile, workload, contenders, seeds_of_others)
    ]
