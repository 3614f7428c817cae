"""RealClock: the clock of a live engine."""

from __future__ import annotations

import threading
import time


class RealClock:
    """plan.Clock on the machine's monotonic clock, which all its processes share."""

    def __init__(self) -> None:
        # Reentrant, unlike an Event's lock: the interpreter may finalize an Engine inside `notify`, and that calls
        # `notify`.
        self._bell = threading.Condition()
        self._has_rung = False

    def now(self) -> float:
        """Seconds of CLOCK_MONOTONIC."""
        return time.monotonic()

    def wait(self, until: float | None) -> None:
        """Sleep until `until` (None: no limit) or until notified; a notification before the call counts."""
        timeout = None if until is None else max(0.0, until - self.now())
        with self._bell:
            if not self._has_rung:
                self._bell.wait(timeout)
            self._has_rung = False

    def notify(self) -> None:
        """Wake the sleeper, now or at its next `wait`."""
        with self._bell:
            self._has_rung = True
            self._bell.notify()
