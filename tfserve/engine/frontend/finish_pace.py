"""How fast running requests finish: predicts the wait in the queue. Torch-free."""

from __future__ import annotations

_WEIGHT = 0.1
"""Weight of the newest interval in the average."""


class FinishPace:
    """A moving average of the time between two finishes, while there is work. Times in seconds of one clock."""

    def __init__(self, now_s: float) -> None:
        self._interval_s = 1.0
        self._last_s = now_s

    def on_work(self, now_s: float) -> None:
        """Work begins: the idle time before it is no interval."""
        self._last_s = now_s

    def on_finish(self, now_s: float) -> None:
        """A request has ended."""
        self._interval_s += _WEIGHT * (now_s - self._last_s - self._interval_s)
        self._last_s = now_s

    def wait_s(self, num_finishes: int) -> float:
        """Time until so many requests have finished; at least a second."""
        return max(1.0, self._interval_s * num_finishes)
