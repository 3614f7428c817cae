"""tfserve: an LLM inference server for people who stream text to people.

`Engine`, `EngineConfig` and `SamplingParams` are the API for programs. They are imported on first use, torch when an
Engine is created.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tfserve.config import EngineConfig
    from tfserve.engine.engine import Engine
    from tfserve.types import SamplingParams

__all__ = ["Engine", "EngineConfig", "SamplingParams", "__version__"]
__version__ = "0.1.0"

_HOMES = {"Engine": "tfserve.engine.engine", "EngineConfig": "tfserve.config", "SamplingParams": "tfserve.types"}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
