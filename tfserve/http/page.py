"""The live page at `/`: one static answer that talks to this server's own API."""

from __future__ import annotations

import base64
import hashlib
from importlib.resources import files

from aiohttp import web


class Page:
    """Chat at one's own reading speed, and every stream's buffer: three files, sent as one."""

    def __init__(self) -> None:
        folder = files("tfserve.http") / "static"
        html, css, js = ((folder / name).read_bytes() for name in ("index.html", "page.css", "page.js"))
        self._html = html.replace(b"{css}", css).replace(b"{js}", js)
        self._headers = {
            "Content-Type": "text/html; charset=utf-8",
            # Nothing is loaded from anywhere else, nothing but these two runs, and nobody may frame a page that may
            # hold a key. The icon is a data: address.
            "Content-Security-Policy": f"default-src 'none'; connect-src 'self'; img-src data:;"
            f" style-src '{_digest(css)}'; script-src '{_digest(js)}';"
            " frame-ancestors 'none'; base-uri 'none'; form-action 'none'",
            "Referrer-Policy": "no-referrer",
            "Cache-Control": "no-cache",
        }

    async def get(self, _request: web.Request) -> web.Response:
        """GET /."""
        return web.Response(body=self._html, headers=self._headers)


def _digest(source: bytes) -> str:
    """How a content security policy names a script or a style sheet inside the page."""
    return "sha256-" + base64.b64encode(hashlib.sha256(source).digest()).decode()
