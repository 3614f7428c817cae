"""The live page at `/`: one static answer that talks to this server's own API."""

from __future__ import annotations

import base64
import functools
import hashlib
from importlib.resources import files

from aiohttp import web

from tfserve.http.route import Route, register


async def page(_request: web.Request) -> web.Response:
    """GET /: chat at one's own reading speed, and every stream's buffer; three files, sent as one."""
    html, headers = _built()
    return web.Response(body=html, headers=headers)


@functools.cache
def _built() -> tuple[bytes, dict[str, str]]:
    """The page and its headers."""
    folder = files("tfserve.http") / "static"
    html, css, js = ((folder / name).read_bytes() for name in ("index.html", "page.css", "page.js"))
    headers = {
        "Content-Type": "text/html; charset=utf-8",
        # The page loads nothing from anywhere else and runs only these two; it may hold a key, so no other page may
        # frame it. The icon is a data: address.
        "Content-Security-Policy": f"default-src 'none'; connect-src 'self'; img-src data:;"
        f" style-src '{_digest(css)}'; script-src '{_digest(js)}';"
        " frame-ancestors 'none'; base-uri 'none'; form-action 'none'",
        "Referrer-Policy": "no-referrer",
        "Cache-Control": "no-cache",
    }
    return html.replace(b"{css}", css).replace(b"{js}", js), headers


def _digest(source: bytes) -> str:
    """How a content security policy names a script or a style sheet inside the page."""
    return "sha256-" + base64.b64encode(hashlib.sha256(source).digest()).decode()


register(Route("GET", "/", page, "A page to chat with and to watch every stream on", "text/html", is_open=True))
