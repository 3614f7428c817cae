"""Answers to clients for exact outputs of a model: calls, text that is invalid in JSON, split characters, stops."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from tokenizers import AddedToken
from tokenizers import Tokenizer as Backend

from tests.http.conftest import Running
from tests.http.tool_templates import LLAMA3, QWEN25
from tests.scripted import Script, scripted_server, write_scripted_model

pytestmark = pytest.mark.asyncio(loop_scope="module")

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
"""The model's output for a call, and the calls that a client gets; none: all of it is text."""


class Desk:
    """A server whose model writes the text of a test for each question; several tests share it."""

    def __init__(self, server: Running, scripts: dict[str, Script]) -> None:
        self.server = server
        self._scripts = scripts

    def question(self, script: Script) -> str:
        """A prompt that `script` answers."""
        question = f"question {len(self._scripts)}?"
        self._scripts[question] = script
        return question


async def desk(model_dir: Path, chat_template: str) -> AsyncIterator[Desk]:
    scripts: dict[str, Script] = {}
    write_scripted_model(model_dir, chat_template)
    async with scripted_server(model_dir, scripts, max_model_len=4096) as server:
        yield Desk(server, scripts)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def hermes(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Desk]:
    async for each in desk(tmp_path_factory.mktemp("hermes"), QWEN25):
        yield each


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def llama(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Desk]:
    async for each in desk(tmp_path_factory.mktemp("llama"), LLAMA3):
        yield each


async def answers(desk: Desk, script: Script, **body: Any) -> list[tuple[str, list[tuple[str, Any]], str]]:
    """Text, calls and finish reason of a chat answer: whole, and streamed."""
    body = {"messages": [{"role": "user", "content": desk.question(script)}], "max_tokens": 400, **body}
    async with desk.server.post(CHAT, body) as response:
        assert response.status == 200, await response.text()
        (choice,) = (await response.json())["choices"]
    message = choice["message"]
    found = [(message["content"] or "", message.get("tool_calls", []), choice["finish_reason"])]
    async with desk.server.post(CHAT, {**body, "stream": True}) as response:
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
async def test_hermes_calls_and_what_is_none(hermes: Desk, call: str, calls: list[Any]) -> None:
    script = f"So:\n<tool_call>\n{call}\n</tool_call>"
    expected = ("So:", calls, "tool_calls") if calls else (script, [], "stop")
    assert await answers(hermes, script, tools=[WEATHER]) == [expected] * 2


@pytest.mark.parametrize("stop", [[], ["x"]])
async def test_calls_of_a_model_whose_tags_are_special_tokens(tmp_path: Path, stop: list[str]) -> None:
    """As some Hermes models name them; `skip_special_tokens` would leave them out."""
    write_scripted_model(tmp_path, QWEN25)
    backend = Backend.from_file(str(tmp_path / "tokenizer.json"))
    tags = [AddedToken(tag, special=True, normalized=False) for tag in ("<tool_call>", "</tool_call>")]
    backend.add_special_tokens(tags)
    backend.save(str(tmp_path / "tokenizer.json"))
    scripts: dict[str, Script] = {}
    async with scripted_server(tmp_path, scripts, max_model_len=4096) as server:
        assert server.engine.tokenizer.token_bytes(backend.token_to_id("<tool_call>")) == b"<tool_call>"
        script = f"So:\n<tool_call>\n{CALLS[4][0]}\n</tool_call>"
        found = await answers(Desk(server, scripts), script, tools=[WEATHER], stop=stop)
    assert found == [("So:", [OSLO], "tool_calls")] * 2


@pytest.mark.parametrize(("call", "calls"), CALLS)
async def test_llama_calls_and_what_is_none(llama: Desk, call: str, calls: list[Any]) -> None:
    expected = ("", calls, "tool_calls") if calls else (call, [], "stop")
    assert await answers(llama, call, tools=[WEATHER]) == [expected] * 2


@pytest.mark.parametrize(
    "text",
    [
        "Write a <tool_call> tag, then JSON.",
        "Tags:\n\n <tool_call> and </tool_call>  end\n",
        '<tool_call>{"name": "wea',
        'a  <tool_call>{"name": "</tool_call>" x',
    ],
)
async def test_text_that_is_no_call_stays_as_it_is(hermes: Desk, text: str) -> None:
    assert await answers(hermes, text, tools=[WEATHER]) == [(text, [], "stop")] * 2


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
    hermes: Desk, arguments: str, status: int, shown: str
) -> None:
    called = {"type": "function", "function": {"name": "w", "arguments": arguments}}
    asked = {"role": "user", "content": hermes.question("Yes.")}
    body = {"messages": [asked, {"role": "assistant", "tool_calls": [called]}], "max_tokens": 5}
    for path in (CHAT, "/tokenize"):
        async with hermes.server.post(path, body) as response:
            assert response.status == status
            answer = await response.json()
        if status == 400:
            assert answer["error"]["param"] == "messages[1].tool_calls[0].function.arguments"
    if status == 200:
        async with hermes.server.post("/detokenize", {"tokens": answer["tokens"]}) as response:
            assert shown in (await response.json())["prompt"]


async def test_half_a_character_in_a_body_becomes_a_replacement_character(hermes: Desk) -> None:
    """JavaScript writes a string that was cut inside an emoji so."""
    prompt = hermes.question("Yes.").encode() + rb" \ud83d, \\ud83d \ud83d\ude00"
    body = b'{"prompt": "%b", "stop": "\\udc00", "max_tokens": 1, "echo": true}' % prompt
    async with hermes.server.post("/v1/completions", body) as response:
        assert response.status == 200
        assert rf"? {LOST}, \ud83d 😀" in (await response.json())["choices"][0]["text"]


HUGE = 2**64


@pytest.mark.parametrize(
    ("schema", "place"),
    [
        ({"type": "object", "properties": {"a": {"type": "integer", "maximum": HUGE}}}, "$.properties.a.maximum"),
        ({"type": ["object", "integer"], "minimum": -HUGE}, "$.minimum"),
        ({"const": 2**53 + 1}, "$.const"),
        ({"enum": [1, {"a": -(2**63)}]}, "$.enum[1].a"),
        ({"type": "object", "default": HUGE}, "$.default"),
        ({"type": "object", "properties": {"a": {"examples": [HUGE]}}}, "$.properties.a.examples[0]"),
    ],
)
async def test_integers_too_large_for_a_schema_are_named(hermes: Desk, schema: dict[str, Any], place: str) -> None:
    wanted = {"type": "json_schema", "json_schema": {"name": "n", "schema": schema}}
    tool = {"type": "function", "function": {"name": "f", "parameters": schema}}
    for fields, param in (
        ({"response_format": wanted}, "response_format"),
        ({"tools": [tool], "tool_choice": "required"}, "tools[0].function.parameters"),
    ):
        async with hermes.server.post(CHAT, {"messages": ASK, **fields}) as response:
            assert response.status == 400
            error = (await response.json())["error"]
        assert error["param"] == param
        assert f"{place} is an integer beyond" in error["message"]


async def test_large_integers_in_a_schema_are_served_exactly(hermes: Desk) -> None:
    schema = {"enum": [2**53, -(2**53)], "maximum": 2**63 - 1, "default": 2**60}
    wanted = {"type": "json_schema", "json_schema": {"name": "n", "schema": schema}}
    found = await answers(hermes, "-9007199254740992", response_format=wanted)
    assert found == [("-9007199254740992", [], "stop")] * 2


FAMILY = "Hi 👨‍👩‍👧! Ça va?"


async def test_text_offsets_and_alternatives_where_characters_are_split(hermes: Desk) -> None:
    body = {"prompt": hermes.question(FAMILY), "max_tokens": 100, "logprobs": 10}
    server, tokenizer = hermes.server, hermes.server.engine.tokenizer
    async with server.post("/v1/completions", body) as response:
        (whole,) = (await response.json())["choices"]
    async with server.post("/v1/completions", {**body, "stream": True}) as response:
        events = [json.loads(line[6:]) for line in (await response.text()).splitlines() if line.startswith("data: {")]
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


@pytest.mark.parametrize(
    ("skip", "text", "places"),
    [(True, "béb", [0, 1, 1, 2, 2, 3]), (False, "bé<|im_start|>b", [0, 1, 1, 2, 14, 15])],
)
async def test_text_offsets_behind_an_echoed_prompt(hermes: Desk, skip: bool, text: str, places: list[int]) -> None:
    """A special token has a place where the text shows it; a client writes one into its prompt."""
    question = f"{hermes.question(['b', 'é', 1, 'b'])}à<|im_start|>"
    body = {"prompt": question, "max_tokens": 100, "logprobs": 0, "echo": True, "skip_special_tokens": skip}
    async with hermes.server.post("/v1/completions", body) as response:
        (choice,) = (await response.json())["choices"]
    assert choice["text"] == question + text
    offsets, end = choice["logprobs"]["text_offset"], len(question)
    special = len("<|im_start|>")
    assert offsets[-9:] == [end - special - 1] * 2 + [end - special] + [end + place for place in places]


@pytest.mark.parametrize(
    ("stop", "text"),
    [("<|im_start|>", "Hello"), (["x", "<|im_start|>"], "Hello"), ("<|im_end|>", "Hello you"), ("you", "Hello ")],
)
async def test_a_stop_string_may_be_a_special_token(hermes: Desk, stop: Any, text: str) -> None:
    script = ["Hello", 1, " you", 2, " again"]
    assert await answers(hermes, script, stop=stop, ignore_eos=True) == [(text, [], "stop")] * 2
