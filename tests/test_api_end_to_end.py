"""The official client against a real tiny model: choices, scored prompts, JSON by a schema, forced tool calls."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import openai
import pytest
from aiohttp import web

from tests.tokenizers import CHAT_TEMPLATE, write_tiny_tokenizer
from tfserve.config import EngineConfig
from tfserve.engine.engine import Engine
from tfserve.http.app import create_app
from tfserve.http.service import Service

ASK: Any = [{"role": "user", "content": "Why?"}]
ANSWER = {
    "type": "object",
    "properties": {"ok": {"type": "boolean"}, "n": {"enum": [1, 2, 3]}},
    "required": ["ok", "n"],
    "additionalProperties": False,
}
SHOWS_TOOLS = "{% if tools %}Call with <tool_call>{{ tools | tojson }}</tool_call>{% endif %}"
TOOL: Any = {"type": "function", "function": {"name": "answer", "strict": True, "parameters": ANSWER}}


@pytest.fixture
async def client(tiny_qwen25: Path) -> AsyncIterator[openai.AsyncOpenAI]:
    write_tiny_tokenizer(tiny_qwen25)
    (tiny_qwen25 / "chat_template.jinja").write_text(SHOWS_TOOLS + CHAT_TEMPLATE)
    config = EngineConfig(model=str(tiny_qwen25), max_model_len=512, max_num_seqs=8, threads=1, debug_checks=True)
    with await asyncio.to_thread(Engine, config) as engine:
        service = Service(engine.config)
        service.ready(engine)
        runner = web.AppRunner(create_app(service), handler_cancellation=True, access_log=None)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        url = f"http://127.0.0.1:{runner.addresses[0][1]}/v1"
        async with openai.AsyncOpenAI(base_url=url, api_key="none", max_retries=0) as client:
            yield client
        await runner.cleanup()


async def test_what_an_engineer_asks_for(client: openai.AsyncOpenAI) -> None:
    model = (await client.models.list()).data[0].id

    several = await client.chat.completions.create(model=model, messages=ASK, n=3, seed=1, max_completion_tokens=12)
    texts = [choice.message.content for choice in several.choices]
    assert len(set(texts)) == 3
    again = await client.chat.completions.create(model=model, messages=ASK, n=3, seed=1, max_completion_tokens=12)
    assert [choice.message.content for choice in again.choices] == texts

    prompts = [[5, 6, 7, 8], [9, 10]]
    harness: Any = {"prompt": prompts, "temperature": 0, "logprobs": 1, "echo": True}
    scored = (await client.completions.create(model=model, max_tokens=1, **harness)).choices
    alone = (await client.completions.create(model=model, max_tokens=0, **harness)).choices
    for prompt, one, other in zip(prompts, scored, alone, strict=True):
        assert one.logprobs is not None
        assert other.logprobs is not None
        values, tops = one.logprobs.token_logprobs or [], one.logprobs.top_logprobs or []
        assert len(values) == len(tops) == len(prompt) + 1
        assert values[0] is None
        assert all(max(top.values()) >= value for value, top in zip(values[1:], tops[1:], strict=True))
        assert other.logprobs.token_logprobs == pytest.approx(values[:-1], abs=1e-4)

    schema: Any = {"type": "json_schema", "json_schema": {"name": "answer", "schema": ANSWER, "strict": True}}
    for stream_seed in range(3):
        answer = await client.chat.completions.create(
            model=model, messages=ASK, response_format=schema, seed=stream_seed
        )
        assert answer.choices[0].finish_reason == "stop"
        assert json.loads(answer.choices[0].message.content or "")["n"] in (1, 2, 3)

    async with client.chat.completions.stream(
        model=model, messages=ASK, tools=[TOOL], tool_choice="required", parallel_tool_calls=False, seed=5
    ) as events:
        choice = (await events.get_final_completion()).choices[0]
    assert choice.finish_reason == "tool_calls"
    (call,) = choice.message.tool_calls or []
    assert call.function.name == "answer"
    assert set(json.loads(call.function.arguments)) == {"ok", "n"}
