"""Settings of the scheduler by the last part of their names, whichever section they are in."""

from __future__ import annotations

from typing import Any

from tfserve.config import SETTINGS, SchedulerConfig, config_from

_NAMES = {name.rpartition(".")[2]: name for name in SETTINGS if name.startswith("scheduler.")}


def scheduler_config(**settings: Any) -> SchedulerConfig:
    return config_from({"model": "m", **{_NAMES[name]: value for name, value in settings.items()}}).scheduler
