"""Thoughts through the real engine and server: stops, limits, choices, and prompts that have begun or ended them."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Any

import pytest
import pytest_asyncio
from tokenizers import AddedToken
from tokenizers import Tokenizer as Backend

from tests.http.tool_templates import MISTRAL, QWEN3
from tests.scripted import Script, scripted_server, write_scripted_model
from tests.test_scripted_answers import CALLS, CHAT, OSLO, WEATHER, Desk, answers

pytestmark = pytest.mark.asyncio(loop_scope="module")

THINKING = QWEN3.replace("{%- if enable_thinking", "{{- '<think>\\n' }}\n    {%- if enable_thinking")
"""A template whose prompts end in the thoughts, as that of Qwen3's Thinking models."""

TEXT = "<think>\nOne, two.\n</think>\n\nIt is é 3."


async def desk(tmp_path_factory: pytest.TempPathFactory, template: str) -> AsyncIterator[Desk]:
    scripts: dict[str, Script] = {}
    model_dir = write_scripted_model(tmp_path_factory.mktemp("thinker"), template)
    backend = Backend.from_file(str(model_dir / "tokenizer.json"))
    backend.add_tokens([AddedToken("<think>", normalized=False), AddedToken("</think>", normalized=False)])
    backend.save(str(model_dir / "tokenizer.json"))
    async with scripted_server(model_dir, scripts, max_model_len=4096) as server:
        yield Desk(server, scripts)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def qwen3(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Desk]:
    async for each in desk(tmp_path_factory, QWEN3):
        yield each


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def thinking(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Desk]:
    async for each in desk(tmp_path_factory, THINKING):
        yield each


async def read(desk: Desk, script: Script, **body: Any) -> list[tuple[str | None, str | None, str]]:
    """Thoughts, content and finish reason of each choice: whole, and then streamed."""
    body = {"messages": [{"role": "user", "content": desk.question(script)}], "max_tokens": 200, **body}
    async with desk.server.post(CHAT, body) as response:
        assert response.status == 200, await response.text()
        choices = (await response.json())["choices"]
    found = [
        (each["message"].get("reasoning_content"), each["message"]["content"], each["finish_reason"])
        for each in choices
    ]
    async with desk.server.post(CHAT, {**body, "stream": True}) as response:
        events = (await response.text()).split("\n\n")
    streamed = [json.loads(event.removeprefix("data: "))["choices"][0] for event in events[:-2]]
    for number in range(len(choices)):
        own = [each for each in streamed if each["index"] == number]
        thoughts, content = (
            "".join(each["delta"].get(name, "") for each in own) or None for name in ("reasoning_content", "content")
        )
        found.append((thoughts, content, own[-1]["finish_reason"]))
    return found


@pytest.mark.parametrize(
    ("script", "fields", "expected"),
    [
        (TEXT, {}, ("One, two.", "It is é 3.", "stop")),
        (TEXT, {"stop": ["two"]}, ("One,", None, "stop")),
        (TEXT, {"stop": ["\n</think>\n\nIt"]}, ("One, two.", None, "stop")),
        (TEXT, {"stop": ["</think>"]}, ("One, two.", None, "stop")),
        (TEXT, {"stop": ["</think>"], "include_stop_str_in_output": True}, ("One, two.", None, "stop")),
        (TEXT, {"stop": ["</think>\n\nNo", "é"]}, ("One, two.", "It is ", "stop")),
        (TEXT, {"skip_special_tokens": False}, ("One, two.", "It is é 3.", "stop")),
        (TEXT, {"max_tokens": 4}, ("One", None, "length")),
        ("It is 3.", {}, (None, "It is 3.", "stop")),
        (TEXT, {"response_format": {"type": "text"}}, ("One, two.", "It is é 3.", "stop")),
        ('{"a": 1}', {"response_format": {"type": "json_object"}}, (None, '{"a": 1}', "stop")),
    ],
)
async def test_thoughts_and_answer(qwen3: Desk, script: Script, fields: dict[str, Any], expected: Any) -> None:
    found = await read(qwen3, script, **fields)
    if fields.get("max_tokens"):
        assert [(content, reason) for _, content, reason in found] == [expected[1:]] * 2
        assert all("One, two.".startswith(thoughts or "") for thoughts, _, _ in found)
    else:
        assert found == [expected] * 2


async def test_every_choice_is_parted_by_itself(qwen3: Desk) -> None:
    assert await read(qwen3, TEXT, n=3) == [("One, two.", "It is é 3.", "stop")] * 6


async def test_thinking_that_is_turned_off_leaves_the_tag_text(qwen3: Desk) -> None:
    quiet = {"chat_template_kwargs": {"enable_thinking": False}}
    assert await read(qwen3, "It is 3.", **quiet) == [(None, "It is 3.", "stop")] * 2
    assert await read(qwen3, "<think> is a tag.", **quiet) == [(None, "<think> is a tag.", "stop")] * 2


@pytest.mark.parametrize(
    ("script", "expected"),
    [
        ("One, two.\n</think>\n\nIt is 3.", ("One, two.", "It is 3.", "stop")),
        ("One, two.", ("One, two.", None, "stop")),
    ],
)
async def test_a_prompt_may_have_begun_the_thoughts(thinking: Desk, script: Script, expected: Any) -> None:
    assert await read(thinking, script) == [expected] * 2


async def test_a_grammar_in_a_prompt_that_has_begun_the_thoughts_makes_an_answer(thinking: Desk) -> None:
    found = await read(thinking, '{"a": 1}', response_format={"type": "json_object"})
    assert found == [(None, '{"a": 1}', "stop")] * 2


async def test_calls_of_a_mistral_whose_tag_is_a_special_token(tmp_path_factory: pytest.TempPathFactory) -> None:
    model_dir = write_scripted_model(tmp_path_factory.mktemp("mistral"), MISTRAL)
    backend = Backend.from_file(str(model_dir / "tokenizer.json"))
    backend.add_special_tokens([AddedToken("[TOOL_CALLS]", special=True, normalized=False)])
    backend.save(str(model_dir / "tokenizer.json"))
    config = json.loads((model_dir / "tokenizer_config.json").read_text())
    (model_dir / "tokenizer_config.json").write_text(json.dumps(config | {"bos_token": "<|im_start|>"}))
    scripts: dict[str, Script] = {}
    async with scripted_server(model_dir, scripts, max_model_len=4096) as server:
        one = Desk(server, scripts)
        assert (
            await answers(one, f"So.[TOOL_CALLS] [{CALLS[4][0]}]", tools=[WEATHER])
            == [("So.", [OSLO], "tool_calls")] * 2
        )
        body = {"messages": [{"role": "user", "content": "[TOOL_CALLS] [{}]"}]}
        async with server.post("/tokenize", body) as response:
            assert backend.token_to_id("[TOOL_CALLS]") not in (await response.json())["tokens"]
