"""Server-side pacing: text goes out as fast as its reader reads, not in the bursts that a shared device makes of it."""

from __future__ import annotations

import math
from collections.abc import Sequence

from msgspec import UnsetType

from tfserve.engine.frontend.stream import RequestStream
from tfserve.engine.scheduling.token_buffer import AUTO
from tfserve.types import ConsumptionRate


class Pacer:
    """When one stream's tokens may go out: the first at once, each further one 1/rate after the one before.

    After a pause nothing is caught up: what comes then is spaced like the rest. Times in seconds of one clock; a NaN
    rate (no reader) paces nothing.
    """

    def __init__(self, rate: float) -> None:
        self._rate = rate
        self._next_s = -math.inf
        self._has_kept = False

    def allowed(self, num_waiting: int, now_s: float) -> int | None:
        """How many of the waiting tokens may go out now, None for all; the caller sends that many."""
        if math.isnan(self._rate) or not num_waiting:
            return None
        if not self._has_kept and now_s > self._next_s:
            # The tokens have just come: there is no lateness to make up for.
            self._next_s = now_s
        if now_s < self._next_s:
            self._has_kept = True
            return 0
        due = min(num_waiting, 1 + int((now_s - self._next_s) * self._rate))
        self._next_s += due / self._rate
        self._has_kept = due < num_waiting
        return due if self._has_kept else None

    @property
    def wake_s(self) -> float | None:
        """When the next token that was kept back is due; None if none was."""
        return self._next_s if self._has_kept else None


def pacers_for(streams: Sequence[RequestStream], rate: ConsumptionRate | UnsetType) -> list[Pacer] | None:
    """A pacer for each stream of an answer whose client sent this `rate`; None: the answer is not paced.

    "auto" is not: pacing at the default rate would keep the reader, and so the reported rate, at that rate.
    """
    return None if rate == AUTO else [Pacer(stream.rate) for stream in streams]
