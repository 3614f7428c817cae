"""StreamTransfers: the TransferEngine of a device with streams, which order the copies it enqueues. Torch-free."""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Sequence
from queue import SimpleQueue
from typing import Protocol

from tfserve.errors import EngineDeadError, failures
from tfserve.memory.transfers.copy_runs import BlockGeometry, Rectangle, take_run
from tfserve.plan import Ack, Clock, Copy, CopyId, Direction, StepId

logger = logging.getLogger(__name__)

_MAX_RUN_BYTES = 64 * 1024 * 1024
"""A millisecond of PCIe 5: large enough to stream, small enough to be acknowledged soon."""


class Mark(Protocol):
    """A place in a stream's work, which other streams can wait for; a CUDA event."""


class Link(Protocol):
    """Two streams beside the one that computes, one per direction."""

    def start(self, direction: Direction, what: Rectangle, after: Sequence[Mark]) -> Mark:
        """Enqueue a copy behind the direction's earlier ones and behind `after`; returns at once."""
        ...

    def finish(self, mark: Mark) -> float:
        """Wait, on the host, for a copy's end: the seconds that it took. Raises what the device raised."""
        ...

    def close(self) -> None:
        """Wait for what is under way and let go of streams and registered memory."""
        ...


class StreamTransfers:
    """Copies start on the device, not on the host: each is enqueued as soon as all it waits for has been enqueued.

    `launched` says that a step has been launched and gives the mark that it leaves on the compute stream: every copy
    that waits for the step waits for that mark, on the device. A step that is not launched yet holds the copies
    that wait for it, and those behind them, on the host; so does a copy of the other direction that is held itself.
    What is enqueued cannot be cancelled. A thread per direction waits for the copies' ends, so the loop never does;
    acknowledgements of two directions may overtake each other by the time that a thread takes to wake. Where such a
    thread ends, `poll` raises EngineDeadError, for no copy would be acknowledged any more.
    """

    def __init__(self, link: Link, geometry: BlockGeometry, blocks_per_chunk: int, clock: Clock) -> None:
        self._link = link
        self._geometry = geometry
        self._blocks_per_chunk = blocks_per_chunk
        self._clock = clock
        self._queues: dict[Direction, deque[Copy]] = {direction: deque() for direction in Direction}
        self._queued: set[CopyId] = set()
        self._steps: dict[StepId, Mark] = {}
        self._passed = -1
        # Guards all state: steps may be launched on a thread of their own, and waiting threads acknowledge on theirs.
        self._lock = threading.RLock()
        self._marks: dict[CopyId, Mark] = {}
        self._acks: list[Ack] = []
        self._broken: BaseException | None = None
        self._started: dict[Direction, SimpleQueue[tuple[list[Copy], Mark] | None]] = {
            direction: SimpleQueue() for direction in Direction
        }
        self._threads = [
            threading.Thread(target=self._await, args=(started,), name=f"kv-{direction.value}", daemon=True)
            for direction, started in self._started.items()
        ]
        for thread in self._threads:
            thread.start()

    def submit(self, copies: Sequence[Copy]) -> None:
        """Queue copies, and enqueue on the device what may be."""
        with self._lock:
            for copy in copies:
                self._queued.add(copy.id)
                self._queues[copy.direction].append(copy)
            self._start()

    def launched(self, step: StepId, mark: Mark) -> None:
        """Step `step` is on the device's compute stream and ends at `mark`. May be called from any thread."""
        with self._lock:
            if step > self._passed:
                self._steps[step] = mark
            self._start()

    def complete(self, step: StepId) -> None:
        """Step `step`, and all before it, have finished."""
        with self._lock:
            self._passed = max(self._passed, step)
            self._steps = {step: mark for step, mark in self._steps.items() if step > self._passed}
            self._start()

    def poll(self) -> list[Ack]:
        """Acknowledgements since the last call."""
        with self._lock:
            if self._broken is not None:
                raise EngineDeadError(f"a thread that awaits copies has ended: {self._broken!r}") from self._broken
            acks, self._acks = self._acks, []
        return acks

    def cancel(self, ids: set[CopyId]) -> set[CopyId]:
        """Drop copies that are not on the device yet; returns which."""
        with self._lock:
            gone = ids & self._queued
            for direction, queue in self._queues.items():
                self._queues[direction] = deque(copy for copy in queue if copy.id not in gone)
            self._queued -= gone
            self._start()
        return gone

    def close(self) -> None:
        """Drop what is not on the device yet, wait for the rest and end the threads."""
        with self._lock:
            for queue in self._queues.values():
                queue.clear()
        for started in self._started.values():
            started.put(None)
        for thread in self._threads:
            thread.join()
        self._link.close()

    def _start(self) -> None:
        """Enqueue all that may be; enqueuing a store may free a load for it, and the other way round."""
        progress = True
        while progress:
            progress = False
            for queue in self._queues.values():
                while queue and (after := self._waits(queue[0])) is not None:
                    self._enqueue(queue, after)
                    progress = True

    def _enqueue(self, queue: deque[Copy], after: list[Mark]) -> None:
        first = queue[0]
        most = max(1, _MAX_RUN_BYTES // (first.num_tokens * self._geometry.token_bytes))
        # One that waits for something else goes by itself: it must not hold up the others.
        run = take_run(
            queue,
            lambda copy: self._waits(copy) in ([], after),
            most=most,
            blocks_per_chunk=self._blocks_per_chunk,
        )
        self._queued.difference_update(copy.id for copy in run)
        try:
            mark = self._link.start(first.direction, self._geometry.rectangle(first, len(run)), after)
        except failures():  # whatever the driver refused, the manager must learn that these copies have ended
            logger.exception("copy %s of %d blocks could not be started", first, len(run))
            now_s = self._clock.now()
            self._acks += [Ack(copy.id, False, 0, now_s, now_s) for copy in run]
            self._clock.notify()
            return
        self._marks.update((copy.id, mark) for copy in run)
        self._started[first.direction].put((run, mark))

    def _waits(self, copy: Copy) -> list[Mark] | None:
        """What a copy must wait for on the device; None if some of that is not there yet."""
        marks: list[Mark] = []
        step = copy.after.step
        if step is not None and step > self._passed:
            if step not in self._steps:
                return None
            marks.append(self._steps[step])
        if not self._queued.isdisjoint(copy.after.copies):
            return None
        for other in copy.after.copies:
            mark = self._marks.get(other)
            if mark is not None and mark not in marks:
                marks.append(mark)
        return marks

    def _await(self, started: SimpleQueue[tuple[list[Copy], Mark] | None]) -> None:
        try:
            self._acknowledge(started)
        except BaseException as error:
            logger.exception("a thread that awaits copies has ended")
            self._broken = error
            self._clock.notify()

    def _acknowledge(self, started: SimpleQueue[tuple[list[Copy], Mark] | None]) -> None:
        last_end_s = self._clock.now()
        while (item := started.get()) is not None:
            run, mark = item
            try:
                seconds, ok = self._link.finish(mark), True
            except failures():
                logger.exception("copy %s of %d blocks failed", run[0], len(run))
                seconds, ok = 0.0, False
            end_s = self._clock.now()
            # The device says how long it took; when it ended is known only as closely as this thread woke up.
            start_s = max(last_end_s, end_s - seconds)
            last_end_s, share_s = end_s, (end_s - start_s) / len(run)
            with self._lock:
                for i, copy in enumerate(run):
                    del self._marks[copy.id]
                    nbytes = copy.num_tokens * self._geometry.token_bytes if ok else 0
                    begin_s = start_s + i * share_s
                    self._acks.append(Ack(copy.id, ok, nbytes, begin_s, begin_s + share_s))
            self._clock.notify()
