"""Log lines that clients can cause as often as they like, written only now and then."""

from __future__ import annotations

import logging
import time

INTERVAL_S = 10.0
"""How long such a line is not written again."""


class SeldomLog:
    """Warnings about one thing, at most one in INTERVAL_S; it says how many there were since the line before."""

    def __init__(self, log: logging.Logger) -> None:
        self._log = log
        self._due_s = float("-inf")
        self._num_silent = 0

    def warning(self, message: str, *args: object) -> None:
        """Log, or count what is not logged."""
        now_s = time.monotonic()
        if now_s < self._due_s:
            self._num_silent += 1
            return
        more = f" (and {self._num_silent} times before)" if self._num_silent else ""
        self._log.warning(message + more, *args)
        self._due_s, self._num_silent = now_s + INTERVAL_S, 0
