"""The connections of a server: how many there may be, how long they may idle, what is logged of them."""

from __future__ import annotations

import logging
from typing import Any

from aiohttp import http_exceptions, web

from tfserve.http.errors import ApiError, unavailable
from tfserve.http.routes import OPEN_PATHS
from tfserve.http.seldom import SeldomLog

log = logging.getLogger(__name__)

IDLE_TIMEOUT_S = 75.0
"""How long a connection may take to send its first request's head, or to begin the next request.

Longer than the 60 s after which common proxies leave connections; aiohttp's own is an hour.
"""

MAX_CONNECTIONS = 4096
"""How many connections may have a request under way, where no setting says it."""

SPARE_CONNECTIONS = 64
"""Connections beyond those, for probes."""

READ_BYTES = 16 * 1024
"""What is read from a connection at once. Made of chunks of one byte each, this much takes the parser 10 ms."""

COMMON_HEADERS = {
    "Server": "tfserve",
    "X-Content-Type-Options": "nosniff",  # browsers show only text/html as a page
}
"""What every answer has. The library's own `Server` names versions."""


def create_runner(
    app: web.Application,
    *,
    shutdown_timeout_s: float,
    idle_timeout_s: float = IDLE_TIMEOUT_S,
    max_connections: int = MAX_CONNECTIONS,
) -> web.AppRunner:
    """A runner for `app` whose lost clients end their requests, and whose log quotes no request.

    A request beyond `max_connections` is answered 503 unless it is a probe's. A connection beyond the spare ones closes
    the connection that has been idle for longest.
    """
    log.addFilter(_without_quotes)
    return _Runner(
        app,
        max_connections,
        handler_cancellation=True,
        access_log=None,
        shutdown_timeout=shutdown_timeout_s,
        keepalive_timeout=idle_timeout_s,
        logger=log,
        # aiohttp answers an encoding that it does not know itself, not in the API's words (http/packing.py).
        auto_decompress=False,
    )


class _Runner(web.AppRunner):
    """Serves an application by Connections."""

    def __init__(self, app: web.Application, max_connections: int, **options: Any) -> None:
        super().__init__(app, **options)
        self._max_connections = max_connections

    async def _make_server(self) -> web.Server:
        return Connections(await super()._make_server(), self._max_connections, self._kwargs)


class Connections(web.Server):
    """All connections. A busy one has a request under way; an idle one waits for a request's head."""

    def __init__(self, server: web.Server, most: int, options: dict[str, Any]) -> None:
        """`most` may have a request under way. `server` has the application; `options` are those of RequestHandler."""
        super().__init__(
            self._serve, request_factory=server.request_factory, handler_cancellation=server.handler_cancellation
        )
        self._app_handler = server.request_handler
        self._options = {name: value for name, value in options.items() if name != "handler_cancellation"}
        self._most = most
        self._idle: dict[web.RequestHandler, None] = {}  # idle for longest first
        self._busy: set[web.RequestHandler] = set()
        self._refusals = SeldomLog(log)

    def __call__(self) -> web.RequestHandler:
        """The protocol of a new connection."""
        return _Connection(self, loop=self._loop, **self._options)

    def connection_made(self, handler: web.RequestHandler, transport: Any) -> None:
        """Count a new connection. If there are too many, the one that has been idle for longest is closed."""
        super().connection_made(handler, transport)
        transport.max_size = READ_BYTES  # asyncio's own name, and 256 KiB
        self._idle[handler] = None
        if len(self._idle) + len(self._busy) > self._most + SPARE_CONNECTIONS:
            oldest = next(iter(self._idle))
            del self._idle[oldest]
            oldest.force_close()

    def connection_lost(self, handler: web.RequestHandler, exc: BaseException | None = None) -> None:
        """A connection has gone."""
        super().connection_lost(handler, exc)
        self._idle.pop(handler, None)
        self._busy.discard(handler)

    def rest(self, handler: web.RequestHandler) -> None:
        """An answer is complete; the connection waits for the next request."""
        if handler in self._busy:
            self._busy.discard(handler)
            self._idle[handler] = None

    async def _serve(self, request: web.BaseRequest) -> web.StreamResponse:
        self._idle.pop(request.protocol, None)
        self._busy.add(request.protocol)
        is_spare = len(self._busy) > self._most
        if is_spare and request.path not in OPEN_PATHS:
            self._refusals.warning("Refusing requests: %d are under way (server.max_connections)", self._most)
            message = "This server has as many connections as it can serve; try again soon."
            return _refusal(unavailable(message, "too_many_connections", retry_after_s=1))
        # The library would answer this itself, in its own words, before any middleware runs.
        expected = request.headers.get("Expect", "")
        if expected and expected.lower() != "100-continue" and request.version >= (1, 1):
            message = "The only expectation that can be met is 'Expect: 100-continue'."
            return _refusal(ApiError(417, message, code="expectation_failed"))
        response = await self._app_handler(request)
        if is_spare:  # a client that asks again and again, and reads nothing, would keep probes out
            response.force_close()
        return response


class _Connection(web.RequestHandler):
    """One connection. What cannot be read as HTTP is answered as every other error is."""

    __slots__ = ("_connections",)

    def __init__(self, connections: Connections, **options: Any) -> None:
        super().__init__(connections, **options)
        self._connections = connections

    async def finish_response(
        self, request: web.BaseRequest, resp: web.StreamResponse, start_time: float | None
    ) -> tuple[web.StreamResponse, bool]:
        """Send an answer, or the rest of it."""
        try:
            return await super().finish_response(request, resp, start_time)
        finally:
            self._connections.rest(self)

    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,  # noqa: ARG002 - the library's words, which quote
    ) -> web.StreamResponse:
        """The answer to bytes that are no HTTP (400), or to a request on which something outside the app failed."""
        self.log_exception("Error handling request from %s", request.remote, exc_info=exc)
        if request.writer.output_size > 0:
            raise ConnectionError("an answer has begun, there is no place for an error")
        if isinstance(exc, http_exceptions.HttpProcessingError):
            return _refusal(ApiError(status, _reason(exc), code="invalid_http"))
        return _refusal(
            ApiError(status, "Internal server error; the server's log has the details.", kind="server_error")
        )


def _refusal(error: ApiError) -> web.Response:
    """The last answer on a connection that the application has no part in."""
    response = error.response()
    response.headers.update(COMMON_HEADERS)
    response.force_close()
    return response


def _reason(error: http_exceptions.HttpProcessingError) -> str:
    """What is wrong with a request's framing, without the bytes that the library quotes."""
    if isinstance(error, http_exceptions.LineTooLong):
        return "A line of the request's head is too long; addresses and headers may have 8190 bytes each."
    if isinstance(error, http_exceptions.InvalidURLError):
        return "The request's address is no valid URL."
    words = error.message.partition("\n\n")[0].replace("\n", " ").strip(" :")
    return f"The request is not valid HTTP: {words}."


def _without_quotes(record: logging.LogRecord) -> bool:
    """Tell of bytes that are no HTTP by the error's name: its words quote them.

    They may be a header with a key in it, or the rest of a prompt that is longer than its Content-Length says.
    """
    error = record.exc_info[1] if record.exc_info else None
    if isinstance(error, http_exceptions.HttpProcessingError):
        record.msg, record.args = f"{record.getMessage()}: {type(error).__name__}", ()
        record.exc_info = None
        record.levelno, record.levelname = logging.INFO, "INFO"
    return True
