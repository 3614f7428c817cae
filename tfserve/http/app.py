"""The aiohttp application: routes, and what every request passes through (log, errors, keys)."""

from __future__ import annotations

import asyncio
import functools
import logging
import re
import time
import uuid
from collections import Counter

import msgspec
from aiohttp import HttpVersion11, web
from aiohttp.typedefs import Handler, Middleware

from tfserve.errors import failures
from tfserve.http import scrape
from tfserve.http.answer import USAGE
from tfserve.http.connections import COMMON_HEADERS, MAX_CONNECTIONS
from tfserve.http.cors import allow_origins
from tfserve.http.endpoint import LOWERED_RATE
from tfserve.http.errors import JSON, ApiError, api_error, too_many
from tfserve.http.feed import FEED, StreamFeed
from tfserve.http.fresh import Fresh
from tfserve.http.hosts import host_check
from tfserve.http.keys import CALLER, peer
from tfserve.http.metrics import OTHER
from tfserve.http.openapi import document
from tfserve.http.routes import OPEN_PATHS, ROUTES
from tfserve.http.scrape import SCRAPES
from tfserve.http.service import SERVICE, Service
from tfserve.http.unread import close_unread
from tfserve.types import Tenant

log = logging.getLogger(__name__)

REQUEST_ID = web.RequestKey("request_id", str)
REQUEST_ID_HEADER = "X-Request-Id"
RATE_HEADER = "X-Consumption-Rate"

CLIENT_GONE = 499
"""nginx's status, in the log only, for a client that went away before its answer was complete."""

_ROUTINE = OPEN_PATHS | {route.canonical for route in ROUTES if route.is_routine}
"""Paths whose requests are logged at debug level."""


def create_app(service: Service, max_connections: int = MAX_CONNECTIONS) -> web.Application:
    """The application for one Service. `connections.create_runner` runs it as it must be run, with `max_connections`.

    Otherwise lost clients go unnoticed and packed bodies cannot be read.
    """
    server = service.config.server
    checks = host_check(server, has_keys=bool(service.keys)), identify(service, max_connections)
    app = web.Application(middlewares=[log_requests, report_errors, *checks], client_max_size=server.max_body_bytes)
    app[SERVICE] = service
    app[FEED] = feed = StreamFeed(service)
    app[SCRAPES] = Fresh(functools.partial(scrape.render, service, feed))
    for route in ROUTES:
        app.router.add_route(route.method, route.path, route.handler)
        if route.method == "GET" and route.chunk is None:  # a stream of events has no end, and HEAD shows none of it
            app.router.add_route("HEAD", route.path, route.handler)
    app.router.add_get("/openapi.json", _openapi(service))
    app.on_response_prepare.append(_tell_client)
    close_unread(app, server.unread_timeout_s, service.metrics.on_unread)
    if server.cors_origins:
        allow_origins(app, server.cors_origins)
    return app


def _openapi(service: Service) -> Handler:
    """The handler of GET /openapi.json, which is no part of the document that it answers with."""

    @functools.cache
    def described() -> bytes:
        return msgspec.json.encode(document(service.model_name, with_keys=bool(service.keys)))

    async def openapi(_request: web.Request) -> web.Response:
        return web.Response(body=described(), content_type=JSON)

    return openapi


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
        # The client is gone; aiohttp would log a lost connection as an error of ours.
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
    """Turn every exception into OpenAI's error object; a lost client is no error."""
    try:
        return await handler(request)
    except ConnectionError:
        raise
    except failures() as error:
        return api_error(error).response()


def identify(service: Service, max_connections: int) -> Middleware:
    """Middleware that notes the caller. Where the server has keys, a request without one is refused.

    Where it has several, each may use three quarters of the connections at most.
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
