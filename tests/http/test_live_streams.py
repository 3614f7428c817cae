"""Streams seen and steered from outside: pictures of them, readers' reports, aborts, and refusals before they begin."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from tests.http.conftest import Running, StartServer
from tests.http.fakes import FakeEngine
from tests.http.test_answers import events
from tfserve.http import feed
from tfserve.types import FinishReason, StreamState

PLAIN = "/v1/completions"


async def open_stream(server: Running, **body: Any) -> tuple[Any, Any, str]:
    """A stream that has said "hello" in five tokens: the response, its engine side, the answer's id."""
    asking = asyncio.ensure_future(server.post(PLAIN, {"prompt": "x", "stream": True, **body}).__aenter__())
    await server.engine.submitted.wait()
    server.engine.submitted.clear()
    server.engine.live[-1].say("hello")
    response = await asking
    first = json.loads((await response.content.readuntil(b"\n\n")).removeprefix(b"data: "))
    return response, server.engine.live[-1], first["id"]


async def test_a_refusal_is_a_429_before_the_stream_begins(start: StartServer) -> None:
    server = await start(reply=None, overload="shed")
    asking = asyncio.ensure_future(server.post(PLAIN, {"prompt": "x", "stream": True}).__aenter__())
    await server.engine.submitted.wait()
    server.engine.live[0].refuse(7.3)
    response = await asking
    assert (response.status, response.headers["Retry-After"]) == (429, "8")
    assert (await response.json())["error"]["code"] == "overloaded"
    assert server.service.num_open == 0


async def test_one_refused_choice_refuses_the_answer_and_frees_the_others(start: StartServer) -> None:
    server = await start(reply=None, overload="shed")
    asking = asyncio.ensure_future(server.post(PLAIN, {"prompt": ["x", "y"], "stream": True}).__aenter__())
    await server.engine.submitted.wait()
    server.engine.live[0].begin()
    server.engine.live[1].refuse(2.0)
    assert (await asking).status == 429
    assert server.engine.live[0].aborted.is_set()


async def test_a_refusal_of_a_whole_answer_is_a_429(start: StartServer) -> None:
    server = await start(reply=None, overload="shed")
    asking = asyncio.ensure_future(server.post(PLAIN, {"prompt": "x"}).__aenter__())
    await server.engine.submitted.wait()
    server.engine.live[0].refuse(2.0)
    assert (await asking).status == 429


async def test_who_is_let_in_gets_the_headers_before_the_first_token(start: StartServer) -> None:
    server = await start(reply=None, overload="shed")
    asking = asyncio.ensure_future(server.post(PLAIN, {"prompt": "x", "stream": True}).__aenter__())
    await server.engine.submitted.wait()
    await asyncio.sleep(0.05)
    assert not asking.done()
    server.engine.live[0].begin()
    response = await asyncio.wait_for(asking, 2)
    assert response.status == 200
    server.engine.live[0].say("late", FinishReason.STOP)
    assert events(await response.read())[0]["choices"][0]["text"] == "late"


async def test_a_client_that_leaves_before_it_is_let_in_frees_its_request(start: StartServer) -> None:
    server = await start(reply=None, overload="shed")
    asking = asyncio.ensure_future(server.post(PLAIN, {"prompt": "x", "stream": True}).__aenter__())
    await server.engine.submitted.wait()
    asking.cancel()
    await asyncio.wait_for(server.engine.live[0].aborted.wait(), 2)
    await asyncio.wait_for(server.service.idle.wait(), 2)


@pytest.mark.parametrize(
    ("report", "played"),
    [({"played_tokens": 3}, 3), ({"played_tokens": 99}, 5), ({"played_chars": 2}, 2), ({"played_chars": 99}, 5)],
)
async def test_a_readers_report_reaches_the_engine(start: StartServer, report: Any, played: int) -> None:
    server = await start(reply=None)
    opened, stream, answer = await open_stream(server)
    for name in (answer, f"{answer}-0"):
        async with server.post(f"/v1/streams/{name}/buffer", report) as response:
            assert response.status == 200
            body = await response.json()
        assert body == {"id": f"{answer}-0", "played_tokens": played, "unread_tokens": 5 - played}
    assert stream.played == [played, played]
    opened.close()


async def test_a_report_counts_the_answer_without_its_thoughts(start: StartServer) -> None:
    server = await start(reply=None)
    server.engine.tokenizer.thinks = True
    body = {"messages": [{"role": "user", "content": "x"}], "stream": True}
    async with server.post("/v1/chat/completions", body) as response:
        stream = server.engine.live[0]
        stream.say("<think>ab</think>")
        stream.say("hello")
        while b'"hello"' not in await response.content.readuntil(b"\n\n"):
            pass
        async with server.post(f"/v1/streams/{stream.request_id}/buffer", {"played_tokens": 9}) as reply:
            assert await reply.json() == {"id": stream.request_id, "played_tokens": 5, "unread_tokens": 0}
        response.close()


@pytest.mark.parametrize(
    ("report", "param"),
    [
        ({}, "played_tokens"),
        ({"played_tokens": -1}, "played_tokens"),
        ({"played_tokens": 1, "played_chars": 1}, "played_tokens"),
        ({"played_chars": "many"}, "played_chars"),
        ({"played_chars": 10**400}, "played_chars"),
    ],
)
async def test_reports_that_say_nothing_are_400(start: StartServer, report: Any, param: str) -> None:
    server = await start(reply=None)
    opened, stream, answer = await open_stream(server)
    async with server.post(f"/v1/streams/{answer}/buffer", report) as response:
        assert response.status == 400
        assert (await response.json())["error"]["param"] == param
    assert stream.played == []
    opened.close()


async def test_a_stream_without_a_reader_takes_no_reports(start: StartServer) -> None:
    server = await start(reply=None)
    for body in ({"stream": True, "consumption_rate": None}, {"stream": False}):
        asking = asyncio.ensure_future(server.session.post(server.url + PLAIN, json={"prompt": "x", **body}))
        await server.engine.submitted.wait()
        server.engine.submitted.clear()
        stream = server.engine.live[-1]
        async with server.post(f"/v1/streams/{stream.request_id}/buffer", {"played_tokens": 0}) as response:
            assert response.status == 400
            assert (await response.json())["error"]["code"] == "no_reader"
        assert stream.played == []
        stream.say("done", FinishReason.STOP)
        (await asking).close()


async def test_streams_that_are_not_there_are_404(start: StartServer) -> None:
    server = await start()
    for path, body in (
        ("/v1/streams/cmpl-unknown/buffer", {"played_tokens": 1}),
        ("/v1/streams/cmpl-unknown-0/buffer", {"played_tokens": 1}),
        ("/abort_request", {"request_id": "cmpl-unknown"}),
    ):
        async with server.post(path, body) as response:
            assert response.status == 404
            assert (await response.json())["error"]["code"] == "stream_not_found"


@pytest.mark.parametrize("number", ["1", "01", "-1", "\u0660", "9" * 5000])
async def test_choices_that_an_answer_does_not_have_are_404(start: StartServer, number: str) -> None:
    server = await start(reply=None)
    opened, stream, answer = await open_stream(server)
    async with server.post(f"/v1/streams/{answer}-{number}/buffer", {"played_tokens": 1}) as response:
        assert response.status == 404
    assert stream.played == []
    opened.close()


async def test_an_abort_from_outside_ends_the_stream_with_the_reason(start: StartServer) -> None:
    server = await start(reply=None)
    response, stream, answer = await open_stream(server)
    async with server.post("/abort_request", {"request_id": answer}) as aborted:
        assert await aborted.json() == {"request_id": answer, "aborted": True}
    chunks = events(await response.read())
    assert "abort_request" in chunks[-2]["error"]["message"]
    assert chunks[-1] == "[DONE]"
    assert stream.aborted.is_set()


async def test_streams_are_listed_with_their_buffers(start: StartServer) -> None:
    server = await start(reply=None)
    opened, _, answer = await open_stream(server)
    async with server.get("/v1/streams") as response:
        body = await response.json()
    assert body["object"] == "list"
    assert body["stats"]["num_free_blocks"] == 76
    assert [(row["id"], row["phase"], row["num_unread"]) for row in body["data"]] == [(f"{answer}-0", "running", 5.0)]
    opened.close()


async def test_viewers_get_pictures_until_they_leave(start: StartServer) -> None:
    server = await start(reply=None)
    headers = {"Accept": "text/event-stream"}
    async with server.get("/v1/streams?interval=0.1", headers=headers) as response:
        assert response.headers["Content-Type"].startswith("text/event-stream")
        pictures = [json.loads((await response.content.readuntil(b"\n\n")).removeprefix(b"data: ")) for _ in range(3)]
    assert pictures[0]["created"] < pictures[2]["created"]
    async with server.get("/v1/streams?interval=0", headers=headers) as response:
        assert response.status == 400


async def test_the_page_is_served_whole_and_loads_nothing_from_elsewhere(start: StartServer) -> None:
    server = await start(api_keys=["secret"])
    async with server.get("/") as response:
        assert response.status == 200
        assert response.headers["Content-Type"].startswith("text/html")
        assert "default-src 'none'" in response.headers["Content-Security-Policy"]
        page = await response.text()
    assert page.startswith("<!doctype html>")
    assert "http://" not in page
    assert "https://" not in page


class SilentEngine(FakeEngine):
    """Does not tell of its streams while `silent`, as an engine in a long step; counts how often it is asked."""

    silent = True
    num_asked = 0

    async def streams(self) -> list[StreamState]:
        self.num_asked += 1
        if self.silent:
            await asyncio.Event().wait()
        return await super().streams()


async def test_an_engine_that_does_not_tell_of_its_streams_holds_up_nobody(
    start: StartServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(feed, "PATIENCE_S", 0.1)
    server = await start(engine_class=SilentEngine)

    async def ask() -> tuple[int, str]:
        async with server.get("/v1/streams") as response:
            return response.status, (await response.json())["error"]["code"]

    assert await asyncio.gather(*(ask() for _ in range(20))) == [(503, "engine_stalled")] * 20
    server.engine.silent = False
    async with server.get("/v1/streams") as response:
        assert response.status == 200


async def test_a_picture_that_does_not_come_is_told_in_the_stream_of_pictures(
    start: StartServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(feed, "PATIENCE_S", 0.1)
    server = await start(engine_class=SilentEngine)
    server.engine.silent = False
    async with server.get("/v1/streams?interval=0.1", headers={"Accept": "text/event-stream"}) as response:
        await response.content.readuntil(b"\n\n")
        server.engine.silent = True
        *_, last = (await response.read()).strip().split(b"\n\n")
    assert json.loads(last.removeprefix(b"data: "))["error"]["code"] == "engine_stalled"


async def test_the_engine_is_asked_once_for_all_who_scrape(start: StartServer) -> None:
    server = await start(engine_class=SilentEngine)
    server.engine.silent = False

    async def scrape() -> int:
        async with server.get("/metrics") as response:
            return response.status

    assert await asyncio.gather(*(scrape() for _ in range(20))) == [200] * 20
    assert server.engine.num_asked == 1
