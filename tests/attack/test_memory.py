"""Memory that clients can make the HTTP side hold: answers that are not read, bodies that are not finished."""

from __future__ import annotations

import asyncio
import gc
import gzip
import json
import logging
import re
import socket
import tracemalloc
import weakref
from typing import Any

import msgspec
import pytest

from tests.http.conftest import Running, StartServer
from tfserve.config import EngineConfig, ServerConfig
from tfserve.errors import ConfigError
from tfserve.http import bodies, unread
from tfserve.http.parsing import BodyParser
from tfserve.http.unread import _Watch
from tfserve.types import FinishReason

MIB = 2**20
LONG = "x" * 100_000


# Answers that are not read.
async def ask(server: Running, body: dict[str, Any]) -> socket.socket:
    """A connection with small buffers on which a request was sent."""
    client = socket.socket()
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    client.setblocking(False)
    loop = asyncio.get_running_loop()
    await loop.sock_connect(client, ("127.0.0.1", int(server.url.rpartition(":")[2])))
    await loop.sock_sendall(client, request_head(data := json.dumps(body).encode(), len(data)) + data)
    return client


def request_head(data: bytes, length: int, *more: str) -> bytes:
    lines = ["POST /v1/completions HTTP/1.1", "Host: localhost", f"Content-Length: {length}", *more]
    return "\r\n".join([*lines, "", ""]).encode()


async def metric(server: Running, name: str) -> float:
    async with server.get("/metrics") as response:
        found = re.search(rf"^tfserve:{re.escape(name)} (\S+)$", await response.text(), re.MULTILINE)
    return float(found[1]) if found else 0.0


async def until(condition: Any) -> None:
    async with asyncio.timeout(10):
        while not await condition():
            await asyncio.sleep(0.02)


@pytest.mark.parametrize("tells", [True, False], ids=["acknowledged", "unsent-only"])
@pytest.mark.parametrize("ends", [True, False], ids=["finished", "unfinished"])
@pytest.mark.parametrize("streamed", [True, False], ids=["stream", "whole"])
async def test_an_answer_that_is_not_read_is_closed_and_everything_of_it_freed(
    start: StartServer,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    streamed: bool,
    ends: bool,
    tells: bool,
) -> None:
    if not (streamed or ends):
        pytest.skip("a whole answer is sent when it has ended")
    if not tells:  # systems other than Linux do not say what was acknowledged
        monkeypatch.delattr(socket, "TCP_INFO")
    server = await start(reply=None, unread_timeout_s=0.4)
    client = await ask(server, {"prompt": "x", "stream": streamed})
    await server.engine.submitted.wait()
    stream = server.engine.live.pop()
    for _ in range(50):
        stream.say(LONG, tokens=1)
    if ends:
        stream.say("", FinishReason.STOP)
    closed = "unread_closed_total"
    await until(lambda: _is(server, closed, 1.0))
    await asyncio.wait_for(server.service.idle.wait(), 2)
    if not ends:
        await asyncio.wait_for(stream.aborted.wait(), 2)
    held = weakref.ref(stream)
    del stream
    gc.collect()
    assert held() is None
    told = [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]
    assert len(told) == 1
    assert "server.unread_timeout_s" in told[0]
    client.close()


async def _is(server: Running, name: str, value: float) -> bool:
    return await metric(server, name) == value


@pytest.mark.parametrize("streamed", [True, False])
async def test_a_reader_that_is_slow_gets_the_whole_answer(start: StartServer, streamed: bool) -> None:
    server = await start(reply=None, unread_timeout_s=0.8)
    client = await ask(server, {"prompt": "x", "stream": streamed})
    await server.engine.submitted.wait()
    for _ in range(12):
        server.engine.live[0].say(LONG, tokens=1)
    server.engine.live[0].say("", FinishReason.STOP)
    loop = asyncio.get_running_loop()
    begun_s, received = loop.time(), b""
    while not received.endswith(b"\r\n0\r\n\r\n"):
        data = await asyncio.wait_for(loop.sock_recv(client, 4096), 5)
        assert data, "the connection was closed"
        received += data
        if loop.time() - begun_s < 2.0:  # two and a half times the limit
            await asyncio.sleep(0.02)
    assert received.count(b"x") >= 12 * len(LONG)
    assert await metric(server, "unread_closed_total") == 0
    client.close()


async def test_a_stream_without_news_is_not_unread(start: StartServer) -> None:
    """Silence of the engine, or of a pacer that keeps text back, is no fault of the client."""
    server = await start(reply=None, unread_timeout_s=0.2)
    async with server.post("/v1/completions", {"prompt": "x", "stream": True}) as response:
        server.engine.live[0].say("first")
        await asyncio.sleep(0.6)
        server.engine.live[0].say("last", FinishReason.STOP)
        assert b"last" in await response.read()


async def test_answers_that_are_not_read_have_a_common_bound(
    start: StartServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(unread, "MAX_UNSENT_BYTES", 70 * MIB)
    monkeypatch.setattr(unread, "STALLED_S", 0.2)
    monkeypatch.setattr(unread, "_PRESSED_S", 0.05)
    server = await start(reply=None, unread_timeout_s=60)
    clients = []
    for number in range(3):
        clients.append(await ask(server, {"prompt": "x"}))
        await until(lambda: _has_live(server))
        stream = server.engine.live.pop()
        stream.say("x" * 30 * MIB, FinishReason.STOP, tokens=1)
        if number == 1:  # two have room
            await asyncio.sleep(0.5)
            assert await metric(server, "unread_closed_total") == 0
    await until(lambda: _is(server, "unread_closed_total", 1.0))
    await asyncio.sleep(0.5)
    assert await metric(server, "unread_closed_total") == 1
    for client in clients:
        client.close()


async def _has_live(server: Running) -> bool:
    return bool(server.engine.live)


async def test_zero_switches_the_limit_off(start: StartServer, monkeypatch: pytest.MonkeyPatch) -> None:
    def look(*_: object) -> None:
        raise AssertionError("nothing is to be looked at")

    monkeypatch.setattr(_Watch, "_look_at_all", look)
    server = await start(unread_timeout_s=0)
    async with server.post("/v1/completions", {"prompt": "x"}) as response:
        assert response.status == 200


# Bodies in flight.
async def send_part(server: Running, num_bytes: int, length: int) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """A connection on which `num_bytes` of a body of `length` were sent."""
    reader, writer = await asyncio.open_connection("127.0.0.1", int(server.url.rpartition(":")[2]))
    data = b'{"prompt": "' + b"x" * (num_bytes - 12)
    writer.write(request_head(data, length) + data)
    await writer.drain()
    return reader, writer


async def test_bodies_beyond_the_budget_are_refused_for_now_and_ordinary_ones_are_not(start: StartServer) -> None:
    server = await start(max_body_bytes=MIB, max_inflight_body_bytes=MIB)
    held = [await send_part(server, 512 * 1024, MIB) for _ in range(2)]
    await until(lambda: _holds(server, 800_000))
    async with server.post("/v1/completions", {"prompt": "x" * 400_000}) as response:
        assert response.status == 503
        assert response.headers["Retry-After"] == "1"
        assert "X-Should-Retry" not in response.headers
        assert (await response.json())["error"]["code"] == "body_memory_full"
    for path in ("/v1/completions", "/tokenize"):
        async with server.post(path, {"prompt": "x" * 300}) as response:
            assert response.status == 200
    assert await metric(server, 'requests_refused_total{reason="body_memory"}') == 1
    for _, writer in held:
        writer.close()
    await until(lambda: _holds(server, 0, exactly=True))
    async with server.post("/tokenize", {"prompt": "x" * 400_000}) as response:
        assert response.status == 200
    assert server.service.bodies.num_bytes == 0


async def _holds(server: Running, num_bytes: int, exactly: bool = False) -> bool:
    held = server.service.bodies.num_bytes
    return held == num_bytes if exactly else held >= num_bytes


async def test_bodies_that_have_stalled_give_way(start: StartServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bodies, "STALLED_S", 0.1)
    server = await start(max_body_bytes=MIB, max_inflight_body_bytes=MIB)
    held = [await send_part(server, 512 * 1024, MIB) for _ in range(2)]
    await until(lambda: _holds(server, 800_000))
    await asyncio.sleep(0.2)
    async with server.post("/tokenize", {"prompt": "x" * 400_000}) as response:
        assert response.status == 200
    first, second = held
    answer = await asyncio.wait_for(first[0].readuntil(b"}}"), 5)
    assert b" 503 " in answer
    assert b"body_memory_full" in answer
    # One was enough: the other still has its time.
    rest = b"x" * (MIB - 512 * 1024 - 2) + b'"}'
    second[1].write(rest)
    assert b" 400 " in await asyncio.wait_for(second[0].readline(), 5)  # read, and longer than the context
    for _, writer in held:
        writer.close()


async def test_a_length_that_is_only_announced_takes_nothing(start: StartServer) -> None:
    server = await start(max_body_bytes=MIB, max_inflight_body_bytes=MIB)
    held = [await send_part(server, 100, MIB) for _ in range(20)]
    async with server.post("/tokenize", {"prompt": "x" * 900_000}) as response:
        assert response.status == 200
    for _, writer in held:
        writer.close()


async def test_what_a_packed_body_unpacks_to_is_counted(start: StartServer) -> None:
    server = await start(max_body_bytes=MIB, max_inflight_body_bytes=MIB)
    held = [await send_part(server, 512 * 1024, MIB)]
    await until(lambda: _holds(server, 400_000))
    packed = gzip.compress(json.dumps({"prompt": "x" * 900_000}).encode())
    async with server.post("/tokenize", packed, headers={"Content-Encoding": "gzip"}) as response:
        assert response.status == 503
    held[0][1].close()


async def test_small_bodies_count_with_what_they_take_as_objects(start: StartServer) -> None:
    server = await start(max_body_bytes=MIB, max_inflight_body_bytes=MIB)
    parts = b'{"prompt": "x", "user": "x", "more": [' + b",".join([b"[]"] * 20_000) + b"]}"
    text = json.dumps({"prompt": "x", "user": "[" * 50_000}).encode()
    for body in (parts, text):
        async with server.post("/v1/completions", body) as response:
            assert response.status == 200
    held = [await send_part(server, 512 * 1024, MIB)]
    await until(lambda: _holds(server, 400_000))
    for body, status in ((parts, 503), (text, 200)):
        async with server.post("/v1/completions", body) as response:
            assert response.status == status
    held[0][1].close()
    await until(lambda: _holds(server, 0, exactly=True))


@pytest.mark.parametrize("path", ["/abort_request", "/v1/streams/x/buffer"])
async def test_small_bodies_may_not_be_large_without_saying_so(start: StartServer, path: str) -> None:
    """A chunked body has no length in its head."""
    server = await start()

    async def chunks() -> Any:
        for _ in range(100):
            yield b" " * 1000

    async with server.session.post(server.url + path, data=chunks()) as response:
        assert response.status == 413


async def test_what_was_sent_is_not_kept_while_the_answer_lasts(start: StartServer) -> None:
    server = await start(reply=None)
    async with server.post("/v1/completions", {"prompt": "x", "stream": True}) as response:  # all is imported
        server.engine.live.pop().say("", FinishReason.STOP)
        await response.read()
    server.engine.submitted.clear()
    tracemalloc.start()
    try:
        reader, writer = await asyncio.open_connection("127.0.0.1", int(server.url.rpartition(":")[2]))
        body = json.dumps({"prompt": [1, 2], "stream": True, "user": "x" * MIB, "metadata": {"y": "y" * MIB}}).encode()
        writer.write(request_head(body, len(body)) + body)
        del body
        await server.engine.submitted.wait()
        server.engine.live[0].say("first")
        await reader.readuntil(b"first")
        gc.collect()
        held, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak > 2 * MIB
    assert held < MIB / 2
    assert server.service.bodies.num_bytes == 0
    writer.close()


def test_unknown_field_names_are_not_kept_whole() -> None:
    class Body(msgspec.Struct):
        x: int = 0

    parser = BodyParser(Body, {})
    tracemalloc.start()
    for number in range(20):
        parser.parse(json.dumps({str(number) + "n" * MIB: 1}).encode())
    held, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert held < MIB


def test_the_budget_holds_at_least_one_body() -> None:
    assert ServerConfig(max_body_bytes=100).inflight_body_bytes == 1600
    assert ServerConfig(max_inflight_body_bytes=2**30).inflight_body_bytes == 2**30
    with pytest.raises(ConfigError, match=r"server\.max_inflight_body_bytes: must be at least server\.max_body_bytes"):
        EngineConfig(model="m", server=ServerConfig(max_inflight_body_bytes=4 * MIB - 1))
