"""Connections without a request, with one that cannot be read, and connections of web pages."""

from __future__ import annotations

import asyncio
import gzip
import logging
from collections.abc import AsyncIterator

import msgspec
import pytest

from tests.http.conftest import Running, StartServer
from tfserve.http.connections import SPARE_CONNECTIONS
from tfserve.http.errors import ErrorBody
from tfserve.types import FinishReason

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
    ("data", "status", "code"),
    [
        (LONG, 400, "invalid_http"),
        (b"my private question\r\n\r\n", 400, "invalid_http"),
        (b"GET /version HTTP/1.1\r\nHost: x\r\nX: " + b"private" * 2000 + b"\r\n\r\n", 400, "invalid_http"),
        (b"GET /" + b"private" * 2000 + b" HTTP/1.1\r\nHost: x\r\n\r\n", 400, "invalid_http"),
        (b"GET http://[private/ HTTP/1.1\r\nHost: x\r\n\r\n", 400, "invalid_http"),
        (b"GET /version HTTP/9.9\r\nHost: x\r\n\r\n", 400, "invalid_http"),
        (b"GET /version HTTP/1.1\r\n\r\n", 400, "invalid_http"),
        (b"POST /tokenize HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nprivate\r\n", 400, "invalid_http"),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", 400, "invalid_http"),
        (
            b"POST /tokenize HTTP/1.1\r\nHost: x\r\nExpect: \xff\r\nContent-Length: 1\r\n\r\nx",
            417,
            "expectation_failed",
        ),
        (b"GET /nowhere HTTP/1.1\r\nHost: x\r\nExpect: private\r\n\r\n", 417, "expectation_failed"),
    ],
)
async def test_what_cannot_be_read_as_http_is_answered_in_the_apis_words(
    start: StartServer, data: bytes, status: int, code: str
) -> None:
    server = await start()
    *_, answer = (await talk(server, data)).split(b"HTTP/1.")
    head, _, body = answer.partition(b"\r\n\r\n")
    assert int(head.split()[1]) == status
    error = msgspec.json.decode(body, type=ErrorBody).error
    assert (error.type, error.code) == ("invalid_request_error", code)
    assert "private" not in error.message
    assert b"\r\nServer: tfserve\r\n" in head
    assert b"\r\nX-Content-Type-Options: nosniff" in head


async def test_a_client_that_asks_before_it_sends_its_body_may_go_on(start: StartServer) -> None:
    server = await start()
    async with server.post("/tokenize", {"prompt": "x"}, expect100=True) as response:
        assert response.status == 200


@pytest.mark.parametrize("path", ["/", "/health", "/metrics", "/v1/models", "/nowhere"])
async def test_no_answer_tells_versions_or_may_be_taken_for_another_type(start: StartServer, path: str) -> None:
    server = await start(api_keys=["key"])
    async with server.get(path) as response:
        assert response.headers["Server"] == "tfserve"
        assert response.headers.getall("X-Content-Type-Options") == ["nosniff"]


@pytest.mark.parametrize("body", [b"no gzip", b"", b"\x1f\x8b\x08", gzip.compress(b"{}")[:-4]], ids=repr)
@pytest.mark.parametrize("chunks", [1, 2])
async def test_a_body_that_is_no_gzip_is_one_line_in_the_log(
    start: StartServer, caplog: pytest.LogCaptureFixture, body: bytes, chunks: int
) -> None:
    caplog.set_level(logging.INFO)
    server = await start()

    async def parts() -> AsyncIterator[bytes]:
        for begin in range(chunks):
            yield body[begin::chunks]

    headers = {"Content-Encoding": "gzip"}
    async with server.session.post(server.url + "/tokenize", data=parts(), headers=headers) as response:
        assert response.status == 400
    assert [record.exc_info for record in caplog.records if record.name != "asyncio"] == [None]


async def test_idle_connections_make_room_for_new_ones_and_not_those_with_a_request(start: StartServer) -> None:
    server = await start(reply=None, max_connections=2)
    address = "127.0.0.1", int(server.url.rpartition(":")[2])
    async with server.post("/v1/completions", {"prompt": "x", "stream": True}) as response:
        idle = [await asyncio.open_connection(*address) for _ in range(SPARE_CONNECTIONS + 50)]
        async with server.get("/version") as other:
            assert other.status == 200
        readings = [asyncio.ensure_future(reader.read()) for reader, _ in idle]
        await asyncio.wait(readings, timeout=0.2)
        num_ended = sum(reading.done() for reading in readings)
        # The oldest idle connections are closed. Two more remain, which have had a request.
        assert num_ended == 50
        assert all(reading.done() for reading in readings[:num_ended])
        server.engine.live[0].say("text", FinishReason.STOP)
        assert (await response.read()).endswith(b"data: [DONE]\n\n")
    for _, writer in idle:
        writer.close()
    await asyncio.gather(*readings)


async def test_beyond_the_most_connections_only_probes_are_answered(start: StartServer) -> None:
    server = await start(reply=None, max_connections=2)
    body = {"prompt": "x", "stream": True}
    async with server.post("/v1/completions", body) as first, server.post("/v1/completions", body):
        async with server.post("/v1/completions", body) as third:
            assert third.status == 503
            assert third.headers["Connection"] == "close"
            assert third.headers["Retry-After"] == "1"
            assert (await third.json())["error"]["code"] == "too_many_connections"
        for path in ("/health", "/ready", "/metrics"):
            async with server.get(path) as probe:
                assert probe.status == 200
        assert len(server.engine.live) == 2
        server.engine.live[0].say("text", FinishReason.STOP)
        await first.read()
        async with server.post("/v1/completions", body) as third:
            assert third.status == 200


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
