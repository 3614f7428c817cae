"""Where tfserve keeps what it can make again. Torch-free."""

from __future__ import annotations

import os
from pathlib import Path


def cache_dir() -> Path:
    """`$TFSERVE_CACHE`, or `tfserve` in the user's cache directory (`$XDG_CACHE_HOME`, `~/.cache`)."""
    if chosen := os.environ.get("TFSERVE_CACHE"):
        return Path(chosen).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "tfserve"
