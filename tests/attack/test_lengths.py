"""Requests that are too long in some way are refused by the field at fault; no other stream notices."""

from __future__ import annotations

import asyncio
import gzip
import io
import json
import random
import threading
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.free_blocks import until_all_free
from tests.http.conftest import Running, StartServer
from tests.scripted import scripted_server, write_scripted_model
from tfserve.http import completions
from tfserve.http.completions import CompletionRenderer
from tfserve.http.streams import VIEWED_BYTES_PER_S, pause_before
from tfserve.model.grammars.schema_limits import check_schema

CHAT, PLAIN = "/v1/chat/completions", "/v1/completions"
ASK = [{"role": "user", "content": "x"}]
EMPTY = {"role": "user", "content": ""}

HOSTILE: list[tuple[str, dict[str, Any], str | None]] = [
    (PLAIN, {"prompt": "x", "n": 8, "logit_bias": {str(token): 1 for token in range(301)}}, "logit_bias"),
    (CHAT, {"messages": ASK, "n": 8, "logit_bias": {str(token): 1 for token in range(60_000)}}, "logit_bias"),
    (PLAIN, {"prompt": "x", "stop": ["s"] * 65}, "stop"),
    (PLAIN, {"prompt": "x", "stop": ["a", "s" * 257]}, "stop[1]"),
    (PLAIN, {"prompt": "x", "stop": "s" * 257}, "stop"),
    (PLAIN, {"prompt": "x", "stop_token_ids": [5] * 1_000_000}, "stop_token_ids"),
    (PLAIN, {"prompt": [5] * 1_500_000}, "prompt"),
    (PLAIN, {"prompt": [5.0] * 300_000}, "prompt"),
    (PLAIN, {"prompt": [[5]] * 60_000}, "prompt"),
    (PLAIN, {"prompt": [[5]] * 70_000}, None),
    (PLAIN, {"prompt": ["a"] * 300_000}, "prompt"),
    (PLAIN, {"prompt": [[1], [5] * 5000]}, "prompt"),
    (PLAIN, {"prompt": "ab " * 300_000}, "prompt"),
    (PLAIN, {"prompt": "a" * 900_000}, "prompt"),
    (PLAIN, {"prompt": [[5] * 3000] * 64, "echo": True, "logprobs": 20, "max_tokens": 1}, "logprobs"),
    (CHAT, {"messages": ASK, "n": 128, "logprobs": True, "top_logprobs": 20}, "logprobs"),
    (CHAT, {"messages": [EMPTY] * 2049}, "messages"),
    (CHAT, {"messages": [EMPTY] * 100_000}, None),
    (CHAT, {"messages": [{"role": "user", "content": [{"type": "text", "text": ""}] * 70_000}]}, None),
    (CHAT, {"messages": [{"role": "user", "content": "ab " * 300_000}]}, "messages"),
    (CHAT, {"messages": ASK, **{f"f{number}": 1 for number in range(70_000)}}, None),
    ("/tokenize", {"prompt": "a" * 1_000_001}, "prompt"),
    ("/tokenize", {"messages": [EMPTY] * 2049}, "messages"),
    ("/detokenize", {"tokens": [5] * 1_000_000}, "tokens"),
]

ACCEPTED: list[tuple[str, dict[str, Any]]] = [
    (PLAIN, {"prompt": "x", "max_tokens": 2, "logit_bias": {str(token): 0 for token in range(300)}}),
    (PLAIN, {"prompt": "x", "max_tokens": 2, "stop": ["s" * 256] * 64}),
    (PLAIN, {"prompt": ["x"] * 40, "max_tokens": 2}),
    (PLAIN, {"prompt": "x", "max_tokens": 2, "user": '{"[": \\' * 30_000}),
    (CHAT, {"messages": [EMPTY] * 300, "max_tokens": 2}),
    ("/tokenize", {"prompt": "ab " * 300_000}),
    ("/detokenize", {"tokens": [5] * 4000}),
]


async def error_of(server: Running, path: str, body: dict[str, Any]) -> tuple[int, str | None]:
    data = io.BytesIO(json.dumps(body, separators=(",", ":")).encode())
    async with server.session.post(server.url + path, data=data) as response:
        answer = await response.json()
    return response.status, answer.get("error", {}).get("param")


async def test_lengths_are_refused_by_their_field_and_no_stream_notices(tmp_path: Path) -> None:
    model = write_scripted_model(tmp_path)
    async with scripted_server(model, "a b c ", ends=False, max_num_seqs=4) as server:
        bystander = asyncio.create_task(text_of_stream(server, num_tokens=1500))
        for path, body, param in HOSTILE:
            assert await error_of(server, path, body) == (400, param), (path, list(body))
        for path, body in ACCEPTED:
            assert (await error_of(server, path, body))[0] == 200, (path, list(body))
        assert len(await bystander) > 1000
        await until_all_free(server.engine)
        assert server.engine.stats().num_waiting == 0


async def text_of_stream(server: Running, num_tokens: int) -> str:
    """All of a stream's text; it must end as it was asked to."""
    pieces, reason = [], None
    async with server.post(PLAIN, {"prompt": "x", "stream": True, "max_tokens": num_tokens}) as response:
        async for line in response.content:
            if line.startswith(b"data: {"):
                (choice,) = json.loads(line[6:])["choices"]
                pieces.append(choice["text"])
                reason = choice["finish_reason"]
    assert reason == "length"
    return "".join(pieces)


# What is long only in what the server makes of it.
@pytest.mark.parametrize("stream", [True, False])
async def test_choices_that_begin_with_long_prompts_are_worded_off_the_event_loop(
    start: StartServer, monkeypatch: pytest.MonkeyPatch, stream: bool
) -> None:
    first: dict[int, int] = {}
    chunk, whole = CompletionRenderer.chunk, CompletionRenderer.whole

    def noted_chunk(self: CompletionRenderer, index: int, *args: Any) -> bytes:
        first.setdefault(index, threading.get_ident())
        return chunk(self, index, *args)

    def noted_whole(self: CompletionRenderer, *args: Any) -> Iterator[bytes]:
        for piece in whole(self, *args):
            first.setdefault(0, threading.get_ident())
            yield piece

    monkeypatch.setattr(CompletionRenderer, "chunk", noted_chunk)
    monkeypatch.setattr(CompletionRenderer, "whole", noted_whole)
    server = await start()
    body = {"prompt": "x" * 900, "n": 64, "echo": True, "stream": stream}
    async with server.post(PLAIN, body) as response:
        assert (await response.read()).count(b"x" * 900) == 64
    assert len(first) == (64 if stream else 1)
    assert threading.get_ident() not in first.values()


async def test_what_all_choices_begin_with_has_a_limit(start: StartServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(completions, "MAX_ECHOED_CHARS", 4000)
    server = await start()
    for body, status in (
        ({"prompt": "x" * 900, "n": 5, "echo": True}, 400),
        ({"prompt": [[65] * 500] * 3, "n": 3, "echo": True}, 400),
        ({"prompt": "x" * 900, "n": 4, "echo": True}, 200),
        ({"prompt": "x" * 900, "n": 5}, 200),
    ):
        async with server.post(PLAIN, body) as response:
            answer = await response.json()
        assert response.status == status
        assert answer.get("error", {}).get("param") == ("echo" if status == 400 else None)


async def test_schemas_are_walked_through_one_at_a_time(start: StartServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Python threads share one lock: among many that compute, the event loop's turn comes seldom."""
    running, most = 0, 0

    def check(*args: Any) -> int:
        nonlocal running, most
        running += 1
        most = max(most, running)
        time.sleep(0.01)
        running -= 1
        return check_schema(*args)

    for module in ("tfserve.http.tools", "tfserve.model.grammars.grammar"):
        monkeypatch.setattr(f"{module}.check_schema", check)
    server = await start(reply="{}")

    async def ask(number: int) -> int:
        schema = {"type": "object", "title": str(number)}
        wish: dict[str, Any] = {"response_format": {"type": "json_object", "schema": schema}}
        if number % 2:
            wish = {"tools": [{"type": "function", "function": {"name": "f", "parameters": schema}}]}
        async with server.post(CHAT, {"messages": ASK, **wish}) as response:
            await response.read()
        return int(response.status)

    assert set(await asyncio.gather(*map(ask, range(20)))) == {200}
    assert most == 1


async def test_packed_bodies_are_unpacked_off_the_event_loop(
    start: StartServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    at: list[int] = []

    class Noted:
        def __init__(self, window: int) -> None:
            self._stream = decompressobj(window)

        def __getattr__(self, name: str) -> Any:
            return getattr(self._stream, name)

        def decompress(self, *args: Any) -> bytes:
            at.append(threading.get_ident())
            return self._stream.decompress(*args)

    decompressobj = zlib.decompressobj
    monkeypatch.setattr(zlib, "decompressobj", Noted)
    server = await start()
    data = gzip.compress(json.dumps({"prompt": "x", "user": random.Random(1).randbytes(100_000).hex()}).encode())
    async with server.post(PLAIN, data, headers={"Content-Encoding": "gzip"}) as response:
        assert response.status == 200
    assert at
    assert threading.get_ident() not in at


@pytest.mark.parametrize("num_viewers", [1, 10, 1000])
@pytest.mark.parametrize("size", [500, 30_000, 400_000])
def test_viewers_together_get_so_many_bytes(num_viewers: int, size: int) -> None:
    for interval_s in (0.1, 0.5, 60.0):
        pause_s = pause_before(interval_s, num_viewers, size)
        assert pause_s >= interval_s
        assert num_viewers * size / pause_s <= 1.01 * VIEWED_BYTES_PER_S
        if num_viewers * size <= VIEWED_BYTES_PER_S / 10:
            assert pause_s == interval_s
