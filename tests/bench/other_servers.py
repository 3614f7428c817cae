"""A server without an HTTP library: a test decides the bytes of its answers and how it ends connections."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

Answer = Callable[[dict[str, Any]], bytes]
"""From a request's body to the bytes of its whole response."""


@dataclass
class RawServer:
    """`answer` makes every response; connections are closed after it unless it `keeps` them, whatever it says."""

    answer: Answer
    keeps: bool = False
    models: bytes = b"HTTP/1.1 404 Not Found\r\nContent-Length: 2\r\nConnection: close\r\n\r\n{}"
    url: str = ""
    bodies: list[dict[str, Any]] = field(default_factory=list)
    paths: list[str] = field(default_factory=list)

    async def handle(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
                method, path, _ = head.split(" ", 2)
                lengths = [line for line in head.lower().splitlines() if line.startswith("content-length:")]
                raw = await reader.readexactly(int(lengths[0].split(":")[1])) if lengths else b""
                self.paths.append(path)
                if method == "GET":
                    writer.write(self.models)
                else:
                    self.bodies.append(json.loads(raw))
                    writer.write(self.answer(self.bodies[-1]))
                await writer.drain()
                if not self.keeps:
                    break
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()


@asynccontextmanager
async def serving_raw(server: RawServer) -> AsyncIterator[RawServer]:
    listener = await asyncio.start_server(server.handle, "127.0.0.1", 0)
    server.url = f"http://127.0.0.1:{listener.sockets[0].getsockname()[1]}"
    try:
        yield server
    finally:
        listener.close()


def head(status: str = "200 OK", *headers: str, version: str = "1.1", kind: str = "text/event-stream") -> bytes:
    return "\r\n".join([f"HTTP/{version} {status}", f"Content-Type: {kind}", *headers, "", ""]).encode()


def chunked(*parts: bytes, ended: bool = True) -> bytes:
    return b"".join(b"%x\r\n%b\r\n" % (len(part), part) for part in parts) + (b"0\r\n\r\n" if ended else b"")
