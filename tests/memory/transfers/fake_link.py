"""A device whose streams run when the test says so: what StreamTransfers enqueues, in every order a GPU might take."""

from __future__ import annotations

import threading
from collections import deque
from dataclasses import dataclass, field

import numpy as np

from tfserve.memory.transfers.copy_runs import Rectangle
from tfserve.plan import Direction


@dataclass(eq=False)
class FakeMark:
    """An event: reached once the stream has run up to it."""

    reached: threading.Event = field(default_factory=threading.Event)
    error: BaseException | None = None


class FakeLink:
    """Three streams over two byte arrays. `run` executes what is at the head of a stream if its marks are reached.

    With `honour_after` off streams wait for nothing: the control of the race tests.
    """

    def __init__(self, device: np.ndarray, host: np.ndarray, honour_after: bool = True) -> None:
        self.device, self.host = device, host
        self.honour_after = honour_after
        self.refuse = False
        self.streams: dict[object, deque] = {"compute": deque(), **{direction: deque() for direction in Direction}}
        self.moved: list[tuple[Direction, Rectangle]] = []
        self.closed = False

    def start(self, direction, what, after):
        if self.refuse:
            raise RuntimeError("the driver refused")
        mark = FakeMark()
        self.streams[direction].append((lambda: self._move(direction, what), list(after), mark))
        return mark

    def launch(self, kernel) -> FakeMark:
        """Enqueue a step on the compute stream."""
        mark = FakeMark()
        self.streams["compute"].append((kernel, [], mark))
        return mark

    def finish(self, mark) -> float:
        mark.reached.wait()
        if mark.error is not None:
            raise mark.error
        return 0.0

    def close(self) -> None:
        self.closed = True

    def ready(self) -> list[object]:
        """Streams whose head may run."""
        return [
            name
            for name, work in self.streams.items()
            if work and (not self.honour_after or all(mark.reached.is_set() for mark in work[0][1]))
        ]

    def run(self, name) -> None:
        work, _, mark = self.streams[name].popleft()
        try:
            work()
        except BaseException as error:
            mark.error = error
        mark.reached.set()

    def run_all(self) -> None:
        while ready := self.ready():
            self.run(ready[0])

    def _move(self, direction: Direction, what: Rectangle) -> None:
        """What cudaMemcpy2DAsync does."""
        self.moved.append((direction, what))
        for row in range(what.rows):
            dev, host = (
                slice(begin + row * what.pitch, begin + row * what.pitch + what.width)
                for begin in (what.device_offset, what.host_offset)
            )
            if direction is Direction.STORE:
                self.host[host] = self.device[dev]
            else:
                self.device[dev] = self.host[host]
