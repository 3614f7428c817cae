"""The registry of scheduling policies: a class registers itself under its name in the settings. Torch-free."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, TypeVar

from tfserve.config import SchedulerConfig
from tfserve.engine.scheduling.policy import Policy

MakePolicy = TypeVar("MakePolicy", bound=Callable[[SchedulerConfig], Policy])

RATES = ("consumption_rate", "reports of what was read")


class Entry(NamedTuple):
    """`pauses`: KV of preempted requests is kept on the host. `ignores`: what the policy does not read of a request."""

    make: Callable[[SchedulerConfig], Policy]
    pauses: bool
    ignores: tuple[str, ...]


POLICIES: dict[str, Entry] = {}
"""By name; whole once the package of policies is imported."""


def uses_host(config: SchedulerConfig) -> bool:
    """True if the policy keeps the KV of preempted requests on the host, and may."""
    return config.ablation.offload and POLICIES[config.policy].pauses


def register(
    name: str, *, pauses: bool = False, ignores: tuple[str, ...] = (*RATES, "priority")
) -> Callable[[MakePolicy], MakePolicy]:
    """Put the policy class below this line into the registry. ValueError for a name that is taken."""

    def add(make: MakePolicy) -> MakePolicy:
        if name in POLICIES:
            raise ValueError(f"there are two policies of the name {name}")
        POLICIES[name] = Entry(make, pauses, ignores)
        return make

    return add
