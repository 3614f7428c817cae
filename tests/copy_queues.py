"""The common part of the tests' TransferEngines: queues, finished copies, and cancelling."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence

from tfserve.plan import Ack, Copy, CopyId, Direction, StepId, TransferEngine


def acknowledged(engine: TransferEngine, n: int, patience_s: float) -> list[Ack]:
    """The next n acknowledgements of an engine whose copies end on threads."""
    acks, deadline = [], time.monotonic() + patience_s
    while len(acks) < n and time.monotonic() < deadline:
        acks += engine.poll()
        time.sleep(1e-3)
    assert len(acks) == n
    return acks


class CopyQueues:
    """Copies in a queue per direction; `pending` have not ended, and steps up to `passed` have."""

    def __init__(self) -> None:
        self.queues: dict[Direction, deque[Copy]] = {direction: deque() for direction in Direction}
        self.pending: set[CopyId] = set()
        self.passed = -1

    def submit(self, copies: Sequence[Copy]) -> None:
        for copy in copies:
            self.pending.add(copy.id)
            self.queues[copy.direction].append(copy)

    def complete(self, step: StepId) -> None:
        self.passed = max(self.passed, step)

    def cancel(self, ids: set[CopyId]) -> set[CopyId]:
        gone = {copy.id for queue in self.queues.values() for copy in queue} & ids
        for direction, queue in self.queues.items():
            self.queues[direction] = deque(copy for copy in queue if copy.id not in gone)
        self.pending -= gone
        return gone

    def step_has_passed(self, copy: Copy) -> bool:
        return copy.after.step is None or copy.after.step <= self.passed

    def copies_have_ended(self, copy: Copy) -> bool:
        return self.pending.isdisjoint(copy.after.copies)
