"""SimTransfers: copies that take the time of a simulated link."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

import msgspec

from tfserve.engine.simulation.clock import SimClock
from tfserve.plan import Ack, Copy, CopyId, Direction, StepId


class SimLinks(msgspec.Struct, frozen=True, kw_only=True):
    """The link between the tiers: bytes/s each way, seconds per copy, and the slow-down when both directions are busy.

    A copy that starts while the other direction is busy takes `contention` times as long.
    """

    store_bytes_per_s: float
    load_bytes_per_s: float
    latency_s: float = 0.0
    contention: float = 1.0


class SimTransfers:
    """plan.TransferEngine in virtual time: a queue per direction, one copy at a time in each.

    A copy that continues the previous one on both tiers belongs to the same transfer and pays no latency.
    """

    def __init__(self, clock: SimClock, links: SimLinks, token_bytes: int) -> None:
        self._clock = clock
        self._token_bytes = token_bytes
        self._latency_s = links.latency_s
        self._contention = links.contention
        self._bytes_per_s = {Direction.STORE: links.store_bytes_per_s, Direction.LOAD: links.load_bytes_per_s}
        self._queues: dict[Direction, deque[Copy]] = {direction: deque() for direction in Direction}
        self._busy: dict[Direction, Copy | None] = dict.fromkeys(Direction)
        self._last: dict[Direction, tuple[Copy, float] | None] = dict.fromkeys(Direction)
        self._pending: set[CopyId] = set()
        self._acks: list[Ack] = []
        self._passed = -1

    def submit(self, copies: Sequence[Copy]) -> None:
        """Queue copies."""
        for copy in copies:
            self._pending.add(copy.id)
            self._queues[copy.direction].append(copy)
        self._start()

    def complete(self, step: StepId) -> None:
        """Step `step`, and all before it, have finished."""
        self._passed = max(self._passed, step)
        self._start()

    def poll(self) -> list[Ack]:
        """Acknowledgements since the last call."""
        acks, self._acks = self._acks, []
        return acks

    def cancel(self, ids: set[CopyId]) -> set[CopyId]:
        """Drop the copies that have not started; returns their ids."""
        gone: set[CopyId] = set()
        for direction, queue in self._queues.items():
            gone |= {copy.id for copy in queue if copy.id in ids}
            self._queues[direction] = deque(copy for copy in queue if copy.id not in ids)
        self._pending -= gone
        self._start()
        return gone

    def close(self) -> None:
        """Drop the copies that have not started."""
        for queue in self._queues.values():
            queue.clear()

    def _start(self) -> None:
        """Start every copy whose link is free and whose dependencies are done."""
        for direction, queue in self._queues.items():
            if self._busy[direction] is None and queue and self._ready(queue[0]):
                self._run(queue.popleft())

    def _ready(self, copy: Copy) -> bool:
        after = copy.after
        step_has_passed = after.step is None or after.step <= self._passed
        return step_has_passed and self._pending.isdisjoint(after.copies)

    def _run(self, copy: Copy) -> None:
        start_s = self._clock.now()
        nbytes = copy.num_tokens * self._token_bytes
        duration_s = nbytes / self._bytes_per_s[copy.direction]
        if any(busy is not None for busy in self._busy.values()):
            duration_s *= self._contention
        if not self._continues(copy, start_s):
            duration_s += self._latency_s
        self._busy[copy.direction] = copy
        ack = Ack(copy.id, True, nbytes, start_s, start_s + duration_s)
        self._clock.call_at(ack.end_s, lambda: self._end(copy, ack))

    def _end(self, copy: Copy, ack: Ack) -> None:
        self._busy[copy.direction] = None
        self._last[copy.direction] = (copy, ack.end_s)
        self._pending.discard(copy.id)
        self._acks.append(ack)
        self._clock.notify()
        self._start()

    def _continues(self, copy: Copy, start_s: float) -> bool:
        last = self._last[copy.direction]
        if last is None:
            return False
        before, end_s = last
        return (
            start_s == end_s
            and copy.device_block == before.device_block + 1
            and copy.host_block == before.host_block + 1
        )
