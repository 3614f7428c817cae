"""Scheduling policies by their name in the settings."""

from __future__ import annotations

from tfserve.config import SchedulerConfig
from tfserve.engine.policies.fcfs import Fcfs, FcfsChunked
from tfserve.engine.policy import Policy

_POLICIES = {"fcfs": Fcfs, "fcfs-chunked": FcfsChunked}


def make_policy(config: SchedulerConfig) -> Policy:
    """The policy that `scheduler.policy` names."""
    return _POLICIES[config.policy](config)
