"""Routes the core's messages: outputs to the requests' streams, states to the callers that asked. Torch-free.

Messages arrive in the client's thread. Streams belong to event loops; blocking callers wait in threads of their own.
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
    """Queue of outputs from the client's thread to the streams of one event loop, with one wake-up for all of them.

    A loop that is behind takes several steps at once; each stream then notifies its reader once.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._steps: deque[list[tuple[RequestStream, TokenOutput | None]]] = deque()
        self._is_called = False

    @property
    def is_closed(self) -> bool:
        """True once the event loop has ended: its streams have no reader."""
        return self._loop.is_closed()

    def leave(self, step: list[tuple[RequestStream, TokenOutput | None]]) -> None:
        """Queue a step's outputs; None for a request that was admitted."""
        self._steps.append(step)
        if not self._is_called:
            self._is_called = True
            _call(self._loop, self._deliver)

    def _deliver(self) -> None:
        # Reset first: outputs queued from here on wake the loop again.
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
            except failures():  # an error in one reader's callback must not affect the other streams
                logger.exception("the reader of request %s failed", stream.request_id)


class OutputRouter:
    """The stream of every live request. Call `add` and `discard` from any thread, all else from the client's."""

    def __init__(self) -> None:
        self._sinks: dict[RequestId, Sink] = {}
        self._tenants: dict[RequestId, Tenant] = {}
        self._queues: dict[asyncio.AbstractEventLoop, LoopQueue] = {}

    def __len__(self) -> int:
        return len(self._sinks)

    def __contains__(self, request_id: object) -> bool:
        return request_id in self._sinks

    def add(self, request_id: RequestId, sink: Sink, tenant: Tenant = ONE_TENANT) -> None:
        """Send the outputs of this request to `sink`, until it ends."""
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
        """True if with `num_new` more requests the tenant exceeds its share of `room` live requests."""
        live = Counter(self._tenants.copy().values())
        weight = sum(each.weight for each in live.keys() | {tenant})
        return live[tenant] + num_new > room * tenant.weight / weight

    def hand_out(self, message: StepOutputs, now_s: float) -> list[RequestId]:
        """Queue a step's outputs for their streams. Returns the live requests whose event loop has ended."""
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
        """End every open stream with an error: the engine has ended."""
        while self._sinks:
            request_id, sink = self._sinks.popitem()
            self._tenants.pop(request_id, None)
            if sink.loop is None:
                sink.die(reason)
            else:
                _call(sink.loop, sink.die, reason)


class Questions:
    """Queries for the live requests' states that are not answered yet."""

    def __init__(self) -> None:
        self._numbers = itertools.count()
        self._asked: dict[int, asyncio.Future[list[StreamState]]] = {}

    def ask(self) -> tuple[int, asyncio.Future[list[StreamState]]]:
        """A new query: its number, and the future on the running loop that the answer with that number sets."""
        number = next(self._numbers)
        answer: asyncio.Future[list[StreamState]] = asyncio.get_running_loop().create_future()
        self._asked[number] = answer
        return number, answer

    def forget(self, number: int) -> None:
        """Drop a query; its answer is ignored."""
        self._asked.pop(number, None)

    def answer(self, states: StreamStates) -> None:
        """Set the future of the query."""
        asked = self._asked.pop(states.query, None)
        if asked is not None:
            _call(asked.get_loop(), _settle, asked, states.streams)

    def release_all(self, reason: str) -> None:
        """Fail every open query."""
        while self._asked:
            _, asked = self._asked.popitem()
            _call(asked.get_loop(), _fail, asked, reason)


def _call(loop: asyncio.AbstractEventLoop, function: Callable[..., None], *args: object) -> None:
    """Run `function` on a loop, unless the loop has ended."""
    with contextlib.suppress(RuntimeError):
        loop.call_soon_threadsafe(function, *args)


def _settle(asked: asyncio.Future[list[StreamState]], streams: list[StreamState]) -> None:
    if not asked.done():
        asked.set_result(streams)


def _fail(asked: asyncio.Future[list[StreamState]], reason: str) -> None:
    if not asked.done():
        asked.set_exception(EngineDeadError(reason))
