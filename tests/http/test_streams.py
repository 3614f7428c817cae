"""Streams that do not go well: silence, lost clients, slow readers, failures, drains."""

from __future__ import annotations

import asyncio
import itertools
import logging
import time
from typing import Any

import pytest

from tests.http.conftest import Running, StartServer
from tests.http.test_answers import events
from tfserve.types import FinishReason

PLAIN = "/v1/completions"


async def open_stream(server: Running, **body: Any) -> Any:
    """A streaming response whose headers are here, and its engine side."""
    asking = asyncio.ensure_future(server.post(PLAIN, {"prompt": "x", "stream": True, **body}).__aenter__())
    await server.engine.submitted.wait()
    server.engine.submitted.clear()
    server.engine.live[-1].say("first")
    return await asking


async def test_silence_is_filled_with_comments(start: StartServer) -> None:
    server = await start(reply=None, keep_alive_s=0.05)
    begun = time.monotonic()
    async with server.post(PLAIN, {"prompt": "x", "stream": True}) as response:
        stream = server.engine.live[0]
        for _ in range(3):
            stream.say("", tokens=1)  # tokens without text are silence too
            await asyncio.sleep(0.04)
        stream.say("end", FinishReason.STOP)
        raw = await response.read()
    assert 1 <= raw.count(b": keep-alive\n\n") <= (time.monotonic() - begun) / 0.05
    assert events(raw)[0]["choices"][0]["text"] == "end"


async def test_no_comments_while_tokens_flow(start: StartServer) -> None:
    server = await start(reply="a b c d e f g h", step_s=0.03, keep_alive_s=0.1)
    begun = time.monotonic()
    async with server.post(PLAIN, {"prompt": "x", "stream": True}) as response:
        raw = await response.read()
    times = [begun, *server.engine.live[0].token_s]
    # None, unless the machine itself is silent for so long.
    silences = sum(int((later - earlier) / 0.1) for earlier, later in itertools.pairwise(times))
    assert raw.count(b"keep-alive") <= silences


@pytest.mark.parametrize("streamed", [True, False])
@pytest.mark.parametrize("prompt", ["x", ["x", "y"]])
async def test_a_client_that_leaves_before_the_first_token_frees_its_request(
    start: StartServer, streamed: bool, prompt: Any
) -> None:
    server = await start(reply=None)
    asking = asyncio.ensure_future(server.post(PLAIN, {"prompt": prompt, "stream": streamed}).__aenter__())
    await server.engine.submitted.wait()
    await asyncio.sleep(0.02)
    if streamed:
        (await asking).close()  # its headers came at once
    else:
        asking.cancel()
    for stream in server.engine.live:
        await asyncio.wait_for(stream.aborted.wait(), 2)
    await asyncio.wait_for(server.service.idle.wait(), 2)
    assert server.service.num_open == 0


async def test_a_client_that_leaves_mid_stream_frees_its_request_and_is_logged(
    start: StartServer, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    server = await start(reply=None)
    response = await open_stream(server)
    assert b"first" in await response.content.readuntil(b"\n\n")
    response.close()
    await asyncio.wait_for(server.engine.live[0].aborted.wait(), 2)
    await asyncio.wait_for(server.service.idle.wait(), 2)
    assert [r.getMessage() for r in caplog.records if " 499 in " in r.getMessage()] != []
    assert [r for r in caplog.records if r.levelno >= logging.WARNING] == []


async def test_a_half_read_stream_holds_the_reader_not_the_memory(start: StartServer) -> None:
    server = await start(reply=None)
    response = await open_stream(server)
    stream = server.engine.live[0]
    for _ in range(300):  # 30 MB, unread
        stream.say("x" * 100_000, tokens=1)
        await asyncio.sleep(0)
    reads = -1
    while reads != stream.reads:
        reads = stream.reads
        await asyncio.sleep(0.2)
    assert reads < 200  # the handler waits for the client; the rest stays with the engine's stream
    stream.say("", FinishReason.STOP)
    text = "".join(chunk["choices"][0]["text"] for chunk in events(await response.read())[:-1])
    assert len(text) == len("first") + 30_000_000


async def test_a_slow_reader_that_leaves_is_noticed(start: StartServer) -> None:
    server = await start(reply=None)
    response = await open_stream(server)
    for _ in range(300):
        server.engine.live[0].say("x" * 100_000, tokens=1)
        await asyncio.sleep(0)
    response.close()
    await asyncio.wait_for(server.engine.live[0].aborted.wait(), 2)


async def test_a_request_that_fails_mid_stream_ends_with_an_error_and_done(start: StartServer) -> None:
    server = await start(reply=None)
    response = await open_stream(server)
    server.engine.live[0].fail("out of KV blocks")
    chunks = events(await response.read())
    assert chunks[0]["choices"][0]["text"] == "first"
    assert chunks[1]["error"]["message"] == "out of KV blocks"
    assert chunks[2:] == ["[DONE]"]


async def test_a_request_that_fails_whole_is_a_500(start: StartServer) -> None:
    server = await start(reply=None)
    asking = asyncio.ensure_future(server.post(PLAIN, {"prompt": ["x", "y"]}).__aenter__())
    await server.engine.submitted.wait()
    server.engine.live[0].fail("out of KV blocks")
    response = await asking
    assert response.status == 500
    assert (await response.json())["error"]["code"] == "generation_failed"
    await asyncio.wait_for(server.engine.live[1].aborted.wait(), 2)


@pytest.mark.parametrize("prompt", ["x", ["x", "y"]])
async def test_an_engine_that_dies_mid_stream_ends_every_stream_with_an_error(start: StartServer, prompt: Any) -> None:
    server = await start(reply=None)
    responses = [await open_stream(server, prompt=prompt) for _ in range(3)]
    server.engine.on_death(server.service.die)
    server.engine.die("killed by signal 9")
    for response in responses:
        chunks = events(await response.read())
        assert chunks[-1] == "[DONE]"
        assert chunks[-2]["error"]["code"] == "engine_dead"
        assert "signal 9" in chunks[-2]["error"]["message"]
    async with server.get("/health") as response:
        assert response.status == 503
        assert "signal 9" in (await response.json())["status"]
    async with server.post(PLAIN, {"prompt": "x"}) as response:
        assert response.status == 503
        assert (await response.json())["error"]["code"] == "engine_dead"


@pytest.mark.parametrize("pacing", ["off", "smooth"])
async def test_text_that_came_just_before_the_engine_died_is_given_before_the_error(
    start: StartServer, pacing: str
) -> None:
    server = await start(reply=None, pacing=pacing)
    response = await open_stream(server, consumption_rate=200.0)
    server.engine.live[0].say("last", tokens=1)
    server.engine.die("killed by signal 9")
    chunks = events(await response.read())
    assert [chunk["choices"][0]["text"] for chunk in chunks[:-2]] == ["first", "last"]
    assert chunks[-2]["error"]["code"] == "engine_dead"
    assert chunks[-1] == "[DONE]"


async def test_a_whole_answer_whose_text_came_just_before_the_engine_died_is_a_503(start: StartServer) -> None:
    server = await start(reply=None)
    asking = asyncio.ensure_future(server.post(PLAIN, {"prompt": "x"}).__aenter__())
    await server.engine.submitted.wait()
    server.engine.live[0].say("some")
    server.engine.die("killed by signal 9")
    response = await asking
    assert response.status == 503
    assert (await response.json())["error"]["code"] == "engine_dead"


async def test_an_engine_that_dies_before_a_whole_answer_is_a_503(start: StartServer) -> None:
    server = await start(reply=None)
    asking = asyncio.ensure_future(server.post(PLAIN, {"prompt": "x"}).__aenter__())
    await server.engine.submitted.wait()
    server.engine.die("killed by signal 9")
    assert (await asking).status == 503


async def test_a_bug_mid_stream_is_a_bare_error_event_and_a_logged_traceback(
    start: StartServer, caplog: pytest.LogCaptureFixture
) -> None:
    server = await start(reply=None)
    response = await open_stream(server, logprobs=1)
    server.engine.tokenizer.token_bytes = None  # type: ignore[method-assign,assignment]
    server.engine.live[0].say("next")
    chunks = events(await response.read())
    assert chunks[-2]["error"]["message"].startswith("Internal server error")
    assert chunks[-1] == "[DONE]"
    assert any(record.exc_info for record in caplog.records)
    assert server.engine.live[0].aborted.is_set()


async def test_a_drain_refuses_newcomers_and_lets_streams_finish(start: StartServer) -> None:
    server = await start(reply=None)
    response = await open_stream(server)
    server.service.drain()
    async with server.post(PLAIN, {"prompt": "x"}) as refused:
        assert refused.status == 503
        assert (await refused.json())["error"]["code"] == "draining"
    async with server.get("/ready") as ready, server.get("/health") as health:
        assert (ready.status, health.status) == (503, 200)
    server.engine.live[0].say(" last", FinishReason.STOP)
    assert "".join(chunk["choices"][0]["text"] for chunk in events(await response.read())[:-1]) == "first last"
    await asyncio.wait_for(server.service.idle.wait(), 2)


@pytest.mark.parametrize("stuck", [False, True])
@pytest.mark.parametrize("prompt", ["x", ["x", "y"]])
async def test_aborted_streams_are_told_why_even_if_the_engine_is_stuck(
    start: StartServer, prompt: Any, stuck: bool
) -> None:
    server = await start(reply=None)
    response = await open_stream(server, prompt=prompt)
    await response.content.readuntil(b"\n\n")
    server.engine.stuck = stuck
    server.service.abort_open("The server is shutting down.")
    chunks = events(await response.read())
    assert chunks[-2]["error"]["message"] == "The server is shutting down."
    assert chunks[-1] == "[DONE]"
    assert all(stream.aborted.is_set() for stream in server.engine.live)


@pytest.mark.parametrize(("version", "is_chunked"), [("1.0", False), ("1.1", True)])
async def test_events_are_framed_as_the_clients_protocol_wants_them(
    start: StartServer, version: str, is_chunked: bool
) -> None:
    server = await start(reply="one two three", step_s=0.01)
    reader, writer = await asyncio.open_connection("127.0.0.1", int(server.url.rpartition(":")[2]))
    body = b'{"prompt": "x", "stream": true}'
    head = f"POST {PLAIN} HTTP/{version}\r\nHost: localhost\r\nConnection: close\r\nContent-Length: {len(body)}\r\n\r\n"
    writer.write(head.encode() + body)
    raw = await asyncio.wait_for(reader.read(), 5)
    writer.close()
    headers, _, rest = raw.partition(b"\r\n\r\n")
    assert (b"chunked" in headers) is is_chunked
    if is_chunked:
        pieces = []
        while rest:
            size, _, rest = rest.partition(b"\r\n")
            pieces.append(rest[: int(size, 16)])
            rest = rest[int(size, 16) + 2 :]
        rest = b"".join(pieces)
    assert [chunk["choices"][0]["text"] for chunk in events(rest)[:-1]] == ["one ", "two ", "three"]


async def test_text_that_json_must_escape_arrives_as_it_is(start: StartServer) -> None:
    server = await start(reply=None)
    response = await open_stream(server)
    for text in ('"quoted"\n', "back\\slash\t", "naïve 🙂 \u2028", "\x00\x1f"):
        server.engine.live[0].say(text)
        await asyncio.sleep(0.01)
    server.engine.live[0].say("", FinishReason.STOP)
    text = "".join(chunk["choices"][0]["text"] for chunk in events(await response.read())[:-1])
    assert text == 'first"quoted"\nback\\slash\tnaïve 🙂 \u2028\x00\x1f'
