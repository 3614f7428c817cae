"""Engines that stop, clients that open connections without end, signals: the HTTP side answers and ends when told."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import aiohttp
import psutil
import pytest
from aiohttp import web

from tests.http.conftest import StartServer
from tests.http.test_server import Launch, ServerProcess, launch
from tests.serving import Server
from tests.tokenizers import write_tiny_tokenizer
from tfserve.http.connections import READ_BYTES

__all__ = ["launch"]

LARGE: dict[str, Any] = {
    "prompt": [7] * 500,
    "max_tokens": 2,
    "stop": [f"{number:03}".ljust(256, "x") for number in range(64)],
}
"""16 KiB on their way to the engine: some dozens are more than a socket holds."""

NUM_LARGE = 60


@pytest.fixture
def server(tiny_qwen25: Path, tmp_path: Path, heeded_signals: None) -> Iterator[Server]:
    write_tiny_tokenizer(tiny_qwen25)
    with Server(tiny_qwen25, tmp_path / "log", "--server.drain_timeout", "0.5") as server:
        server.wait_until_ready()
        engine = server.engine()
        yield server
        # One that is stopped does not see its front's end.
        with contextlib.suppress(psutil.NoSuchProcess):
            engine.kill()


async def ask(session: aiohttp.ClientSession, server: Server) -> int:
    async with session.post(server.url + "/v1/completions", json=LARGE) as response:
        await response.read()
        return response.status


async def status_of(session: aiohttp.ClientSession, url: str) -> int:
    async with session.get(url) as response:
        return response.status


async def test_requests_to_a_stopped_engine_do_not_stop_the_http_side_and_are_answered_once_it_goes_on(
    server: Server,
) -> None:
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(60)) as session:
        server.engine().suspend()
        asking = [asyncio.ensure_future(ask(session, server)) for _ in range(NUM_LARGE)]
        deadline = time.monotonic() + 1
        while time.monotonic() < deadline:
            for path in ("/health", "/ready", "/metrics", "/v1/models"):
                assert await asyncio.wait_for(status_of(session, server.url + path), 5) == 200
        assert not any(each.done() for each in asking)
        # Requests whose client leaves while the engine stands still are gone when it goes on.
        for each in asking[:10]:
            each.cancel()
        server.engine().resume()
        assert await asyncio.gather(*asking[10:]) == [200] * (NUM_LARGE - 10)
        async with session.get(server.url + "/v1/streams") as response:
            assert (await response.json())["data"] == []


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
async def test_a_server_whose_engine_is_stopped_ends_when_told(server: Server, number: signal.Signals) -> None:
    engine = server.engine()
    async with aiohttp.ClientSession() as session:
        engine.suspend()
        asking = [asyncio.ensure_future(ask(session, server)) for _ in range(NUM_LARGE)]
        await asyncio.sleep(1)
        server.process.send_signal(number)
        assert await server.exit_code() == 0
        assert set(await asyncio.gather(*asking)) == {503}
    assert not engine.is_running()


class Flood(threading.Thread):
    """Opens connections that say nothing, again and again, and keeps them."""

    def __init__(self, port: int, count: int) -> None:
        super().__init__(daemon=True)
        self._port, self._count = port, count
        self._opened: list[socket.socket] = []

    def run(self) -> None:
        for _ in range(self._count):
            with contextlib.suppress(OSError):
                self._opened.append(socket.create_connection(("127.0.0.1", self._port), timeout=5))

    def close(self) -> None:
        for each in self._opened:
            each.close()


@pytest.mark.parametrize(
    ("settings", "launcher"),
    [
        (["server.max_connections=20"], []),
        ([], ["bash", "-c", 'ulimit -n 256; exec "$0" "$@"']),
    ],
    ids=["setting", "descriptors"],
)
def test_connections_without_end_take_neither_the_descriptors_nor_the_log(
    launch: Launch, settings: list[str], launcher: list[str]
) -> None:
    server: ServerProcess = launch("FakeEngine", *settings, launcher=launcher)
    server.wait_until_ready()
    flood = Flood(server.port, 800)
    with server.open_stream() as stream:
        flood.start()
        while flood.is_alive():
            for path in ("/health", "/ready", "/v1/models"):
                # Among so many, one may come at a bad moment and is closed; the next is served.
                with contextlib.suppress(urllib.error.URLError, ConnectionError):
                    assert server.get(path)[0] == 200
        assert server.get("/health")[0] == 200
        assert b"[DONE]" in stream.read()
    flood.close()
    server.process.terminate()
    code, _, log = server.end()
    assert code == 0
    assert "Traceback" not in log
    assert len([line for line in log.splitlines() if "GET" not in line and "POST" not in line]) < 10


def test_those_who_ask_what_needs_no_key_and_read_nothing_keep_no_probe_out(launch: Launch) -> None:
    server: ServerProcess = launch("FakeEngine", "server.max_connections=20")
    server.wait_until_ready()
    asking = b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n" * 1000
    opened: list[socket.socket] = []
    for _ in range(200):
        client = socket.socket()
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.connect(("127.0.0.1", server.port))
        client.setblocking(False)
        with contextlib.suppress(OSError):
            client.send(asking)
        opened.append(client)
    deadline = time.monotonic() + 10
    answered = 0
    while answered < 5 and time.monotonic() < deadline:
        with contextlib.suppress(OSError):
            answered += server.get("/health")[0] == 200
    for client in opened:
        client.close()
    server.process.terminate()
    assert answered == 5
    assert server.end()[0] == 0


async def test_no_more_is_parsed_at_once_than_takes_a_moment(
    start: StartServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A body may come in chunks of a byte each."""
    sizes: list[int] = []
    receive = web.RequestHandler.data_received

    def noted(self: web.RequestHandler, data: bytes) -> None:
        sizes.append(len(data))
        receive(self, data)

    monkeypatch.setattr(web.RequestHandler, "data_received", noted)
    server = await start()
    async with server.post("/tokenize", {"prompt": "x" * 900_000}) as response:
        assert response.status == 200
    assert sum(sizes) > 900_000
    assert max(sizes) <= READ_BYTES


async def test_a_stream_to_an_http_1_0_client_ends_with_its_connection(start: StartServer) -> None:
    """Even if the client would keep it: nothing else says that the answer is complete."""
    server = await start()
    body = b'{"prompt": "x", "stream": true}'
    head = f"POST /v1/completions HTTP/1.0\r\nConnection: keep-alive\r\nContent-Length: {len(body)}\r\n\r\n"
    reader, writer = await asyncio.open_connection("127.0.0.1", int(server.url.rpartition(":")[2]))
    writer.write(head.encode() + body)
    answer = await asyncio.wait_for(reader.read(), 5)
    assert answer.endswith(b"data: [DONE]\n\n")
    writer.close()
