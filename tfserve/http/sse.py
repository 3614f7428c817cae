"""Server-sent events: framing, and the loop that turns engine outputs into one write per step."""

from __future__ import annotations

import asyncio
from typing import Protocol

from aiohttp import web

from tfserve.http.errors import api_error
from tfserve.http.exchange import Exchange
from tfserve.http.replies import Usage
from tfserve.types import RequestOutput

DONE = b"data: [DONE]\n\n"
KEEP_ALIVE = b": keep-alive\n\n"

HEADERS = {
    "Content-Type": "text/event-stream; charset=utf-8",
    "Cache-Control": "no-cache",
    "X-Accel-Buffering": "no",  # nginx would hold tokens back until a buffer fills
}


class ChunkRenderer(Protocol):
    """Turns outputs into the events of one endpoint."""

    def chunk(self, index: int, output: RequestOutput, usage: Usage) -> bytes:
        """Events for what is new in choice `index`; empty when there is nothing to tell yet. `usage` is so far."""
        ...

    def usage_chunk(self, usage: Usage) -> bytes:
        """The event with token counts; empty when the client did not ask for it."""
        ...


def event(json: bytes) -> bytes:
    """One server-sent event."""
    return b"data: %b\n\n" % json


async def stream_answer(
    request: web.Request, exchange: Exchange, renderer: ChunkRenderer, keep_alive_s: float
) -> web.StreamResponse:
    """Answer with a stream: chunks as they come, a comment every `keep_alive_s` of silence (0: never), then [DONE].

    What fails after the headers are out is told as an error event. Raises ConnectionError or CancelledError when the
    client goes away.
    """
    response = web.StreamResponse(headers=HEADERS)
    await response.prepare(request)
    try:
        rest = await _chunks(response, exchange, renderer, keep_alive_s)
    except ConnectionError:
        raise
    except Exception as error:
        rest = event(api_error(error).body())
    await response.write_eof(rest + DONE)
    return response


async def _chunks(
    response: web.StreamResponse, exchange: Exchange, renderer: ChunkRenderer, keep_alive_s: float
) -> bytes:
    """Write all events but the last step's, which are returned. Memory stays bounded: outputs merge while we write."""
    clock = asyncio.get_running_loop().time
    written = clock()
    while True:
        patience = max(0.0, written + keep_alive_s - clock()) if keep_alive_s > 0 else None
        batch = await exchange.next(patience)
        usage = exchange.usage
        data = b"".join([renderer.chunk(index, output, usage) for index, output in batch])
        if exchange.finished:
            return data + renderer.usage_chunk(usage)
        silent = patience is not None and clock() - written >= keep_alive_s
        if data or silent:
            await response.write(data or KEEP_ALIVE)
            written = clock()
