"""Live streams: the scheduler's view of each reader, reports from readers, and aborts from outside."""

from __future__ import annotations

import asyncio
import math
import random

import msgspec
from aiohttp import web

from tfserve.engine.frontend.stream import RequestStream
from tfserve.errors import RequestError, TfserveError
from tfserve.http.errors import JSON, ApiError, api_error
from tfserve.http.feed import FEED, StreamList
from tfserve.http.keys import CALLER, Caller
from tfserve.http.parsing import BodyParser
from tfserve.http.protocol import Count
from tfserve.http.reading import read
from tfserve.http.replies import json_response
from tfserve.http.request_group import RequestGroup
from tfserve.http.route import Route, register
from tfserve.http.service import SERVICE, Service
from tfserve.http.sse import HEADERS, event

_MAX_BODY_BYTES = 4096
_MIN_INTERVAL_S = 0.1
_DEFAULT_INTERVAL_S = 0.5
_MAX_INTERVAL_S = 60.0

VIEWED_BYTES_PER_S = 10e6
"""Bytes/s of pictures for all viewers together. Beyond that, each viewer gets fewer pictures."""

INTERVAL = {
    "type": "number",
    "minimum": _MIN_INTERVAL_S,
    "maximum": _MAX_INTERVAL_S,
    "default": _DEFAULT_INTERVAL_S,
    "description": "Seconds between two events.",
}
"""JSON schema of `?interval=`."""


class PlayedReport(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """Body of POST /v1/streams/{id}/buffer: what has been read so far of the whole answer, in tokens or characters.

    Thoughts before the answer do not count.
    """

    played_tokens: Count | None = None
    played_chars: Count | None = None


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


_REPORTS = BodyParser(PlayedReport, {})
_ABORTS = BodyParser(AbortBody, {})


async def streams(request: web.Request) -> web.StreamResponse:
    """GET /v1/streams: once, or as events every `?interval=` seconds (0.5) if it accepts text/event-stream."""
    interval_s, caller, feed = _interval_s(request), request[CALLER], request.app[FEED]
    if "text/event-stream" not in request.headers.get("Accept", ""):
        return web.Response(body=await feed.picture(0.0, caller), content_type=JSON)
    first = await feed.picture(interval_s / 2, caller)
    response = web.StreamResponse(headers=HEADERS)
    await response.prepare(request)
    await response.write(event(first))
    with feed.viewing():
        await _show(request, response, interval_s, len(first))
    return response


async def _show(request: web.Request, response: web.StreamResponse, interval_s: float, size: int) -> None:
    """Send pictures until the server ends; `size` is that of the first, in bytes."""
    service, feed = request.app[SERVICE], request.app[FEED]
    while not service.is_ending:
        pause_s = pause_before(interval_s, feed.num_viewers, size)
        await asyncio.sleep(pause_s)
        try:
            picture = await feed.picture(pause_s / 2, request[CALLER])
        except TfserveError as error:  # the headers are out: the stream itself must tell
            await response.write(event(api_error(error).body()))
            break
        size = len(picture)
        await response.write(event(picture))
        # A viewer that reads slowly gets fewer pictures, not a backlog of them.
        await request.writer.drain()


async def buffer(request: web.Request) -> web.Response:
    """POST /v1/streams/{id}/buffer: a client reports how much its reader has read; replaces the estimate."""
    service = request.app[SERVICE]
    with service.bodies.hold() as hold:
        report, _ = await read(request, _REPORTS, _MAX_BODY_BYTES, hold)
    _, stream = _find(service, request.match_info["id"], "id", request[CALLER])
    if math.isnan(stream.rate):
        message = "This stream has no reader to report on; send a consumption_rate, such as auto, with its request."
        raise RequestError("id", message, "no_reader")
    num_tokens = _num_played(report, stream)
    stream.report_played(num_tokens)
    unread = _num_sent(stream) - num_tokens
    return json_response(PlayedReply(id=stream.request_id, played_tokens=num_tokens, unread_tokens=unread))


async def abort(request: web.Request) -> web.Response:
    """POST /abort_request: end a request, wherever it is; its client is told."""
    service = request.app[SERVICE]
    with service.bodies.hold() as hold:
        asked, _ = await read(request, _ABORTS, _MAX_BODY_BYTES, hold)
    group, _ = _find(service, asked.request_id, "request_id", request[CALLER])
    group.abort("The request was aborted by POST /abort_request.", for_good=True)
    return json_response(AbortReply(request_id=asked.request_id))


def _find(service: Service, name: str, param: str, caller: Caller) -> tuple[RequestGroup, RequestStream]:
    """The stream of this id and its group; an answer's id means its first choice.

    Raises ApiError (404) about `param`, also where the caller may not see the stream.
    """
    group = service.find(name, caller)
    if group is not None:
        return group, group.streams[0]
    group = service.find(name.rpartition("-")[0], caller)
    if group is not None:
        for stream in group.streams:
            if stream.request_id == name:
                return group, stream
    message = f"No live stream has the id {name[:100]!r}; it may have ended. See /v1/streams."
    raise ApiError(404, message, param=param, code="stream_not_found")


def pause_before(interval_s: float, num_viewers: int, size: int) -> float:
    """Seconds from one picture of `size` bytes to the next for a viewer that asks for one each `interval_s`."""
    least_s = num_viewers * size / VIEWED_BYTES_PER_S
    return interval_s if least_s <= interval_s else least_s * random.uniform(1.0, 1.5)  # not all at the same time


def _num_sent(stream: RequestStream) -> int:
    """Tokens of the answer that were sent."""
    return stream.num_output_tokens - stream.num_thought_tokens


def _num_played(report: PlayedReport, stream: RequestStream) -> int:
    """Tokens read, of those sent; characters are converted by the answer's own average."""
    given = [value for value in (report.played_tokens, report.played_chars) if value is not None]
    if len(given) != 1 or given[0] < 0:
        message = "give either played_tokens or played_chars, a count of 0 or more since the answer's start"
        raise RequestError("played_chars" if report.played_tokens is None and given else "played_tokens", message)
    sent = _num_sent(stream)
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
    if not _MIN_INTERVAL_S <= interval_s <= _MAX_INTERVAL_S:
        message = f"interval must be seconds between {_MIN_INTERVAL_S} and {_MAX_INTERVAL_S}, got {text[:50]!r}"
        raise RequestError("interval", message)
    return interval_s


register(
    Route(
        "GET",
        "/v1/streams",
        streams,
        "Every live request: its state, its reader's buffer; once, or as a stream of events",
        StreamList,
        chunk=StreamList,
        errors=(400, 503),
        query={"interval": INTERVAL},
    ),
    Route(
        "POST",
        "/v1/streams/{id}/buffer",
        buffer,
        "Report how much of an answer its reader has read",
        PlayedReply,
        PlayedReport,
        errors=(404,),
        is_routine=True,
    ),
    Route(
        "POST",
        "/abort_request",
        abort,
        "End a request that is under way",
        AbortReply,
        AbortBody,
        errors=(404,),
    ),
)
