"""Answers with many log probabilities are made in parts and off the loop; they read like any other."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.http.conftest import Running, StartServer

PROMPT = [97 + number % 26 for number in range(700)]


async def chunks(server: Running, path: str, body: dict[str, Any]) -> list[dict[str, Any]]:
    async with server.post(path, {**body, "stream": True}) as response:
        lines = [line async for line in response.content if line.startswith(b"data: {")]
    return [json.loads(line[6:]) for line in lines]


@pytest.mark.parametrize("num_prompts", [1, 2])
async def test_a_long_echo_streams_what_the_whole_answer_has(start: StartServer, num_prompts: int) -> None:
    server = await start()
    body = {"prompt": [PROMPT] * num_prompts, "echo": True, "logprobs": 2, "max_tokens": 20}
    async with server.post("/v1/completions", body) as response:
        whole = await response.json()
    streamed = await chunks(server, "/v1/completions", body)
    for index in range(num_prompts):
        parts = [chunk["choices"][0] for chunk in streamed if chunk["choices"][0]["index"] == index]
        expected = whole["choices"][index]
        assert "".join(part["text"] for part in parts) == expected["text"]
        for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset"):
            told = [entry for part in parts if part["logprobs"] for entry in part["logprobs"][name]]
            assert told == expected["logprobs"][name]
            assert len(told) > len(PROMPT)


async def test_a_long_chat_answer_has_the_log_probabilities_of_all_its_tokens(start: StartServer) -> None:
    reply = "word " * 400
    server = await start(reply=reply)
    body = {"messages": [{"role": "user", "content": "x"}], "n": 2, "logprobs": True, "top_logprobs": 3}
    async with server.post("/v1/chat/completions", body) as response:
        answer = await response.json()
    for choice in answer["choices"]:
        assert choice["message"]["content"] == reply
        entries = choice["logprobs"]["content"]
        assert "".join(entry["token"] for entry in entries) == reply
        assert all(len(entry["top_logprobs"]) == 3 for entry in entries)
