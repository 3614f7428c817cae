"""SimClock: virtual time and its queue of events."""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable


class SimClock:
    """plan.Clock whose time jumps from event to event: arrivals, ends of steps and copies. For one thread.

    Events of the same moment happen in the order they were announced.
    """

    def __init__(self) -> None:
        self._now = 0.0
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._order = itertools.count()
        self._notified = False

    def now(self) -> float:
        """Virtual seconds since the start."""
        return self._now

    @property
    def next_event_s(self) -> float | None:
        """Time of the next event; None if there is none."""
        return self._events[0][0] if self._events else None

    def call_at(self, time_s: float, event: Callable[[], None]) -> None:
        """Schedule `event` for `time_s`, or for now if that has passed."""
        heapq.heappush(self._events, (max(time_s, self._now), next(self._order), event))

    def wait(self, until: float | None) -> None:
        """Go to the next event, or to `until` if that comes first; stay if notified since the last wait.

        Raises RuntimeError if no event can end the wait: the simulated engine is stuck, or has ended.
        """
        if not self._notified:
            moments = [time_s for time_s in (until, self.next_event_s) if time_s is not None]
            if not moments:
                raise RuntimeError("the simulation waits, but nothing is going to happen")
            self.advance_to(min(moments))
        self._notified = False

    def notify(self) -> None:
        """End the next wait at once."""
        self._notified = True

    def advance_to(self, time_s: float) -> None:
        """Run all events up to and at `time_s`, and move to it: a step ends, or CPU work is charged."""
        while self._events and self._events[0][0] <= time_s:
            self._now, _, event = heapq.heappop(self._events)
            event()
        self._now = max(self._now, time_s)
