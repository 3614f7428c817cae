"""How much memory the bodies of all requests may take together, from their first byte until they are prompts."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Iterator

from tfserve.http.errors import ApiError, unavailable

UNCOUNTED_BYTES = 64 * 1024
"""Bytes of each body that are not counted: small requests are served whatever large ones take."""

STALLED_S = 2.0
"""A body that has received nothing for this long is ended when another one needs its memory."""

_RETRY_AFTER_S = 1.0


class BodyBudget:
    """Bytes that bodies may take beyond the first UNCOUNTED_BYTES of each.

    A body is counted as it comes, not by the length in its head: a client that sends nothing holds nothing.
    `on_refusal` is called for each request that is refused for lack of memory.
    """

    def __init__(self, max_bytes: int, on_refusal: Callable[[], None]) -> None:
        self.num_bytes = 0
        self._max_bytes = max_bytes
        self._on_refusal = on_refusal
        self._holds: dict[BodyHold, None] = {}  # with counted bytes; the hold that grew last is last

    @contextlib.contextmanager
    def hold(self) -> Iterator[BodyHold]:
        """A share for one body, given back on the way out."""
        hold = BodyHold(self)
        try:
            yield hold
        finally:
            self.give_back(hold)

    def resize(self, hold: BodyHold, num_bytes: int) -> None:
        """A body takes `num_bytes` from now on. Raises ApiError (503) if there is no room for that."""
        now_s = asyncio.get_running_loop().time()
        counted = min(max(0, num_bytes - UNCOUNTED_BYTES), self._max_bytes)  # alone, each has room
        self._end_stalled(counted - hold.num_counted, now_s, hold)
        if hold.has_ended or self.num_bytes - hold.num_counted + counted > self._max_bytes:
            raise self.refusal()
        self.give_back(hold)
        if counted:
            self.num_bytes += counted
            hold.num_counted, hold.grown_s = counted, now_s
            self._holds[hold] = None

    def give_back(self, hold: BodyHold) -> None:
        """A body takes no memory any more."""
        self.num_bytes -= hold.num_counted
        hold.num_counted = 0
        self._holds.pop(hold, None)

    def refusal(self) -> ApiError:
        """The error for a body that there is no memory for; it is counted."""
        self._on_refusal()
        message = (
            f"The bodies of other requests take all of the {self._max_bytes} bytes that there are for them"
            " (server.max_inflight_body_bytes); try again soon."
        )
        error = unavailable(message, "body_memory_full", _RETRY_AFTER_S)
        error.headers["Connection"] = "close"  # the rest of the body is not read
        return error

    def _end_stalled(self, more: int, now_s: float, asking: BodyHold) -> None:
        """End bodies that have stalled, the longest first, until there is room for `more` bytes."""
        for hold in tuple(self._holds):
            if self.num_bytes + more <= self._max_bytes or hold.grown_s > now_s - STALLED_S:
                return
            if hold is not asking and hold.end():
                self.give_back(hold)


class BodyHold:
    """One body's share of a BodyBudget."""

    def __init__(self, budget: BodyBudget) -> None:
        self.num_counted = 0
        self.grown_s = 0.0
        self.has_ended = False
        self._budget = budget
        self._limit: asyncio.Timeout | None = None

    def resize(self, num_bytes: int) -> None:
        """The body takes `num_bytes` from now on. Raises ApiError (503) if there is no room for that."""
        self._budget.resize(self, num_bytes)

    @contextlib.asynccontextmanager
    async def reading(self, timeout_s: float) -> AsyncIterator[None]:
        """While the body is read. Raises TimeoutError after `timeout_s`, ApiError (503) if `end` was called."""
        try:
            async with asyncio.timeout(timeout_s) as self._limit:
                yield
        except TimeoutError:
            if self.has_ended:
                raise self._budget.refusal() from None
            raise
        finally:
            self._limit = None

    def end(self) -> bool:
        """Read no more of the body; False for one that has been read."""
        if self._limit is None:
            return False
        self.has_ended = True
        self._limit.reschedule(asyncio.get_running_loop().time())
        return True
