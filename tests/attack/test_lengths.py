"""Requests that are too long in some way are refused by the field at fault; no other stream notices."""

from __future__ import annotations

import asyncio
import io
import json
from pathlib import Path
from typing import Any

from tests.free_blocks import until_all_free
from tests.http.conftest import Running
from tests.scripted import scripted_server, write_scripted_model

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
