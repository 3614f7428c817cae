"""Scheduling policies by their name in the settings. Every module of this package is imported, and registers."""

from __future__ import annotations

import importlib
import pkgutil

from tfserve.config import SchedulerConfig
from tfserve.engine.scheduling.policies.registry import POLICIES, uses_host
from tfserve.engine.scheduling.policy import Policy

__all__ = ["POLICIES", "make_policy", "uses_host"]

for _module in pkgutil.walk_packages(__path__, f"{__name__}."):
    importlib.import_module(_module.name)


def make_policy(config: SchedulerConfig) -> Policy:
    """The policy that `scheduler.policy` names."""
    return POLICIES[config.policy].make(config)
