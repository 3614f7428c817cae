"""From the bytes of a request's body to a Struct, in bounded time and memory."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator

from aiohttp import StreamReader, http_exceptions, web

from tfserve.http.bodies import BodyHold
from tfserve.http.errors import JSON, ApiError
from tfserve.http.keys import CALLER
from tfserve.http.off_loop import off_loop
from tfserve.http.packing import packing_of, unpacked
from tfserve.http.parsing import Body, BodyParser
from tfserve.http.parts import PART_BYTES, num_parts
from tfserve.http.service import SERVICE

BODY_TIMEOUT_S = 60.0
"""How long a client has to send its request's body."""

BODY_ERRORS = (400, 408, 413, 415, 503)
"""Statuses of every endpoint that reads a body."""

ASKED_ERRORS = (404, 429)
"""Further statuses of an endpoint that reads its body by `asked_of`."""

_FEW_PARTS = 1000
"""Parts of a body that need not be counted exactly."""


@contextlib.asynccontextmanager
async def asked_of(request: web.Request, parser: BodyParser[Body]) -> AsyncIterator[tuple[Body, int]]:
    """The body of a request for the model, and its size in bytes; the body's memory stays counted within the block.

    The request counts towards the limits of its key. A body that names a `model` must name the one that is served.
    Raises as `read`; ApiError for a key beyond its limits (429) and for another model (404).
    """
    service = request.app[SERVICE]
    request[CALLER].limits.on_request()
    with service.bodies.hold() as hold:
        asked, size = await read(request, parser, service.config.server.max_body_bytes, hold)
        service.check_model(getattr(asked, "model", None))
        yield asked, size


async def read(request: web.Request, parser: BodyParser[Body], max_bytes: int, hold: BodyHold) -> tuple[Body, int]:
    """The body and its size in bytes. Raises as `read_body` and `BodyParser.parse`."""
    data = await read_body(request, max_bytes, hold)
    return await off_loop(len(data), parser.parse, data), len(data)


async def read_body(request: web.Request, max_bytes: int, hold: BodyHold) -> bytes:
    """The whole body, unpacked, counted in `hold` with what it will take as objects.

    Raises ApiError for one that is too large (413), too slow (408), or broken (400), and where too many are being read
    (503). A body that says it is too large, or is packed in an unknown way (415), is not read at all. One that a web
    page sends must be called JSON (else 415): any site's page may send text, but before JSON browsers ask whether it
    may (http/cors.py).
    """
    if "Origin" in request.headers and request.content_type != JSON:
        message = f"A web page's request must have the Content-Type {JSON}."
        raise ApiError(415, message, code="unsupported_media_type")
    packing = packing_of(request.headers.get("Content-Encoding", ""))
    body: bytes | None = None
    try:
        if (request.content_length or 0) <= max_bytes:
            async with hold.reading(BODY_TIMEOUT_S):
                body = await _all_bytes(request.content, max_bytes, hold)
    except TimeoutError:
        message = f"The body did not come within {BODY_TIMEOUT_S:.0f} s."
        raise ApiError(408, message, code="body_timeout", headers={"Connection": "close"}) from None
    except (web.RequestPayloadError, http_exceptions.PayloadEncodingError):
        message = "The body cannot be read; it does not come as its headers say."
        raise ApiError(400, message, code="invalid_body", headers={"Connection": "close"}) from None
    if body is not None and packing is not None:
        body = await unpacked(body, packing, max_bytes, hold)
    if body is None:
        message = f"The body is larger than {max_bytes} bytes, this server's limit (server.max_body_bytes)."
        raise ApiError(413, message, code="body_too_large")
    hold.resize(len(body) + PART_BYTES * await off_loop(len(body), num_parts, body, _FEW_PARTS))
    return body


async def _all_bytes(content: StreamReader, max_bytes: int, hold: BodyHold) -> bytes | None:
    """What comes until the end; None if it is more than `max_bytes`.

    aiohttp's own `Request.read` would keep the bytes for as long as the answer takes.
    """
    body = bytearray()
    while chunk := await content.readany():
        body += chunk
        if len(body) > max_bytes:
            return None
        hold.resize(len(body))
    return bytes(body)
