"""RealClock: the clock of a live engine."""

from __future__ import annotations

import threading
import time


class RealClock:
    """plan.Clock on the machine's monotonic clock, which all its processes share."""

    def __init__(self) -> None:
        self._bell = threading.Event()

    def now(self) -> float:
        """Seconds of CLOCK_MONOTONIC."""
        return time.monotonic()

    def wait(self, until: float | None) -> None:
        """Sleep until `until` (None: no limit) or until notified; a notification before the call counts."""
        timeout = None if until is None else max(0.0, until - self.now())
        self._bell.wait(timeout)
        self._bell.clear()

    def notify(self) -> None:
        """Wake the sleeper, now or at its next `wait`."""
        self._bell.set()
