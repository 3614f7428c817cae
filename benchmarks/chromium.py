"""The system's Chromium, for the page's tests and pictures: which program it is, and how it is started."""

from __future__ import annotations

import shutil

NAMES = ("chromium", "chromium-browser", "google-chrome")

FLAGS = (
    "--no-sandbox",  # root may not start it otherwise
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    # No requests to the vendor.
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)

MISSING = f"no browser here: none of {', '.join(NAMES)} is installed (Debian: apt install chromium)"


def find_chromium() -> str | None:
    """The path of the first of NAMES that is installed."""
    return next((found for name in NAMES if (found := shutil.which(name))), None)
