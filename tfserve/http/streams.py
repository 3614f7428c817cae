"""Live streams: what the scheduler thinks of each reader, what readers report back, and ending one from outside."""

from __future__ import annotations

import asyncio
import math
import random
import time
from typing import Literal

import msgspec
from aiohttp import web

from tfserve.engine.scheduling.policies import IGNORES
from tfserve.errors import EngineStalledError, RequestError, TfserveError
from tfserve.http.answer import read_body
from tfserve.http.errors import JSON, ApiError, api_error
from tfserve.http.exchange import Exchange
from tfserve.http.keys import CALLER, Caller
from tfserve.http.parsing import BodyParser
from tfserve.http.ports import StreamPort
from tfserve.http.protocol import Int
from tfserve.http.service import Service
from tfserve.http.sse import HEADERS, event
from tfserve.types import EngineStats, StreamState, Tenant

_MAX_BODY_BYTES = 4096
_LEAST_INTERVAL_S = 0.1
_DEFAULT_INTERVAL_S = 0.5
_MOST_INTERVAL_S = 60.0

VIEWED_BYTES_PER_S = 10e6
"""What all viewers together get of pictures: where that is little for them, they get fewer."""

PATIENCE_S = 10.0
"""How long the engine, which answers between two steps, may take to tell of its streams."""

INTERVAL = {
    "type": "number",
    "minimum": _LEAST_INTERVAL_S,
    "maximum": _MOST_INTERVAL_S,
    "default": _DEFAULT_INTERVAL_S,
    "description": "Seconds between two events.",
}
"""JSON schema of `?interval=`."""


class StreamList(msgspec.Struct, kw_only=True):
    """Body of GET /v1/streams, and the data of each of its events; `policy` and `stats` are the engine's.

    `policy_ignores` names what a request may say that the policy takes no notice of.
    """

    created: float
    policy: str
    policy_ignores: tuple[str, ...]
    stats: EngineStats
    data: list[StreamState]
    object: Literal["list"] = "list"


class PlayedReport(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """Body of POST /v1/streams/{id}/buffer: what has been read so far of the whole answer, in tokens or characters."""

    played_tokens: Int | None = None
    played_chars: Int | None = None


class PlayedReply(msgspec.Struct, kw_only=True):
    """What the scheduler was told, and how much of what was sent that leaves unread."""

    id: str
    played_tokens: int
    unread_tokens: int


class AbortBody(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """Body of POST /abort_request: the id of an answer, or of one of its choices; either way all of it ends."""

    request_id: str


class AbortReply(msgspec.Struct, kw_only=True):
    """Which request ends."""

    request_id: str
    aborted: bool = True


class StreamFeed:
    """Pictures of the streams that a caller may see. The engine is asked once, however many look."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._begun_s = float("-inf")
        self._listed: StreamList | None = None
        self._pictures: dict[Tenant | None, bytes] = {}
        self._asking = asyncio.Lock()

    async def listed(self, max_age_s: float) -> StreamList:
        """All streams, at most `max_age_s` older than this call, however long the engine takes.

        Raises ApiError, EngineDeadError.
        """
        oldest_s = time.monotonic() - max_age_s
        async with self._asking:
            # What was begun after this call is as good as its own, however many wait for one.
            if self._listed is None or self._begun_s < oldest_s:
                begun_s = time.monotonic()
                engine = self._service.engine_alive
                streams = await engine.streams()
                policy = engine.info.policy
                self._listed = StreamList(
                    created=time.time(),
                    policy=policy,
                    policy_ignores=IGNORES.get(policy, ()),
                    stats=engine.stats(),
                    data=streams,
                )
                self._pictures.clear()
                self._begun_s = begun_s
            return self._listed

    async def picture(self, max_age_s: float, caller: Caller) -> bytes:
        """JSON of a StreamList that is no older than `max_age_s`. Raises ApiError, EngineDeadError."""
        try:
            async with asyncio.timeout(PATIENCE_S):
                listed = await self.listed(max_age_s)
        except TimeoutError:
            message = f"The engine has not told of its streams within {PATIENCE_S:g} s; see /health."
            raise EngineStalledError(message) from None
        viewer = None if caller.sees_all else caller.tenant
        if viewer not in self._pictures:
            data = listed.data
            if viewer is not None:
                data = [each for each in data if self._service.find(each.id.rpartition("-")[0], caller)]
            self._pictures[viewer] = msgspec.json.encode(msgspec.structs.replace(listed, data=data))
        return self._pictures[viewer]


class StreamEndpoints:
    """What one can ask and say about streams that are under way."""

    def __init__(self, service: Service, feed: StreamFeed) -> None:
        self._service = service
        self._feed = feed
        self._reports = BodyParser(PlayedReport, {})
        self._aborts = BodyParser(AbortBody, {})
        self._num_viewers = 0

    async def list(self, request: web.Request) -> web.StreamResponse:
        """GET /v1/streams: once, or as events every `?interval=` seconds (0.5) for who accepts text/event-stream."""
        interval_s, caller = _interval_s(request), request[CALLER]
        if "text/event-stream" not in request.headers.get("Accept", ""):
            return web.Response(body=await self._feed.picture(0.0, caller), content_type=JSON)
        first = await self._feed.picture(interval_s / 2, caller)
        response = web.StreamResponse(headers=HEADERS)
        await response.prepare(request)
        await response.write(event(first))
        self._num_viewers += 1
        try:
            await self._show(request, response, interval_s, len(first))
        finally:
            self._num_viewers -= 1
        return response

    async def _show(self, request: web.Request, response: web.StreamResponse, interval_s: float, size: int) -> None:
        """Send pictures until the server ends; `size` is that of the first, in bytes."""
        while not self._service.is_ending:
            pause_s = pause_before(interval_s, self._num_viewers, size)
            await asyncio.sleep(pause_s)
            try:
                picture = await self._feed.picture(pause_s / 2, request[CALLER])
            except TfserveError as error:  # the headers are out: the stream itself must tell
                await response.write(event(api_error(error).body()))
                break
            size = len(picture)
            await response.write(event(picture))
            # A viewer who does not look gets fewer pictures, not a backlog of them.
            await request.writer.drain()

    async def buffer(self, request: web.Request) -> web.Response:
        """POST /v1/streams/{id}/buffer: a client reports how much its reader has read; replaces the estimate."""
        with self._service.bodies.hold() as hold:
            report = self._reports.parse(await read_body(request, _MAX_BODY_BYTES, hold))
        _, stream = self._find(request.match_info["id"], "id", request[CALLER])
        if math.isnan(stream.rate):
            message = "This stream has no reader to report on; send a consumption_rate, such as auto, with its request."
            raise RequestError("id", message, "no_reader")
        num_tokens = _num_played(report, stream)
        stream.report_played(num_tokens)
        unread = stream.num_output_tokens - num_tokens
        reply = PlayedReply(id=stream.request_id, played_tokens=num_tokens, unread_tokens=unread)
        return web.Response(body=msgspec.json.encode(reply), content_type=JSON)

    async def abort(self, request: web.Request) -> web.Response:
        """POST /abort_request: end a request, wherever it is; its client is told."""
        with self._service.bodies.hold() as hold:
            wanted = self._aborts.parse(await read_body(request, _MAX_BODY_BYTES, hold)).request_id
        exchange, _ = self._find(wanted, "request_id", request[CALLER])
        exchange.abort("The request was aborted by POST /abort_request.", for_good=True)
        return web.Response(body=msgspec.json.encode(AbortReply(request_id=wanted)), content_type=JSON)

    def _find(self, name: str, param: str, caller: Caller) -> tuple[Exchange, StreamPort]:
        """The stream of this id and its request; an answer's id means its first choice.

        Raises ApiError (404) about `param`, also where the stream is not for this caller to see.
        """
        exchange = self._service.find(name, caller)
        if exchange is not None:
            return exchange, exchange.streams[0]
        exchange = self._service.find(name.rpartition("-")[0], caller)
        if exchange is not None:
            for stream in exchange.streams:
                if stream.request_id == name:
                    return exchange, stream
        message = f"No live stream has the id {name[:100]!r}; it may have ended. See /v1/streams."
        raise ApiError(404, message, param=param, code="stream_not_found")


def pause_before(interval_s: float, num_viewers: int, size: int) -> float:
    """Seconds from one picture of `size` bytes to the next for a viewer that asks for one each `interval_s`."""
    least_s = num_viewers * size / VIEWED_BYTES_PER_S
    return interval_s if least_s <= interval_s else least_s * random.uniform(1.0, 1.5)  # not all at the same time


def _num_played(report: PlayedReport, stream: StreamPort) -> int:
    """Tokens read, of those sent; characters are converted by the answer's own average."""
    given = [value for value in (report.played_tokens, report.played_chars) if value is not None]
    if len(given) != 1 or given[0] < 0:
        message = "give either played_tokens or played_chars, a count of 0 or more since the answer's start"
        raise RequestError("played_chars" if report.played_tokens is None and given else "played_tokens", message)
    sent = stream.num_output_tokens
    if report.played_tokens is not None:
        return min(report.played_tokens, sent)
    share = min(given[0] / stream.num_chars, 1.0) if stream.num_chars else 0.0
    return round(share * sent)


def _interval_s(request: web.Request) -> float:
    """Seconds between two pictures. Raises RequestError."""
    text = request.query.get("interval", str(_DEFAULT_INTERVAL_S))
    try:
        interval_s = float(text)
    except ValueError:
        interval_s = float("nan")
    if not _LEAST_INTERVAL_S <= interval_s <= _MOST_INTERVAL_S:
        message = f"interval must be seconds between {_LEAST_INTERVAL_S} and {_MOST_INTERVAL_S}, got {text[:50]!r}"
        raise RequestError("interval", message)
    return interval_s
