"""Which names a server answers to: a web page whose name is made to point here (DNS rebinding) may not call it."""

from __future__ import annotations

import ipaddress
import re

from aiohttp import web
from aiohttp.typedefs import Handler, Middleware

from tfserve.config import ServerConfig
from tfserve.http.errors import ApiError

_NO_PUBLIC_NAMES = ("localhost", "internal")
"""Names, and ends of names, that the public DNS never has: no page comes from them (RFC 6761; ICANN, 2024)."""

_HOST = re.compile(r"(?:\[([0-9a-fA-F:.]+)\]|([^][:/?#@\\%\s]*))(?::[0-9]*)?")
"""A name or an address, and a port: nothing from which another part of it could be taken for the name."""


def host_check(server: ServerConfig, *, has_keys: bool) -> Middleware:
    """Middleware that refuses requests to names which are not this server's (421).

    It does so where `allowed_hosts` names some, and, without keys, on a loopback address: only there does being local
    stand for being allowed. An address instead of a name is always right: no page's name is one.
    """
    is_local = not has_keys and _is_loopback(server.host)
    names = {_bare(name) for name in (server.host, *server.allowed_hosts)}
    is_checked = bool(server.allowed_hosts or is_local) and "*" not in names

    def is_right(name: str) -> bool:
        return not name or name in names or _is_address(name) or name.rpartition(".")[2] in _NO_PUBLIC_NAMES

    @web.middleware
    async def check(request: web.Request, handler: Handler) -> web.StreamResponse:
        if is_checked:
            host = request.headers.get("Host", "")
            parts = _HOST.fullmatch(host)
            if parts is None or not is_right(_bare(parts[1] or parts[2])):
                message = f"This server is not called {host[:100]!r}; add the name to server.allowed_hosts."
                raise ApiError(421, message, code="host_not_allowed")
        return await handler(request)

    return check


def _bare(name: str) -> str:
    """A name as it is compared: DNS knows no case, and a last dot only ends it."""
    return name.strip().lower().removesuffix(".")


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def _is_loopback(host: str) -> bool:
    return _bare(host) == "localhost" or (_is_address(host) and ipaddress.ip_address(host).is_loopback)
