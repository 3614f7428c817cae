"""TenantNumbers: small numbers for the tenants that have live requests. Torch-free."""

from __future__ import annotations

import heapq


class TenantNumbers:
    """Numbers tenants from 0. A number is free again once its tenant has no live request."""

    def __init__(self) -> None:
        self._numbers: dict[str, int] = {}
        self._live: dict[int, tuple[str, int]] = {}
        self._free: list[int] = []

    def __len__(self) -> int:
        """Tenants with live requests."""
        return len(self._live)

    def enter(self, name: str) -> int:
        """One more live request of this tenant; returns the tenant's number."""
        number = self._numbers.get(name)
        if number is None:
            number = heapq.heappop(self._free) if self._free else len(self._live)
            self._numbers[name] = number
        _, count = self._live.get(number, (name, 0))
        self._live[number] = name, count + 1
        return number

    def leave(self, number: int) -> None:
        """One live request less."""
        name, count = self._live.pop(number)
        if count > 1:
            self._live[number] = name, count - 1
        else:
            del self._numbers[name]
            heapq.heappush(self._free, number)
