"""The aiohttp application: routes, and what every request passes through (log, errors, keys)."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import re
import time
import uuid
from collections import Counter
from collections.abc import Awaitable, Callable
from functools import cached_property

import msgspec
from aiohttp import HttpVersion11, web
from aiohttp.typedefs import Middleware

import tfserve
from tfserve.errors import TfserveError, failures
from tfserve.http.answer import USAGE
from tfserve.http.chat import ChatEndpoint
from tfserve.http.completions import CompletionEndpoint
from tfserve.http.connections import COMMON_HEADERS, MAX_CONNECTIONS
from tfserve.http.cors import allow_origins
from tfserve.http.endpoint import LOWERED_RATE
from tfserve.http.errors import JSON, ApiError, api_error, too_many
from tfserve.http.hosts import host_check
from tfserve.http.keys import CALLER, peer
from tfserve.http.metrics import CONTENT_TYPE, OTHER
from tfserve.http.openapi import OPEN_PATHS, document
from tfserve.http.page import Page
from tfserve.http.replies import ModelCard, ModelList, Status, Version
from tfserve.http.service import Phase, Service
from tfserve.http.streams import StreamEndpoints, StreamFeed
from tfserve.http.tokens import TokenEndpoints
from tfserve.http.unread import close_unread
from tfserve.types import StreamState, Tenant

log = logging.getLogger(__name__)

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

REQUEST_ID = web.RequestKey("request_id", str)
REQUEST_ID_HEADER = "X-Request-Id"
RATE_HEADER = "X-Consumption-Rate"

SCRAPE_PATIENCE_S = 1.0
"""How long a scrape waits for the engine, which answers between two steps; and for how long its answer does for all."""

CLIENT_GONE = 499
"""nginx's status, in the log only, for a client that went away before its answer was complete."""

_REPORTS = "/v1/streams/{id}/buffer"

_ROUTINE = OPEN_PATHS | {_REPORTS}
"""Requests that come every few seconds for as long as the server, or a stream, lives: logged at debug level."""


def create_app(service: Service, max_connections: int = MAX_CONNECTIONS) -> web.Application:
    """The application for one Service. `connections.create_runner` runs it as it must be run, with `max_connections`.

    Otherwise lost clients go unnoticed and packed bodies cannot be read.
    """
    server = service.config.server
    checks = host_check(server, has_keys=bool(service.keys)), identify(service, max_connections)
    app = web.Application(middlewares=[log_requests, report_errors, *checks], client_max_size=server.max_body_bytes)
    about = AboutEndpoints(service)
    app.router.add_post("/v1/chat/completions", ChatEndpoint(service).post)
    app.router.add_post("/v1/completions", CompletionEndpoint(service).post)
    feed = StreamFeed(service)
    streams = StreamEndpoints(service, feed)
    # No HEAD: a stream of events would have no end and nothing to say.
    app.router.add_get("/v1/streams", streams.list, allow_head=False)
    app.router.add_post(_REPORTS, streams.buffer)
    app.router.add_post("/abort_request", streams.abort)
    app.router.add_get("/", Page().get)
    app.router.add_get("/metrics", MetricsEndpoint(service, feed).get)
    tokens = TokenEndpoints(service)
    app.router.add_post("/tokenize", tokens.tokenize)
    app.router.add_post("/detokenize", tokens.detokenize)
    app.router.add_get("/v1/models", about.models)
    app.router.add_get("/v1/models/{id:.+}", about.model)
    app.router.add_get("/health", about.health)
    app.router.add_get("/ready", about.ready)
    app.router.add_get("/version", about.version)
    app.router.add_get("/openapi.json", about.openapi)
    app.on_response_prepare.append(_tell_client)
    close_unread(app, server.unread_timeout_s, service.metrics.on_unread)
    if server.cors_origins:
        allow_origins(app, server.cors_origins)
    return app


class MetricsEndpoint:
    """What the server counts."""

    def __init__(self, service: Service, feed: StreamFeed) -> None:
        self._service = service
        self._feed = feed
        self._rendering = asyncio.Lock()
        self._begun_s = float("-inf")
        self._body = b""

    async def get(self, _request: web.Request) -> web.Response:
        """GET /metrics, in Prometheus's text format; without the streams' buffers if the engine is slow to tell."""
        asked_s = time.monotonic()
        async with self._rendering:
            # What was begun after this request came is as good as its own.
            if self._begun_s < asked_s:
                self._begun_s = time.monotonic()
                self._body = await self._render()
        return web.Response(body=self._body, headers={"Content-Type": CONTENT_TYPE})

    async def _render(self) -> bytes:
        streams: list[StreamState] = []
        with contextlib.suppress(TimeoutError, TfserveError):
            async with asyncio.timeout(SCRAPE_PATIENCE_S):
                # Scraping needs no key: the engine is asked as often as for one scraper, however many there are.
                streams = (await self._feed.listed(SCRAPE_PATIENCE_S)).data
        return self._service.metrics.render(streams)


class AboutEndpoints:
    """What the server says about itself."""

    def __init__(self, service: Service) -> None:
        self._service = service

    async def models(self, _request: web.Request) -> web.Response:
        """GET /v1/models."""
        return _json(ModelList([self._card()]))

    async def model(self, request: web.Request) -> web.Response:
        """GET /v1/models/{id}; 404 for a model that is not served."""
        card = self._card()
        self._service.check_model(request.match_info["id"])
        return _json(card)

    async def health(self, _request: web.Request) -> web.Response:
        """GET /health: the engine's counts; 503 unless it is loaded, alive and making progress."""
        status, stats = self._service.health()
        return _json(Status(status), 503) if stats is None else _json(Status(status, stats))

    async def ready(self, _request: web.Request) -> web.Response:
        """GET /ready: 503 unless new requests are admitted by an engine that makes progress."""
        status, _ = self._service.health()
        return _json(Status(status), 200 if status == Phase.READY else 503)

    async def version(self, _request: web.Request) -> web.Response:
        """GET /version."""
        return _json(Version(tfserve.__version__))

    async def openapi(self, _request: web.Request) -> web.Response:
        """GET /openapi.json."""
        return web.Response(body=self._document, content_type=JSON)

    @cached_property
    def _document(self) -> bytes:
        service = self._service
        return msgspec.json.encode(document(service.model_name, with_keys=bool(service.keys)))

    def _card(self) -> ModelCard:
        service = self._service
        return ModelCard(service.model_name, service.created, service.engine.info.max_model_len)


def _json(body: object, status: int = 200) -> web.Response:
    return web.Response(status=status, body=msgspec.json.encode(body), content_type=JSON)


@web.middleware
async def log_requests(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Give the request an id and log one line about it when it ends: no prompts, no keys, no query string."""
    given = request.headers.get(REQUEST_ID_HEADER, "")
    request[REQUEST_ID] = given if re.fullmatch(r"[!-~]{1,128}", given) else f"req-{uuid.uuid4().hex}"
    begun = time.monotonic()
    status = 500
    try:
        response = await handler(request)
        status = response.status
        return response
    except asyncio.CancelledError:
        status = CLIENT_GONE
        raise
    except ConnectionError:
        status = CLIENT_GONE
        # Nobody gets this; aiohttp would log a lost connection as an error of ours.
        return web.Response(status=CLIENT_GONE)
    finally:
        usage = request.get(USAGE)
        more = f", {usage.prompt_tokens} + {usage.completion_tokens} tokens" if usage else ""
        if (caller := request.get(CALLER)) and caller.key_name:
            more += f", key {caller.key_name}"
        line = (request[REQUEST_ID], request.method, request.rel_url.raw_path, status, time.monotonic() - begun, more)
        is_routine = getattr(request.match_info.route.resource, "canonical", "") in _ROUTINE
        level = logging.DEBUG if is_routine else logging.INFO
        log.log(level, "%s %s %.200s %d in %.3f s%s", *line)


@web.middleware
async def report_errors(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Turn every exception into OpenAI's error object; a lost client is nobody's error."""
    try:
        return await handler(request)
    except ConnectionError:
        raise
    except failures() as error:
        return api_error(error).response()


def identify(service: Service, max_connections: int) -> Middleware:
    """Middleware that notes the caller, and lets only those with a key pass where there are keys.

    Of several keys none may have all connections: a quarter is left to the others.
    """
    keys = service.keys
    most = max_connections - (max_connections // 4 if len(keys) > 1 else 0)
    held: Counter[Tenant] = Counter()

    @web.middleware
    async def check(request: web.Request, handler: Handler) -> web.StreamResponse:
        if request.path not in OPEN_PATHS:
            caller = keys.find(request.headers.get("Authorization", "")) if keys else peer(request.remote)
            if caller is None:
                service.metrics.on_key_refusal(OTHER, "unauthorized")
                message = "Missing or wrong API key; send it as 'Authorization: Bearer KEY'."
                headers = {"WWW-Authenticate": "Bearer"}
                raise ApiError(401, message, kind="authentication_error", code="invalid_api_key", headers=headers)
            request[CALLER] = caller
            held[caller.tenant] += 1
            try:
                if held[caller.tenant] > most:
                    raise too_many(
                        f"This key has {most} connections, and may have no more.", "too_many_connections", 1.0
                    )
                return await handler(request)
            except ApiError as error:
                if caller.key_name and error.status == 429:
                    service.metrics.on_key_refusal(caller.key_name, error.info.code or "")
                raise
            finally:
                held[caller.tenant] -= 1
                if not held[caller.tenant]:
                    del held[caller.tenant]
        return await handler(request)

    return check


async def _tell_client(request: web.Request, response: web.StreamResponse) -> None:
    """The request's id, what is left of its key's limits, and the rate that counts if another was asked for."""
    if request.version < HttpVersion11 and response.content_length is None:
        # Only the connection's end tells such a client that the answer is complete; the library leaves it open.
        response.force_close()
    response.headers.update(COMMON_HEADERS)
    if request_id := request.get(REQUEST_ID):
        response.headers[REQUEST_ID_HEADER] = request_id
    if caller := request.get(CALLER):
        response.headers.update(caller.limits.headers)
    if (rate := request.get(LOWERED_RATE)) is not None:
        response.headers[RATE_HEADER] = f"{rate:g}"
