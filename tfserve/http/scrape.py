"""GET /metrics: what the server counts, in Prometheus's text format."""

from __future__ import annotations

import asyncio
import contextlib

from aiohttp import web

from tfserve.errors import TfserveError
from tfserve.http.feed import StreamFeed
from tfserve.http.fresh import Fresh
from tfserve.http.metrics import CONTENT_TYPE
from tfserve.http.route import Route, register
from tfserve.http.service import Service
from tfserve.types import StreamState

SCRAPE_PATIENCE_S = 1.0
"""How long a scrape waits for the engine, which answers between two steps; and for how long its answer does for all."""

SCRAPES = web.AppKey("scrapes", Fresh[bytes])
"""What Prometheus gets, made by `render`."""


async def render(service: Service, feed: StreamFeed) -> bytes:
    """All metrics; without the streams' buffers if the engine is slow to tell."""
    streams: list[StreamState] = []
    with contextlib.suppress(TimeoutError, TfserveError):
        async with asyncio.timeout(SCRAPE_PATIENCE_S):
            # Scraping needs no key: the engine is asked as often as for one scraper, however many there are.
            streams = (await feed.listed(SCRAPE_PATIENCE_S)).data
    return service.metrics.render(streams)


async def metrics(request: web.Request) -> web.Response:
    """GET /metrics."""
    return web.Response(body=await request.app[SCRAPES].get(), headers={"Content-Type": CONTENT_TYPE})


register(Route("GET", "/metrics", metrics, "What the server counts, for Prometheus", "text/plain", is_open=True))
