"""What clients get when a model writes exactly this: calls, text that JSON cannot hold, split characters, stops."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.http.conftest import Running
from tests.http.tool_templates import LLAMA3, QWEN25
from tests.scripted import Scripts, scripted_server, write_scripted_model

CHAT = "/v1/chat/completions"
ASK = [{"role": "user", "content": "Weather?"}]
CITY = {"type": "object", "properties": {"city": {"type": "string"}}}
WEATHER = {"type": "function", "function": {"name": "weather", "parameters": CITY}}
LOST = "\N{REPLACEMENT CHARACTER}"
HALF = r"Os\ud83dlo"

OSLO = ("weather", {"city": "Oslo"})
MENDED = ("weather", {"city": f"Os{LOST}lo"})
CALLS: list[tuple[str, list[tuple[str, dict[str, str]]]]] = [
    (f'{{"name":"weather","arguments":{{"city":"{HALF}"}}}}', [MENDED]),
    (f'{{"name":"weather","parameters":{{"city":"{HALF}"}}}}', [MENDED]),
    ('{"name":"weather","arguments":{"city":"a</tool_call>b"}}', [("weather", {"city": "a</tool_call>b"})]),
    ('{"name":"weather","parameters":{"city":"Oslo"}}', [OSLO]),
    ('{"name":"weather","arguments":{"city":"Oslo"}}', [OSLO]),
    (r'{"name":"weather","parameters":"{\"city\": \"Oslo\"}"}', [OSLO]),
    (r'{"name":"weather","arguments":"{\"city\": \"Oslo\"}"}', [OSLO]),
    ('{"name":"weather"}', [("weather", {})]),
    *((f'{{"name":"weather","arguments":{{"city":{value}}}}}', []) for value in ("NaN", "-Infinity", "1e999")),
    *((f'{{"name":"weather","parameters":{value}}}', []) for value in ("null", '"Oslo"', "[NaN]")),
]
"""What the model writes of a call, and the calls that a client gets; none: all of it is text."""


@pytest.fixture(scope="module")
def hermes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_scripted_model(tmp_path_factory.mktemp("hermes"), QWEN25)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_scripted_model(tmp_path_factory.mktemp("llama"), LLAMA3)


@asynccontextmanager
async def writing(model_dir: Path, script: Scripts) -> AsyncIterator[Running]:
    async with scripted_server(model_dir, script, max_model_len=4096) as server:
        yield server


async def answers(server: Running, **body: Any) -> list[tuple[str, list[tuple[str, Any]], str]]:
    """Text, calls and finish reason of a chat answer: whole, and streamed."""
    body = {"messages": ASK, "max_tokens": 400, **body}
    async with server.post(CHAT, body) as response:
        assert response.status == 200, await response.text()
        (choice,) = (await response.json())["choices"]
    message = choice["message"]
    found = [(message["content"] or "", message.get("tool_calls", []), choice["finish_reason"])]
    async with server.post(CHAT, {**body, "stream": True}) as response:
        events = (await response.text()).split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    choices = [json.loads(event.removeprefix("data: "))["choices"][0] for event in events[:-2]]
    content = "".join(each["delta"].get("content", "") for each in choices)
    calls = [call for each in choices for call in each["delta"].get("tool_calls", [])]
    found.append((content, calls, choices[-1]["finish_reason"]))
    return [
        (content, [(call["function"]["name"], json.loads(call["function"]["arguments"])) for call in calls], reason)
        for content, calls, reason in found
    ]


@pytest.mark.parametrize(("call", "calls"), CALLS)
async def test_hermes_calls_and_what_is_none(hermes: Path, call: str, calls: list[Any]) -> None:
    script = f"So:\n<tool_call>\n{call}\n</tool_call>"
    expected = ("So:", calls, "tool_calls") if calls else (script, [], "stop")
    async with writing(hermes, script) as server:
        assert await answers(server, tools=[WEATHER]) == [expected] * 2


@pytest.mark.parametrize(("call", "calls"), CALLS)
async def test_llama_calls_and_what_is_none(llama: Path, call: str, calls: list[Any]) -> None:
    expected = ("", calls, "tool_calls") if calls else (call, [], "stop")
    async with writing(llama, call) as server:
        assert await answers(server, tools=[WEATHER]) == [expected] * 2


@pytest.mark.parametrize(
    "text",
    [
        "Write a <tool_call> tag, then JSON.",
        "Tags:\n\n <tool_call> and </tool_call>  end\n",
        '<tool_call>{"name": "wea',
        'a  <tool_call>{"name": "</tool_call>" x',
    ],
)
async def test_text_that_is_no_call_stays_as_it_is(hermes: Path, text: str) -> None:
    async with writing(hermes, text) as server:
        assert await answers(server, tools=[WEATHER]) == [(text, [], "stop")] * 2


@pytest.mark.parametrize(
    ("arguments", "status", "shown"),
    [
        (r'{"a": "\ud83d"}', 200, f'{{"a": "{LOST}"}}'),
        (r'{"a": "\ud83d\ude00"}', 200, '{"a": "😀"}'),
        (r'{"\udc00": {"b": ["\udc00"]}}', 200, f'{{"{LOST}": {{"b": ["{LOST}"]}}}}'),
        ('{"a": NaN}', 400, ""),
        ('{"a": [-Infinity]}', 400, ""),
        ('{"a": 1e999}', 400, ""),
        ('{"a": ' + "[" * 5000 + "]" * 5000 + "}", 400, ""),
    ],
)
async def test_a_history_with_odd_calls_is_served_or_a_400(
    hermes: Path, arguments: str, status: int, shown: str
) -> None:
    called = {"type": "function", "function": {"name": "w", "arguments": arguments}}
    body = {"messages": [*ASK, {"role": "assistant", "tool_calls": [called]}], "max_tokens": 5}
    async with writing(hermes, "Yes.") as server:
        for path in (CHAT, "/tokenize"):
            async with server.post(path, body) as response:
                assert response.status == status
                answer = await response.json()
            if status == 400:
                assert answer["error"]["param"] == "messages[1].tool_calls[0].function.arguments"
        if status == 200:
            async with server.post("/detokenize", {"tokens": answer["tokens"]}) as response:
                assert shown in (await response.json())["prompt"]


async def test_half_a_character_in_a_body_becomes_a_replacement_character(hermes: Path) -> None:
    """JavaScript writes a string that was cut inside an emoji so."""
    body = rb'{"prompt": "Hi \ud83d, \\ud83d \ud83d\ude00", "stop": "\udc00", "max_tokens": 1, "echo": true}'
    async with writing(hermes, "Yes.") as server, server.post("/v1/completions", body) as response:
        assert response.status == 200
        assert (await response.json())["choices"][0]["text"].startswith(rf"Hi {LOST}, \ud83d 😀")


HUGE = 2**64


@pytest.mark.parametrize(
    ("schema", "place"),
    [
        ({"type": "integer", "maximum": HUGE}, "$.maximum"),
        ({"type": "integer", "minimum": -HUGE}, "$.minimum"),
        ({"const": 2**53 + 1}, "$.const"),
        ({"enum": [1, {"a": -(2**63)}]}, "$.enum[1].a"),
        ({"type": "string", "default": HUGE}, "$.default"),
        ({"type": "object", "properties": {"a": {"examples": [HUGE]}}}, "$.properties.a.examples[0]"),
    ],
)
async def test_integers_too_large_for_a_schema_are_named(hermes: Path, schema: dict[str, Any], place: str) -> None:
    wanted = {"type": "json_schema", "json_schema": {"name": "n", "schema": schema}}
    tool = {"type": "function", "function": {"name": "f", "parameters": schema}}
    async with writing(hermes, "1") as server:
        for fields in ({"response_format": wanted}, {"tools": [tool], "tool_choice": "required"}):
            async with server.post(CHAT, {"messages": ASK, **fields}) as response:
                assert response.status == 400
                error = (await response.json())["error"]
            assert error["param"] == next(iter(fields))
            assert f"{place} is an integer beyond" in error["message"]


async def test_large_integers_in_a_schema_are_served_exactly(hermes: Path) -> None:
    schema = {"enum": [2**53, -(2**53)], "maximum": 2**63 - 1, "default": 2**60}
    wanted = {"type": "json_schema", "json_schema": {"name": "n", "schema": schema}}
    async with writing(hermes, "-9007199254740992") as server:
        found = await answers(server, response_format=wanted)
    assert found == [("-9007199254740992", [], "stop")] * 2


FAMILY = "Hi 👨‍👩‍👧! Ça va?"


async def test_text_offsets_and_alternatives_where_characters_are_split(hermes: Path) -> None:
    body = {"prompt": "Why?", "max_tokens": 100, "logprobs": 10}
    async with writing(hermes, FAMILY) as server:
        tokenizer = server.engine.tokenizer
        async with server.post("/v1/completions", body) as response:
            (whole,) = (await response.json())["choices"]
        async with server.post("/v1/completions", {**body, "stream": True}) as response:
            events = [
                json.loads(line[6:]) for line in (await response.text()).splitlines() if line.startswith("data: {")
            ]
    streamed = [event["choices"][0]["logprobs"] for event in events if event["choices"][0]["logprobs"]]
    logprobs = whole["logprobs"]
    assert {key: [each for part in streamed for each in part[key]] for key in logprobs} == logprobs
    assert "".join(event["choices"][0]["text"] for event in events) == whole["text"] == FAMILY

    pieces = [tokenizer.token_bytes(token) for token in (*tokenizer.encode(FAMILY), 2)]
    owner = [place for place, character in enumerate(FAMILY) for _ in character.encode()] + [len(FAMILY)]
    starts = [sum(map(len, pieces[:number])) for number in range(len(pieces))]
    assert logprobs["text_offset"] == [owner[start] for start in starts]
    assert {len(top) for top in logprobs["top_logprobs"]} == {10}
    split = [token for token in logprobs["tokens"] if token.startswith("bytes:")]
    assert r"bytes:\xf0\x9f" in {token[:14] for token in split}
    assert LOST not in json.dumps(logprobs, ensure_ascii=False)


async def test_text_offsets_behind_an_echoed_prompt_and_with_special_tokens(hermes: Path) -> None:
    body = {"max_tokens": 100, "logprobs": 0, "echo": True}
    async with writing(hermes, ["é", 1, "b"]) as server:
        for prompt, skip, text, offsets in (
            ("à<|im_start|>b", True, "à<|im_start|>béb", [0, 0, 1, 13, 14, 14, 15, 15, 16]),
            ("à<|im_start|>b", False, "à<|im_start|>bé<|im_start|>b", [0, 0, 1, 13, 14, 14, 15, 27, 28]),
            ([1, 68], True, None, [0, 0, 1, 1, 2, 2, 3]),
        ):
            async with server.post(
                "/v1/completions", {**body, "prompt": prompt, "skip_special_tokens": skip}
            ) as answer:
                (choice,) = (await answer.json())["choices"]
            assert text in (choice["text"], None)
            assert choice["logprobs"]["text_offset"] == offsets


@pytest.mark.parametrize(
    ("stop", "text"),
    [("<|im_start|>", "Hello"), (["x", "<|im_start|>"], "Hello"), ("<|im_end|>", "Hello you"), ("you", "Hello ")],
)
async def test_a_stop_string_may_be_a_special_token(hermes: Path, stop: Any, text: str) -> None:
    async with writing(hermes, ["Hello", 1, " you", 2, " again"]) as server:
        assert await answers(server, stop=stop, ignore_eos=True) == [(text, [], "stop")] * 2
