"""response_format and forced tool calls: what grammar reaches the engine."""

from __future__ import annotations

import json
from typing import Any

import pytest
from llguidance import LLMatcher, LLTokenizer

from tests.http.conftest import Running, StartServer
from tests.tokenizers import write_tiny_tokenizer
from tfserve.model.text.chat_template import ToolFormat

CHAT = "/v1/chat/completions"
ASK = [{"role": "user", "content": "Hi"}]
PERSON = {"type": "object", "properties": {"name": {"$ref": "#/$defs/n"}}, "$defs": {"n": {"type": "string"}}}
TOOLS = [
    {"type": "function", "function": {"name": "f", "parameters": {**PERSON, "required": ["name"]}}},
    {"type": "function", "function": {"name": "g"}},
]
G = {"type": "function", "function": {"name": "g"}}
G_CALL = '{"name": "g", "arguments": {}}'


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> LLTokenizer:
    path = write_tiny_tokenizer(tmp_path_factory.mktemp("tokenizer"))
    return LLTokenizer((path / "tokenizer.json").read_text(), eos_token=2)


async def grammar_of(server: Running, path: str = CHAT, **body: Any) -> str | None:
    need = {"messages": ASK} if path == CHAT else {"prompt": "Hi"}
    async with server.post(path, {**need, **body}) as response:
        assert response.status == 200, await response.text()
    return server.engine.live[-1].params.grammar


def accepts(tokenizer: LLTokenizer, grammar: str | None, text: str) -> bool:
    assert grammar is not None
    matcher = LLMatcher(tokenizer, grammar, log_level=0)
    tokens = tokenizer.tokenize_str(text)
    return matcher.try_consume_tokens(tokens) == len(tokens) and matcher.is_accepting()


@pytest.mark.parametrize("path", [CHAT, "/v1/completions"])
async def test_json_object_and_json_schema(start: StartServer, tokenizer: LLTokenizer, path: str) -> None:
    server = await start(reply="{}")
    assert await grammar_of(server, path, response_format={"type": "text"}) is None
    for format in ({"type": "json_object"}, {"type": "json_object", "schema": {}}):
        anything = await grammar_of(server, path, response_format=format)
        assert accepts(tokenizer, anything, '{"a": [1, {"b": null}]}')
        assert not accepts(tokenizer, anything, "[1]")
    schema = {"type": "json_schema", "json_schema": {"name": "person", "schema": PERSON, "strict": True}}
    others = [{"type": type, "schema": PERSON} for type in ("json_object", "json_schema")]
    for format in (schema, *others):
        person = await grammar_of(server, path, response_format=format, n=2)
        assert accepts(tokenizer, person, '{"name": "x"}')
        assert not accepts(tokenizer, person, '{"name": 3}')
        assert server.engine.live[-2].params.grammar == person


@pytest.mark.parametrize(
    ("format", "param"),
    [
        ({"type": "text", "schema": PERSON}, "response_format.schema"),
        ({"type": "json_schema", "schema": PERSON, "json_schema": {"name": "x"}}, "response_format.schema"),
        ({"type": "json_object", "json_schema": {"name": "x", "schema": PERSON}}, "response_format.json_schema"),
        ({"type": "text", "json_schema": {"name": "x", "schema": PERSON}}, "response_format.json_schema"),
        ({"type": "json_schema", "json_schema": {"name": "x"}}, "response_format.json_schema.schema"),
        ({"type": "json_schema"}, "response_format.json_schema"),
        ({"type": "structural_tag", "structures": []}, "response_format.type"),
    ],
)
async def test_a_schema_that_would_be_ignored_is_refused(start: StartServer, format: Any, param: str) -> None:
    server = await start()
    for path, need in ((CHAT, {"messages": ASK}), ("/v1/completions", {"prompt": "Hi"})):
        async with server.post(path, {**need, "response_format": format}) as response:
            assert (response.status, (await response.json())["error"]["param"]) == (400, param)
    assert not server.engine.live


@pytest.mark.parametrize(
    ("format", "f", "g", "wrong"),
    [
        (
            ToolFormat.HERMES,
            '<tool_call>\n{"name": "f", "arguments": {"name": "x"}}\n</tool_call>',
            '<tool_call>\n{"name": "g", "arguments": {}}\n</tool_call>',
            '<tool_call>\n{"name": "f", "arguments": {"name": 1}}\n</tool_call>',
        ),
        (
            ToolFormat.LLAMA3,
            '{"name": "f", "parameters": {"name": "x"}}',
            '{"name": "g", "parameters": {}}',
            '{"name": "f", "parameters": {}}',
        ),
        (
            ToolFormat.MISTRAL,
            '[{"name": "f", "arguments": {"name": "x"}}]',
            '[{"name": "g", "arguments": {}}]',
            '[{"name": "f", "arguments": {"name": 1}}]',
        ),
    ],
)
async def test_a_forced_call_is_one_that_the_parser_finds(
    start: StartServer, tokenizer: LLTokenizer, format: ToolFormat, f: str, g: str, wrong: str
) -> None:
    server = await start(reply=f)
    server.engine.tokenizer.tool_format = format
    assert await grammar_of(server, tools=TOOLS, tool_choice="auto") is None
    required = await grammar_of(server, tools=TOOLS, tool_choice="required")
    assert accepts(tokenizer, required, f)
    assert accepts(tokenizer, required, g)
    assert not accepts(tokenizer, required, wrong)
    assert not accepts(tokenizer, required, "Hello")
    only_g = await grammar_of(server, tools=TOOLS, tool_choice=G)
    assert accepts(tokenizer, only_g, g)
    assert not accepts(tokenizer, only_g, f)
    async with server.post(CHAT, {"messages": ASK, "tools": TOOLS, "tool_choice": "required"}) as response:
        choice = (await response.json())["choices"][0]
    assert choice["finish_reason"] == "tool_calls"
    assert json.loads(choice["message"]["tool_calls"][0]["function"]["arguments"]) == {"name": "x"}


@pytest.mark.parametrize(
    "parameters",
    [
        None,
        {},
        {"properties": {"n": {"type": "null"}}},
        {"type": ["object", "null"], "properties": {"n": {"type": "null"}}},
        {"anyOf": [{"type": "string"}, {"type": "object"}]},
        {"$ref": "#/$defs/a", "$defs": {"a": {"properties": {"n": {"anyOf": [{"$ref": "#/$defs/a"}]}}}}},
    ],
    ids=repr,
)
async def test_forced_arguments_are_an_object_whatever_else_the_parameters_leave_room_for(
    start: StartServer, tokenizer: LLTokenizer, parameters: Any
) -> None:
    server = await start()
    tools = [{"type": "function", "function": {"name": "f", "parameters": parameters}}]
    grammar = await grammar_of(server, tools=tools, tool_choice="required")
    for arguments, good in {"{}": True, '{"n": null}': True, "null": False, '"n"': False, "[]": False}.items():
        call = f'<tool_call>\n{{"name": "f", "arguments": {arguments}}}\n</tool_call>'
        assert accepts(tokenizer, grammar, call) is good


@pytest.mark.parametrize(
    ("format", "one_call", "two_calls"),
    [
        (ToolFormat.HERMES, f"<tool_call>\n{G_CALL}\n</tool_call>", f"<tool_call>\n{G_CALL}\n</tool_call>\n" * 2),
        (ToolFormat.MISTRAL, f"[{G_CALL}]", f"[{G_CALL}, {G_CALL}]"),
    ],
)
async def test_parallel_calls_can_be_forbidden(
    start: StartServer, tokenizer: LLTokenizer, format: ToolFormat, one_call: str, two_calls: str
) -> None:
    server = await start()
    server.engine.tokenizer.tool_format = format
    several = await grammar_of(server, tools=TOOLS, tool_choice="required")
    one = await grammar_of(server, tools=TOOLS, tool_choice="required", parallel_tool_calls=False)
    assert accepts(tokenizer, several, two_calls.rstrip())
    assert accepts(tokenizer, one, one_call)
    assert not accepts(tokenizer, one, two_calls.rstrip())
