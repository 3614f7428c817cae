"""What a server needs of the operating system before it serves: listening sockets, and descriptors for connections."""

from __future__ import annotations

import asyncio
import errno
import logging
import resource
import socket
from typing import Any

from aiohttp import web

from tfserve.errors import ConfigError
from tfserve.http.seldom import SeldomLog

log = logging.getLogger(__name__)

BACKLOG = 1024
"""Connections the kernel may hold for us while the event loop is busy."""

ACCEPTED_AT_ONCE = 64
"""Connections taken from a listening socket before any of them is looked at, and one too many closed."""

OTHER_DESCRIPTORS = 512
"""Descriptors beside those of connections with requests: spare connections, two rounds of accepting, files, pipes."""

_NO_FAMILY = frozenset({errno.EAFNOSUPPORT, errno.EADDRNOTAVAIL})
"""What a name's IPv6 address meets where that is switched off; its IPv4 address will do."""

_EXHAUSTED = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM})


def allow_connections(wanted: int) -> int:
    """How many connections may have a request under way: `wanted`, or what the limit of open files leaves room for.

    Raises the process's soft limit as far as that needs.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = wanted + OTHER_DESCRIPTORS
    if soft == resource.RLIM_INFINITY or soft >= needed:
        return wanted
    reachable = needed if hard == resource.RLIM_INFINITY else min(needed, hard)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, reachable), hard))
    except (ValueError, OSError):  # macOS has another limit behind this one
        reachable = soft
    allowed = min(wanted, max(reachable - OTHER_DESCRIPTORS, reachable // 8))
    if allowed < wanted:
        log.warning(
            "Only %d connections at once, not %d: the limit of open files is %d (ulimit -Hn)",
            allowed,
            wanted,
            reachable,
        )
    return allowed


def quiet_exhaustion(loop: asyncio.AbstractEventLoop) -> None:
    """Have the loop log a line now and then while the machine has no descriptors or memory for a connection.

    Its default is a traceback for each attempt, thousands a second.
    """
    seldom = SeldomLog(log)

    def handle(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        error = context.get("exception")
        if isinstance(error, OSError) and error.errno in _EXHAUSTED:
            seldom.warning("Connections cannot be accepted now: %s", error.strerror)
        else:
            loop.default_exception_handler(context)

    loop.set_exception_handler(handle)


async def listen(runner: web.AppRunner, host: str, port: int) -> None:
    """Have `runner` serve all addresses of `host`; "::" is both families, where the machine can. Raises ConfigError."""
    try:
        for listening in _open(host, port):
            await web.SockSite(runner, listening, backlog=ACCEPTED_AT_ONCE).start()
            listening.listen(BACKLOG)  # the loop has taken ACCEPTED_AT_ONCE for this, too
    except (OSError, UnicodeError) as error:
        if isinstance(error, OSError) and error.errno == errno.EADDRINUSE:
            wish = "is in use; stop the program that uses it or choose another port"
            raise ConfigError("server.port", f"port {port} on {host} {wish}") from None
        reason = (error.strerror if isinstance(error, OSError) else None) or str(error)
        raise ConfigError("server.host", f"cannot listen on {host} port {port}: {reason}") from None


def _open(host: str, port: int) -> list[socket.socket]:
    """A bound socket for each address. Raises OSError, UnicodeError."""
    if host == "::" and socket.has_dualstack_ipv6():
        return [socket.create_server((host, port), family=socket.AF_INET6, dualstack_ipv6=True)]
    found = socket.getaddrinfo(host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    addresses = {(family, address) for family, _, _, _, address in found}
    opened: list[socket.socket] = []
    failure = OSError(errno.EADDRNOTAVAIL, "it has no address")
    for family, address in sorted(addresses, key=lambda one: one[0]):
        try:
            opened.append(socket.create_server(address, family=family))  # an IPv6 one takes that family only
        except OSError as error:
            failure = error
            if error.errno not in _NO_FAMILY:
                break
    if not opened or failure.errno not in _NO_FAMILY:
        for each in opened:
            each.close()
        raise failure
    if host == "::":
        log.warning("Listening on IPv6 only: this machine cannot serve both families on one socket")
    return opened
