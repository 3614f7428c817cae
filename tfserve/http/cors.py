"""Cross-origin requests: which web pages of other sites may call this server from a browser. None unless configured."""

from __future__ import annotations

from collections.abc import Sequence

from aiohttp import web
from aiohttp.typedefs import Handler

from tfserve.http.routes import ROUTES

_METHODS = (*sorted({route.method for route in ROUTES}), "OPTIONS")
_ALLOWED = {"Access-Control-Allow-Methods": ", ".join(_METHODS), "Access-Control-Max-Age": "600"}

_LIMITS = (f"x-ratelimit-{what}-{of}" for of in ("requests", "tokens") for what in ("limit", "remaining", "reset"))
_READABLE = ", ".join(("Retry-After", "X-Consumption-Rate", "X-Request-Id", "X-Should-Retry", *_LIMITS))
"""Headers of ours that a page's script may read."""


def allow_origins(app: web.Application, origins: Sequence[str]) -> None:
    """Let pages of these origins ("*": any) call `app`, and answer the browsers' questions before they do."""
    allowed = frozenset(origins)

    def origin_of(request: web.Request) -> str | None:
        origin = request.headers.get("Origin")
        return origin if origin is not None and (origin in allowed or "*" in allowed) else None

    async def mark(request: web.Request, response: web.StreamResponse) -> None:
        if (origin := origin_of(request)) is not None:
            response.headers["Access-Control-Allow-Origin"] = origin
            response.headers["Access-Control-Expose-Headers"] = _READABLE
        response.headers.add("Vary", "Origin")

    @web.middleware
    async def preflight(request: web.Request, handler: Handler) -> web.StreamResponse:
        asks = request.method == "OPTIONS" and "Access-Control-Request-Method" in request.headers
        if asks and origin_of(request) is not None:
            # All headers are allowed: OpenAI's client for browsers sends a dozen of its own.
            asked = request.headers.get("Access-Control-Request-Headers", "")
            return web.Response(status=204, headers={**_ALLOWED, "Access-Control-Allow-Headers": asked})
        return await handler(request)

    app.middlewares.insert(0, preflight)
    app.on_response_prepare.append(mark)
