"""Connections whose client takes nothing of its answer any more are closed, which frees the memory they hold."""

from __future__ import annotations

import asyncio
import logging
import socket
import sys
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from weakref import WeakKeyDictionary

from aiohttp import web

log = logging.getLogger(__name__)

_LOOKS = 8
"""How often a connection is looked at in the time it has."""

MAX_UNSENT_BYTES = 2**30
"""What all connections may hold unsent. Beyond that, a stalled connection is closed before its whole time is over."""

STALLED_S = 5.0
"""How long a connection must have taken nothing to be closed for the sake of memory."""

_PRESSED_S = 1.0
"""How often what is unsent is added up."""

_BYTES_ACKED = slice(120, 128)
"""Where `tcpi_bytes_acked`, 64 bits, is in Linux's struct tcp_info (linux/tcp.h)."""


def close_unread(app: web.Application, timeout_s: float, on_close: Callable[[], None]) -> None:
    """Have `app` close connections that hold unsent bytes and whose client has taken none for `timeout_s` (0: never).

    What a client takes is what its system acknowledges: one that reads slowly goes on. The system tells of no single
    bytes, though: with full buffers, a reader is heard of each time it has read about 1/16 of them, or a whole segment.
    While all together hold more than MAX_UNSENT_BYTES, stalled connections are closed.
    A request whose connection is closed ends as if its client had gone. `on_close` is called for each.
    """
    watch = _Watch(timeout_s, on_close)

    async def watching(_app: web.Application) -> AsyncIterator[None]:
        task = asyncio.ensure_future(watch.run())
        yield
        task.cancel()

    if timeout_s > 0:
        app.on_response_prepare.append(watch.note)
        app.cleanup_ctx.append(watching)


@dataclass(slots=True)
class _Seen:
    """How far a connection's client had come when it was looked at last, and since when it has not come further."""

    mark: tuple[int, int] | None
    since_s: float


class _Watch:
    def __init__(self, timeout_s: float, on_close: Callable[[], None]) -> None:
        self._timeout_s = timeout_s
        self._on_close = on_close
        self._seen: WeakKeyDictionary[asyncio.Transport, _Seen] = WeakKeyDictionary()

    async def note(self, request: web.Request, _response: web.StreamResponse) -> None:
        """An answer begins: look after its connection."""
        if request.transport is not None:
            self._seen.setdefault(request.transport, _Seen(None, 0.0))

    async def run(self) -> None:
        """Look at all connections again and again."""
        due_s = 0.0
        while True:
            await asyncio.sleep(min(self._timeout_s / _LOOKS, _PRESSED_S))
            now_s = asyncio.get_running_loop().time()
            excess = sum(transport.get_write_buffer_size() for transport in self._seen) - MAX_UNSENT_BYTES
            if excess > 0 or now_s >= due_s:
                due_s = now_s + self._timeout_s / _LOOKS
                self._look_at_all(now_s, excess)

    def _look_at_all(self, now_s: float, excess: int) -> None:
        for transport, seen in list(self._seen.items()):
            num_unsent = transport.get_write_buffer_size()
            if self._is_over(transport, num_unsent, seen, now_s, STALLED_S if excess > 0 else self._timeout_s):
                excess -= num_unsent
                del self._seen[transport]
                self._on_close()
                peer = transport.get_extra_info("peername")
                log.warning(
                    "%s has read nothing for %g s (server.unread_timeout_s): closed", peer, now_s - seen.since_s
                )
                transport.abort()

    def _is_over(
        self, transport: asyncio.Transport, num_unsent: int, seen: _Seen, now_s: float, patience_s: float
    ) -> bool:
        """Take note of how far a client has come; true if it has not come further for longer than `patience_s`."""
        # Beside what is acknowledged, for systems that do not tell it: a full connection is not written to.
        mark = (_bytes_acked(transport), num_unsent) if num_unsent else None
        if mark is None or mark != seen.mark:
            seen.mark, seen.since_s = mark, now_s
            return False
        return now_s - seen.since_s >= min(patience_s, self._timeout_s)


def _bytes_acked(transport: asyncio.Transport) -> int:
    """How much the other end has acknowledged so far; 0 on systems that do not tell: then unsent bytes must do."""
    if sys.platform != "linux" or not hasattr(socket, "TCP_INFO"):
        return 0
    info = transport.get_extra_info("socket").getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _BYTES_ACKED.stop)
    return int.from_bytes(info[_BYTES_ACKED], sys.byteorder)
