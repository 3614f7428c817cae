"""Thoughts through the real engine and server: stops, limits, choices, and prompts that have begun or ended them."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from tokenizers import AddedToken
from tokenizers import Tokenizer as Backend

from tests.http.tool_templates import MISTRAL, QWEN3
from tests.scripted import Script, scripted_engine, scripted_server, write_scripted_model
from tests.test_scripted_answers import CALLS, CHAT, OSLO, WEATHER, Desk, answers
from tfserve.types import Place, PromptTokens, SamplingParams, StreamState

pytestmark = pytest.mark.asyncio(loop_scope="module")

THINKING = QWEN3.replace("{%- if enable_thinking", "{{- '<think>\\n' }}\n    {%- if enable_thinking")
"""A template whose prompts end in the thoughts, as that of Qwen3's Thinking models."""

SLOW = {"generate_ahead_s": 4.0}
"""No answer is generated further ahead of its reader; what has no reader is not held back."""

TEXT = "<think>\nOne, two.\n</think>\n\nIt is é 3."


def thinker(model_dir: Path, template: str) -> Path:
    """A scripted model whose tags are tokens of their own."""
    write_scripted_model(model_dir, template)
    backend = Backend.from_file(str(model_dir / "tokenizer.json"))
    backend.add_tokens([AddedToken("<think>", normalized=False), AddedToken("</think>", normalized=False)])
    backend.save(str(model_dir / "tokenizer.json"))
    return model_dir


async def desk(tmp_path_factory: pytest.TempPathFactory, template: str) -> AsyncIterator[Desk]:
    scripts: dict[str, Script] = {}
    model_dir = thinker(tmp_path_factory.mktemp("thinker"), template)
    async with scripted_server(model_dir, scripts, max_model_len=4096, scheduler=SLOW) as server:
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


async def state_when(desk: Desk, script: Script, text: str, **body: Any) -> tuple[StreamState, str]:
    """The scheduler's view of a stream once `text` has come of it, and the stream's id; it goes on."""
    body = {"messages": [{"role": "user", "content": desk.question(script)}], "stream": True, **body}
    response = await desk.server.session.post(desk.server.url + CHAT, json=body)
    told = ""
    while text not in told:
        line = (await response.content.readline()).decode()
        if line.startswith("data: {"):
            delta = json.loads(line.removeprefix("data: "))["choices"][0]["delta"]
            told += delta.get("reasoning_content", "") + delta.get("content", "")
    (state,) = await desk.server.engine.streams()
    return state, state.id


async def test_while_it_thinks_nothing_is_unread_and_no_first_token_has_come(thinking: Desk) -> None:
    state, name = await state_when(thinking, "One, two. " * 300, "two. One", max_tokens=2000, consumption_rate=1.0)
    try:
        assert state.num_thought_tokens > 3
        assert (state.ttft_s, state.time_to_empty_s, state.num_unread, state.stall_s) == (None, None, 0, 0)
        async with thinking.server.post(f"/v1/streams/{name}/buffer", {"played_tokens": 3}) as response:
            assert await response.json() == {"id": name, "played_tokens": 0, "unread_tokens": 0}
    finally:
        async with thinking.server.post("/abort_request", {"request_id": name}):
            pass


async def test_a_slow_reader_slows_the_answer_and_no_thought(qwen3: Desk) -> None:
    # At the reader's pace the thoughts alone would take minutes.
    script = "<think>" + "One, two. " * 50 + "</think>" + "It is 3. " * 50
    state, name = await state_when(qwen3, script, "It", max_tokens=2000, consumption_rate=1.0)
    try:
        assert state.num_thought_tokens > 100
        assert state.num_output_tokens - state.num_thought_tokens < 10
        assert state.ttft_s is not None
    finally:
        async with qwen3.server.post("/abort_request", {"request_id": name}):
            pass


@pytest.mark.parametrize(("max_tokens", "has_first"), [(5, False), (200, True)])
async def test_usage_has_a_first_token_where_the_answer_has_one(qwen3: Desk, max_tokens: int, has_first: bool) -> None:
    body = {"messages": [{"role": "user", "content": qwen3.question(TEXT)}], "max_tokens": max_tokens}
    async with qwen3.server.post(CHAT, body) as response:
        usage = (await response.json())["usage"]
    num_thoughts = usage["completion_tokens_details"]["reasoning_tokens"]
    assert ("ttft_s" in usage, num_thoughts < usage["completion_tokens"]) == (has_first, has_first)


TIGHT = {"schedule_interval_s": 0.01, "min_residency_s": 0.01}


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("policy", ["round-robin", "tokenflow", "fcfs-greedy", "andes"])
async def test_thoughts_are_counted_once_whatever_interrupts_them(tmp_path: Path, policy: str, depth: int) -> None:
    script = "<think>" + "One, two. " * 20 + "</think>" + "It is 3. " * 10
    settings = {"max_num_seqs": 6, "pipeline_depth": depth, "scheduler": {"policy": policy, **TIGHT}}
    model_dir = thinker(tmp_path, QWEN3)
    with scripted_engine(model_dir, script, max_model_len=512, num_gpu_blocks_override=33, **settings) as engine:
        opened = [engine.tokenizer.encode("<think>")[0], *engine.tokenizer.encode("One")]
        prompts = [PromptTokens([*opened, 5 + i], Place.BEFORE) for i in range(6)]
        outputs = engine.generate(prompts, SamplingParams(temperature=0, max_tokens=400), rate=200.0)
        assert engine.stats().num_preemptions > 0
    end = engine.tokenizer.encode("</think>")[0]
    assert {output.num_thought_tokens for output in outputs} == {outputs[0].token_ids.index(end) + 1}
    assert all(output.token_ids == outputs[0].token_ids for output in outputs)
    assert all(output.times.first_token_s is not None for output in outputs if output.times is not None)


async def test_a_conversation_of_the_embedded_engine_knows_its_thoughts_and_a_plain_prompt_has_none(
    tmp_path: Path,
) -> None:
    with scripted_engine(thinker(tmp_path, QWEN3), TEXT, max_model_len=512) as engine:
        params = SamplingParams(temperature=0, max_tokens=100)
        chat, plain = engine.chat("Hm?", params), engine.generate("Hm?", params)[0]
        assert chat.token_ids == plain.token_ids
        assert chat.num_thought_tokens == chat.token_ids.index(engine.tokenizer.encode("</think>")[0]) + 1
        assert plain.num_thought_tokens == 0
        cut = engine.chat("Hm?", SamplingParams(temperature=0, max_tokens=4))
        assert cut.num_thought_tokens == cut.num_output_tokens == 4
        assert cut.times is not None
        assert cut.times.first_token_s is None


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
