"""Where tfserve keeps what it can make again. Torch-free."""

from __future__ import annotations

import os
from pathlib import Path

from tfserve.errors import ModelError


def cache_dir() -> Path:
    """`$TFSERVE_CACHE`, or `tfserve` in the user's cache directory (`$XDG_CACHE_HOME`, `~/.cache`).

    Raises ModelError for a user without a home directory, as containers have, where no variable names one.
    """
    try:
        if chosen := os.environ.get("TFSERVE_CACHE"):
            return Path(chosen).expanduser()
        return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "tfserve"
    except RuntimeError:
        raise ModelError("this user has no home directory; set TFSERVE_CACHE to a directory for its files") from None
