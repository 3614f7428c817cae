"""A value that takes time to make, made once for all requests that wait for it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Generic, TypeVar

T = TypeVar("T")


class Fresh(Generic[T]):
    """The result of `make`, which runs at most once at a time, and only when the last result is too old."""

    def __init__(self, make: Callable[[], Awaitable[T]]) -> None:
        self._make = make
        self._making = asyncio.Lock()
        self._begun_s = float("-inf")
        self._value: T

    async def get(self, max_age_s: float = 0.0) -> T:
        """A value at most `max_age_s` older than this call, however long `make` takes; what it raises is raised."""
        oldest_s = time.monotonic() - max_age_s
        async with self._making:
            # A value that was begun after this call is as good as its own, however many calls wait for one.
            if self._begun_s < oldest_s:
                begun_s = time.monotonic()
                self._value = await self._make()
                self._begun_s = begun_s
            return self._value
