"""Server-sent events: framing, and the writer that turns engine outputs into one write per stream and step.

Nothing runs per token but a callback: no task wakes, no future is made. At 20,000 tokens/s a stream's step has 50 us.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Sequence
from typing import Protocol

import msgspec
from aiohttp import web

from tfserve.errors import failures
from tfserve.http.errors import api_error
from tfserve.http.off_loop import LONG, off_loop
from tfserve.http.pacing import Pacer
from tfserve.http.replies import Usage
from tfserve.http.request_group import RequestGroup
from tfserve.types import RequestOutput

DONE = b"data: [DONE]\n\n"
KEEP_ALIVE = b": keep-alive\n\n"

HEADERS = {
    "Content-Type": "text/event-stream; charset=utf-8",
    "Cache-Control": "no-cache",
    "X-Accel-Buffering": "no",  # nginx would hold tokens back until a buffer fills
}

MAX_UNSENT_BYTES = 16 * 1024
"""What one stream may have rendered and not yet handed to the kernel; beyond it tokens wait as twelve bytes each."""

KERNEL_BUFFER_BYTES = 64 * 1024
"""What the kernel may hold for one stream; its default is up to 4 MiB, minutes of text, for each slow reader."""

MAX_TOKENS_AT_ONCE = 512
"""Most tokens of one event. After a long pause of the reader, the waiting tokens go out in pieces of this size."""


class ChunkRenderer(Protocol):
    """Turns outputs into the events of one endpoint."""

    def chunk(self, index: int, output: RequestOutput, usage: Usage) -> bytes:
        """Events for what is new in choice `index`; empty when there is nothing to tell yet. `usage` is so far."""
        ...

    def template(self, index: int) -> tuple[bytes, bytes] | None:
        """What surrounds the JSON string of the text in every event of choice `index` that has nothing but text.

        Asked for after each event until there is one; None if there is no such constant, or not yet.
        """
        ...

    def usage_chunk(self, usage: Usage) -> bytes:
        """The event with token counts; empty when the client did not ask for it."""
        ...


MAX_SCORED_AT_ONCE = 256
"""Tokens with log probabilities that are rendered on the event loop at once; more of them, as an echoed prompt has, are
rendered in a thread."""


def event(json: bytes) -> bytes:
    """One server-sent event."""
    return b"data: %b\n\n" % json


async def stream_answer(
    request: web.Request,
    group: RequestGroup,
    renderer: ChunkRenderer,
    *,
    pacers: Sequence[Pacer] | None,
    keep_alive_s: float,
    num_echoed: int = 0,
) -> web.StreamResponse:
    """Answer with a stream: chunks as they come, or each stream's as its pacer allows; then [DONE].

    `num_echoed` is how many characters of prompts its choices begin with, all together.

    A comment breaks every `keep_alive_s` of silence (0: never).

    An error after the headers are out becomes an error event. Raises ConnectionError or CancelledError when the
    client goes away.
    """
    response = web.StreamResponse(headers=HEADERS)
    await response.prepare(request)
    writer = EventWriter(
        request, response, group, renderer, pacers=pacers, keep_alive_s=keep_alive_s, num_echoed=num_echoed
    )
    try:
        rest = await writer.run()
    except ConnectionError:
        raise
    except failures() as error:
        rest = event(api_error(error).body())
    finally:
        writer.close()
    await response.write_eof(rest + DONE)
    return response


class EventWriter:
    """Writes a group's events as they come, straight to the connection.

    A reader slower than the model costs no memory for text: once the connection holds MAX_UNSENT_BYTES, outputs stay
    in the engine's stream, merged, until it has room again.
    """

    def __init__(
        self,
        request: web.Request,
        response: web.StreamResponse,
        group: RequestGroup,
        renderer: ChunkRenderer,
        *,
        pacers: Sequence[Pacer] | None,
        keep_alive_s: float,
        num_echoed: int = 0,
    ) -> None:
        transport = request.transport
        if transport is None:
            raise ConnectionResetError("the client has gone")
        self._transport = transport
        transport.set_write_buffer_limits(high=MAX_UNSENT_BYTES)
        transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, KERNEL_BUFFER_BYTES)
        self._protocol = request.protocol
        self._writer = request.writer
        self._is_chunked = response.headers.get("Transfer-Encoding") == "chunked"
        self._group = group
        self._renderer = renderer
        self._templates: dict[int, tuple[bytes, bytes] | None] = {}
        self._encode = msgspec.json.Encoder().encode
        self._keep_alive_s = keep_alive_s
        self._begins_long = num_echoed >= LONG
        self._pacers = pacers
        self._pace_timer: asyncio.TimerHandle | None = None
        self._loop = asyncio.get_running_loop()
        self._written_s = self._loop.time()
        self._timer: asyncio.TimerHandle | None = None
        self._attention = asyncio.Event()
        self._is_full = False
        self._is_over = False
        self._rest = b""
        self._long_batch: list[tuple[int, RequestOutput]] = []
        self._error: BaseException | None = None

    async def run(self) -> bytes:
        """Write everything but the last step's events, which are returned. Raises what the group raises."""
        self._group.listen(self._on_news)
        if self._keep_alive_s > 0:
            self._timer = self._loop.call_later(self._keep_alive_s, self._on_silence)
        self._on_news()
        while True:
            await self._attention.wait()
            self._attention.clear()
            if self._error is not None:
                raise self._error
            if self._long_batch:
                batch, self._long_batch = self._long_batch, []
                self._deliver(await off_loop(LONG, self._render, batch))
            if self._is_over:
                return self._rest
            await self._writer.drain()
            self._is_full = False
            self._on_news()

    def close(self) -> None:
        """Nothing more will be written by the writer itself."""
        self._is_over = True
        for timer in (self._timer, self._pace_timer):
            if timer is not None:
                timer.cancel()

    def _on_news(self) -> None:
        """Write what has come, unless the connection is full. Runs once per stream and step: it must be cheap."""
        if self._is_full or self._is_over:
            return
        try:
            if self._pacers is not None:
                self._pass_on(self._take_paced(self._pacers))
                return
            self._pass_on(self._group.take(most=MAX_TOKENS_AT_ONCE))
            while self._group.has_more and not (self._is_full or self._is_over):
                self._pass_on(self._group.take(most=MAX_TOKENS_AT_ONCE))
        except failures() as error:
            self._error = error
            self._end()

    def _pass_on(self, batch: list[tuple[int, RequestOutput]]) -> None:
        """Write these outputs, or leave them to `run` if rendering takes long."""
        begins = self._begins_long and any(index not in self._templates for index, _ in batch)
        if begins or sum(map(_num_scored, batch)) > MAX_SCORED_AT_ONCE:
            self._long_batch = batch
            self._is_full = True
            self._attention.set()
        else:
            self._deliver(self._render(batch))

    def _deliver(self, data: bytes) -> None:
        """Write these events, or keep the last ones for the end."""
        if self._group.finished:
            self._rest = data + self._renderer.usage_chunk(self._group.usage)
            self._end()
        elif data:
            self._write(data)

    def _take_paced(self, pacers: Sequence[Pacer]) -> list[tuple[int, RequestOutput]]:
        """What is due, and a timer for what is not."""
        self._group.check_aborted()
        now_s = self._loop.time()
        batch: list[tuple[int, RequestOutput]] = []
        for index in self._group.unfinished:
            stream = self._group.streams[index]
            # Thoughts have no reader to pace them for.
            allowed = None if stream.may_think else pacers[index].allowed(stream.num_waiting, now_s)
            if allowed != 0:
                batch += self._group.take(index, allowed)
        if self._pace_timer is not None:
            self._pace_timer.cancel()
        due_s = min((pacer.wake_s for pacer in pacers if pacer.wake_s is not None), default=None)
        self._pace_timer = None if due_s is None else self._loop.call_at(due_s, self._on_news)
        return batch

    def _render(self, batch: list[tuple[int, RequestOutput]]) -> bytes:
        return b"".join([self._event(index, output) for index, output in batch])

    def _event(self, index: int, output: RequestOutput) -> bytes:
        template = self._templates.get(index)
        is_plain = output.logprobs is None and output.prompt_logprobs is None and output.finish_reason is None
        if template is None or not is_plain:
            data = self._renderer.chunk(index, output, self._group.usage)
            if data and template is None:
                self._templates[index] = self._renderer.template(index)
            return data
        if not output.text:
            return b""
        return template[0] + self._encode(output.text) + template[1]

    def _write(self, data: bytes) -> None:
        if self._transport.is_closing():
            raise ConnectionResetError("the client has gone")
        # Framed as aiohttp's own writer does, without a coroutine per write.
        self._transport.write(b"%x\r\n%b\r\n" % (len(data), data) if self._is_chunked else data)
        self._written_s = self._loop.time()
        if self._protocol.writing_paused:
            self._is_full = True
            self._attention.set()

    def _end(self) -> None:
        self._is_over = True
        self._attention.set()

    def _on_silence(self) -> None:
        """Comment on a silence that has lasted long enough, and look again when the next would."""
        if self._is_over:
            return
        if self._loop.time() - self._written_s >= self._keep_alive_s and not self._is_full:
            try:
                self._write(KEEP_ALIVE)
            except ConnectionError as error:
                self._error = error
                self._end()
                return
        # A full connection needs no comment: its client has unread data.
        due_s = self._loop.time() if self._is_full else self._written_s
        self._timer = self._loop.call_at(due_s + self._keep_alive_s, self._on_silence)


def _num_scored(numbered: tuple[int, RequestOutput]) -> int:
    output = numbered[1]
    return len(output.logprobs or ()) + len(output.prompt_logprobs or ())
