"""The cache directory of tfserve. Torch-free."""

from __future__ import annotations

import os
from pathlib import Path

from tfserve.errors import ModelError


def cache_dir() -> Path:
    """`$TFSERVE_CACHE`, or `tfserve` in the user's cache directory (`$XDG_CACHE_HOME`, `~/.cache`).

    Raises ModelError if the user has no home directory, as in some containers, and no variable names a directory.
    """
    try:
        if chosen := os.environ.get("TFSERVE_CACHE"):
            return Path(chosen).expanduser()
        return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "tfserve"
    except RuntimeError:
        raise ModelError("this user has no home directory; set TFSERVE_CACHE to a directory for its files") from None
