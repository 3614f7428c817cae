"""Scheduling policies by their name in the settings."""

from __future__ import annotations

from collections.abc import Callable

from tfserve.config import SchedulerConfig
from tfserve.engine.scheduling.policies.baselines.andes import Andes, AndesOffload
from tfserve.engine.scheduling.policies.baselines.controls import EarliestUnderflow, RoundRobin
from tfserve.engine.scheduling.policies.fcfs import Fcfs, FcfsChunked, FcfsGreedy, FcfsReserve
from tfserve.engine.scheduling.policies.tokenflow.policy import TokenFlow
from tfserve.engine.scheduling.policy import Policy

_POLICIES: dict[str, Callable[[SchedulerConfig], Policy]] = {
    "fcfs": Fcfs,
    "fcfs-chunked": FcfsChunked,
    "fcfs-reserve": FcfsReserve,
    "fcfs-greedy": FcfsGreedy,
    "round-robin": RoundRobin,
    "earliest-underflow": EarliestUnderflow,
    "andes": Andes,
    "andes-offload": AndesOffload,
    "tokenflow": TokenFlow,
}

OFFLOADING = frozenset({"round-robin", "earliest-underflow", "andes-offload", "tokenflow"})
"""Policies that pause requests; the others compute what they preempt again."""

_RATES = ("consumption_rate", "reports of what was read")

IGNORES: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(_POLICIES, (*_RATES, "priority")),
    **dict.fromkeys(("earliest-underflow", "andes", "andes-offload"), ("priority",)),
    "tokenflow": (),
}
"""What a request may say that a policy takes no notice of."""


def make_policy(config: SchedulerConfig) -> Policy:
    """The policy that `scheduler.policy` names."""
    return _POLICIES[config.policy](config)
