"""Pacing: the rule by itself, and over HTTP where only the order and the sums are looked at, not the clock."""

from __future__ import annotations

import asyncio
import json
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.http.conftest import StartServer
from tests.http.test_answers import events
from tfserve.http.pacing import Pacer
from tfserve.types import FinishReason


@given(
    rate=st.floats(0.5, 200.0),
    bursts=st.lists(st.tuples(st.floats(0.0, 3.0), st.integers(1, 50)), min_size=1, max_size=10),
)
def test_no_token_goes_out_before_its_turn_and_none_is_kept_beyond_it(rate: float, bursts: list) -> None:
    pacer, now, waiting = Pacer(rate), 0.0, 0
    sent: list[float] = []
    came: list[float] = []

    def look() -> None:
        nonlocal waiting
        allowed = pacer.allowed(waiting, now)
        count = waiting if allowed is None else allowed
        sent.extend([now] * count)
        waiting -= count

    for pause, size in bursts:
        until = now + pause
        while pacer.wake_s is not None and pacer.wake_s <= until:
            now = pacer.wake_s
            look()
        now, waiting = until, waiting + size
        came += [now] * size
        look()
    while pacer.wake_s is not None:
        now = max(now, pacer.wake_s)
        look()
    assert len(sent) == len(came)
    due = -math.inf
    for out, arrived in zip(sent, came, strict=True):
        due = max(arrived, due + 1 / rate)
        assert math.isclose(out, due, rel_tol=1e-6, abs_tol=1e-6)


def test_without_a_reader_everything_goes_out_at_once() -> None:
    assert Pacer(math.nan).allowed(50, 1.0) is None


async def test_a_burst_goes_out_piece_by_piece_and_complete(start: StartServer) -> None:
    server = await start(reply=None, pacing="smooth")
    body = {"prompt": "x", "stream": True, "consumption_rate": 200.0}
    async with server.post("/v1/completions", body) as response:
        for letter in "abcdefgh":
            server.engine.live[0].say(letter)
        server.engine.live[0].say("i", FinishReason.STOP)
        chunks = events(await response.read())
    texts = [chunk["choices"][0]["text"] for chunk in chunks[:-1]]
    assert texts[0] == "a"
    assert len(texts) > 3
    assert "".join(texts) == "abcdefghi"
    assert chunks[-2]["choices"][0]["finish_reason"] == "stop"


@pytest.mark.parametrize(("rate", "is_paced"), [(None, False), ("auto", False), ("listen", True), (0.01, True)])
async def test_what_is_paced_is_what_is_read_at_a_known_rate(start: StartServer, rate: Any, is_paced: bool) -> None:
    server = await start(reply=None, pacing="smooth")
    body = {"prompt": "x", "stream": True, "consumption_rate": rate}
    async with server.post("/v1/completions", body) as response:
        for letter in "ab":
            server.engine.live[0].say(letter)
        first = await response.content.readuntil(b"\n\n")
        response.close()
    assert json.loads(first.removeprefix(b"data: "))["choices"][0]["text"] == ("a" if is_paced else "ab")


async def test_an_abort_does_not_wait_for_the_reader(start: StartServer) -> None:
    server = await start(reply=None, pacing="smooth")
    body = {"prompt": "x", "stream": True, "consumption_rate": 0.01}
    async with server.post("/v1/completions", body) as response:
        server.engine.live[0].say("hello")
        await asyncio.sleep(0.02)
        server.service.abort_open("enough")
        chunks = events(await asyncio.wait_for(response.read(), 2))
    assert chunks[-2]["error"]["message"] == "enough"


async def test_a_reader_who_leaves_while_text_is_kept_back_is_noticed(start: StartServer) -> None:
    server = await start(reply=None, pacing="smooth")
    response = await server.post("/v1/completions", {"prompt": "x", "stream": True, "consumption_rate": 0.01})
    server.engine.live[0].say("hello")
    await response.content.readuntil(b"\n\n")
    response.close()
    await asyncio.wait_for(server.engine.live[0].aborted.wait(), 2)


async def test_thoughts_are_not_paced_and_the_answer_behind_them_is(start: StartServer) -> None:
    server = await start(reply=None, pacing="smooth")
    server.engine.tokenizer.thinks = True
    body = {"messages": [{"role": "user", "content": "x"}], "stream": True, "consumption_rate": 0.01}
    async with server.post("/v1/chat/completions", body) as response:
        for text in ("<think>", "a", "b", "c", "</think>"):
            server.engine.live[0].say(text)
        told = b""
        while b'"abc"' not in told:
            told = await response.content.readuntil(b"\n\n")
        for letter in "xy":
            server.engine.live[0].say(letter)
        first = await response.content.readuntil(b"\n\n")
        response.close()
    assert json.loads(first.removeprefix(b"data: "))["choices"][0]["delta"]["content"] == "x"
