"""Connections on which no request comes, or none that can be read, and those of web pages."""

from __future__ import annotations

import asyncio
import logging

import pytest

from tests.http.conftest import Running, StartServer

LONG = b"POST /tokenize HTTP/1.1\r\nHost: x\r\nContent-Length: 16\r\n\r\n" + b'{"prompt": "my "} my private question'
"""A body that is longer than it says: what follows it is read as the next request."""


async def talk(server: Running, data: bytes) -> bytes:
    """Send `data` and read until the server closes the connection."""
    reader, writer = await asyncio.open_connection("127.0.0.1", int(server.url.rpartition(":")[2]))
    writer.write(data)
    try:
        return await asyncio.wait_for(reader.read(), 5)
    finally:
        writer.close()


@pytest.mark.parametrize("begun", [b"", b"GET /version HTTP/1.1\r\nHost: x\r\nX-Slow: "])
async def test_a_connection_without_a_request_is_closed(start: StartServer, begun: bytes) -> None:
    server = await start(idle_timeout_s=0.1)
    assert await talk(server, begun) == b""


@pytest.mark.parametrize(
    "data",
    [
        LONG,
        b"my private question\r\n\r\n",
        b"GET / HTTP/1.1\r\nAuthorization: Bearer a-secret-key\x00\r\n\r\n",
        b"GET / HTTP/1.1\r\nAuthorization: Bearer a-secret-key" + b"x" * 10_000 + b"\r\n\r\n",
    ],
    ids=["body too long", "no HTTP", "broken header", "long header"],
)
async def test_what_is_no_request_is_not_quoted_in_the_log(
    start: StartServer, caplog: pytest.LogCaptureFixture, data: bytes
) -> None:
    caplog.set_level(logging.DEBUG)
    server = await start()
    assert b" 400 " in await talk(server, data)
    assert [record for record in caplog.records if record.name == "tfserve.http.connections"]
    for word in ("private", "question", "a-secret-key"):
        assert word not in caplog.text


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Content-Type": "text/plain"}, 200),
        ({"Origin": "https://a.example", "Content-Type": "text/plain"}, 415),
        ({"Origin": "https://a.example", "Content-Type": "application/x-www-form-urlencoded"}, 415),
        ({"Origin": "https://a.example", "Content-Type": "application/json; charset=utf-8"}, 200),
    ],
)
async def test_a_page_must_send_what_its_browser_asks_about(
    start: StartServer, headers: dict[str, str], status: int
) -> None:
    server = await start()
    async with server.post("/v1/completions", {"prompt": "x"}, headers=headers) as response:
        assert response.status == status
        assert bool(server.engine.live) == (status == 200)


async def test_a_stream_of_pictures_has_no_head(start: StartServer) -> None:
    server = await start()
    headers = {"Accept": "text/event-stream"}
    async with server.session.head(server.url + "/v1/streams", headers=headers) as response:
        assert response.status == 405
