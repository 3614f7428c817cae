"""The live page at `/`: one static file that talks to this server's own API."""

from __future__ import annotations

from importlib.resources import files

from aiohttp import web

_HEADERS = {
    "Content-Type": "text/html; charset=utf-8",
    # Nothing is loaded from anywhere else, and nobody may frame a page that may hold a key.
    "Content-Security-Policy": "default-src 'none'; connect-src 'self'; style-src 'unsafe-inline';"
    " script-src 'unsafe-inline'; frame-ancestors 'none'; base-uri 'none'; form-action 'none'",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-cache",
}


class Page:
    """Chat at one's own reading speed, and every stream's buffer."""

    def __init__(self) -> None:
        self._html = (files("tfserve.http") / "static" / "index.html").read_bytes()

    async def get(self, _request: web.Request) -> web.Response:
        """GET /."""
        return web.Response(body=self._html, headers=_HEADERS)
