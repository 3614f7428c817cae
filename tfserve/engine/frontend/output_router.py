"""Where what the core says goes: outputs to the requests' readers, answers to those who asked. Torch-free.

The core speaks in the client's thread; readers live on event loops, or wait in threads of their own.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import time
from collections import Counter, deque
from collections.abc import Callable

from tfserve.engine.frontend.stream import Collector, RequestStream
from tfserve.errors import EngineDeadError, failures
from tfserve.messages import StepOutputs, StreamStates, TokenOutput
from tfserve.types import ONE_TENANT, RequestId, StreamState, Tenant

logger = logging.getLogger(__name__)

Sink = RequestStream | Collector


class LoopQueue:
    """What the client's thread leaves for the streams of one event loop: one wake-up however much comes meanwhile.

    A loop that is behind finds several steps at once, and each stream then tells its reader only once.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._steps: deque[list[tuple[RequestStream, TokenOutput | None]]] = deque()
        self._is_called = False

    @property
    def is_closed(self) -> bool:
        """True once the loop has ended: its readers are gone."""
        return self._loop.is_closed()

    def leave(self, step: list[tuple[RequestStream, TokenOutput | None]]) -> None:
        """Leave a step's outputs, None for a request that was let in."""
        self._steps.append(step)
        if not self._is_called:
            self._is_called = True
            _call(self._loop, self._deliver)

    def _deliver(self) -> None:
        # First, so that what is left from now on calls again.
        self._is_called = False
        now_s = time.monotonic()
        touched: dict[RequestStream, None] = {}
        while self._steps:
            for stream, output in self._steps.popleft():
                if output is None:
                    stream.start()
                else:
                    stream.put(output, now_s)
                touched[stream] = None
        for stream in touched:
            try:
                stream.notify()
            except failures():  # what one reader makes of its news is no other's loss
                logger.exception("the reader of request %s failed", stream.request_id)


class OutputRouter:
    """The readers of every live request. `add` and `discard` from any thread, the rest from the client's."""

    def __init__(self) -> None:
        self._sinks: dict[RequestId, Sink] = {}
        self._tenants: dict[RequestId, Tenant] = {}
        self._queues: dict[asyncio.AbstractEventLoop, LoopQueue] = {}

    def __len__(self) -> int:
        return len(self._sinks)

    def __contains__(self, request_id: object) -> bool:
        return request_id in self._sinks

    def add(self, request_id: RequestId, sink: Sink, tenant: Tenant = ONE_TENANT) -> None:
        """Deliver what comes for this request to `sink`, until it ends."""
        if sink.loop is not None and sink.loop not in self._queues:
            open_ones = {loop: queue for loop, queue in self._queues.items() if not queue.is_closed}
            self._queues = {**open_ones, sink.loop: LoopQueue(sink.loop)}
        self._tenants[request_id] = tenant
        self._sinks[request_id] = sink

    def discard(self, request_id: RequestId) -> None:
        """Forget a request that was never sent."""
        self._sinks.pop(request_id, None)
        self._tenants.pop(request_id, None)

    def has_share(self, tenant: Tenant, num_new: int, room: int) -> bool:
        """True if `num_new` more give a tenant more than its share of `room` live requests, beside the others."""
        live = Counter(self._tenants.copy().values())
        weight = sum(each.weight for each in live.keys() | {tenant})
        return live[tenant] + num_new > room * tenant.weight / weight

    def hand_out(self, message: StepOutputs, now_s: float) -> list[RequestId]:
        """Leave a step's outputs for their readers; the live requests whose readers are gone."""
        by_loop: dict[asyncio.AbstractEventLoop, list[tuple[RequestStream, TokenOutput | None]]] = {}
        for request_id in message.started:
            sink = self._sinks.get(request_id)
            if isinstance(sink, RequestStream):
                by_loop.setdefault(sink.loop, []).append((sink, None))
        for output in message.outputs:
            if output.finish_reason is None:
                sink = self._sinks.get(output.request_id)
            else:
                sink = self._sinks.pop(output.request_id, None)
                self._tenants.pop(output.request_id, None)
            if isinstance(sink, Collector):
                sink.put(output, now_s)
            elif sink is not None:
                by_loop.setdefault(sink.loop, []).append((sink, output))
        orphans: list[RequestId] = []
        for loop, step in by_loop.items():
            if loop.is_closed():
                orphans += {stream.request_id for stream, _ in step}
            else:
                self._queues[loop].leave(step)
        return orphans

    def release_all(self, reason: str) -> None:
        """End every open stream with the news of the engine's end."""
        while self._sinks:
            request_id, sink = self._sinks.popitem()
            self._tenants.pop(request_id, None)
            if sink.loop is None:
                sink.die(reason)
            else:
                _call(sink.loop, sink.die, reason)


class Questions:
    """Who asked for the live requests' states and has no answer yet."""

    def __init__(self) -> None:
        self._numbers = itertools.count()
        self._asked: dict[int, asyncio.Future[list[StreamState]]] = {}

    def ask(self) -> tuple[int, asyncio.Future[list[StreamState]]]:
        """A number to send and the future that `answer` with that number fulfils, on the running loop."""
        number = next(self._numbers)
        answer: asyncio.Future[list[StreamState]] = asyncio.get_running_loop().create_future()
        self._asked[number] = answer
        return number, answer

    def forget(self, number: int) -> None:
        """Nobody waits for this answer any more."""
        self._asked.pop(number, None)

    def answer(self, states: StreamStates) -> None:
        """Give an answer to whoever waits for it."""
        asked = self._asked.pop(states.query, None)
        if asked is not None:
            _call(asked.get_loop(), _settle, asked, states.streams)

    def release_all(self, reason: str) -> None:
        """Nothing will be answered any more."""
        while self._asked:
            _, asked = self._asked.popitem()
            _call(asked.get_loop(), _fail, asked, reason)


def _call(loop: asyncio.AbstractEventLoop, function: Callable[..., None], *args: object) -> None:
    """Run `function` on a loop, unless that has ended and nobody waits any more."""
    with contextlib.suppress(RuntimeError):
        loop.call_soon_threadsafe(function, *args)


def _settle(asked: asyncio.Future[list[StreamState]], streams: list[StreamState]) -> None:
    if not asked.done():
        asked.set_result(streams)


def _fail(asked: asyncio.Future[list[StreamState]], reason: str) -> None:
    if not asked.done():
        asked.set_exception(EngineDeadError(reason))
