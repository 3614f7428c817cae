"""Tools: what the template is shown, and calls found in both formats, whole and streamed at every split."""

from __future__ import annotations

import json
from typing import Any

import openai
import pytest

from tests.http.conftest import Running, StartServer
from tests.http.test_answers import stream
from tfserve.http.tool_parsing import Call, tool_call_parser
from tfserve.model.text.chat_template import ChatTemplate, ToolFormat

CHAT = "/v1/chat/completions"
ASK: Any = [{"role": "user", "content": "Weather in Rome?"}]
SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
TOOLS: Any = [{"type": "function", "function": {"name": "weather", "description": "Looks", "parameters": SCHEMA}}]
HERMES_CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Rome"}}\n</tool_call>'
LLAMA_CALL = '{"name": "weather", "parameters": {"city": "Rome"}}'
ROME = Call("weather", '{"city": "Rome"}')
TAGGED_CALL = HERMES_CALL.replace("Rome", "a</tool_call>b")
MIXED_UP = [
    '{"name": "weather", "parameters": {"city": "Rome"}}',
    '{"name": "weather", "arguments": {"city": "Rome"}}',
    '{"name": "weather", "parameters": "{\\"city\\": \\"Rome\\"}"}',
    '{"arguments": "{\\"city\\": \\"Rome\\"}", "name": "weather"}',
]
"""One call, with its arguments under the names of both formats, as an object and as the JSON of one."""

NO_CALLS = [
    *(f'{{"name": "weather", "arguments": {{"city": {value}}}}}' for value in ("NaN", "-Infinity", "1e999", "{")),
    *(
        f'{{"name": "weather", "parameters": {value}}}'
        for value in ("null", "3", "[]", '"Rome"', '""', '"{\\"a\\": NaN}"')
    ),
    '{"name": 3, "arguments": {}}',
    '{"name": "weather", "city": "Rome"}',
    '{"name": "weather", "args": {"city": "Rome"}}',
]
"""JSON objects, nearly, whose arguments are none."""

HALF_A_PAIR = r'{"name": "weather", "arguments": {"city": "Os\ud83dlo"}}'
REPLACED = Call("weather", '{"city": "Os\N{REPLACEMENT CHARACTER}lo"}')

HERMES, LLAMA, MISTRAL = ToolFormat.HERMES, ToolFormat.LLAMA3, ToolFormat.MISTRAL
MISTRAL_CALL = '{"name": "weather", "arguments": {"city": "Rome"}, "id": "a1B2c3D4e"}'


@pytest.mark.parametrize(
    ("format", "text", "content", "calls"),
    [
        (HERMES, HERMES_CALL, "", [ROME]),
        (HERMES, f"Let me see.\n{HERMES_CALL}\n{HERMES_CALL}\n", "Let me see.", [ROME, ROME]),
        (HERMES, f"{HERMES_CALL} Done.", "Done.", [ROME]),
        (HERMES, "a < b <tool_c> </tool_call>\n", "a < b <tool_c> </tool_call>\n", []),
        (HERMES, "<tool_call>nonsense</tool_call> ok", "<tool_call>nonsense</tool_call> ok", []),
        (HERMES, HERMES_CALL.removesuffix("</tool_call>"), "", [ROME]),
        (HERMES, '<tool_call>{"name": "wea', '<tool_call>{"name": "wea', []),
        (HERMES, '<tool_call>{"name": "f"}</tool_call>', "", [Call("f", "{}")]),
        (
            HERMES,
            '<tool_call>{"name": "f", "arguments": 3}</tool_call>',
            '<tool_call>{"name": "f", "arguments": 3}</tool_call>',
            [],
        ),
        (HERMES, f"Now: {TAGGED_CALL} ok", "Now:  ok", [Call("weather", '{"city": "a</tool_call>b"}')]),
        (HERMES, f"One\n{HERMES_CALL}\n{HERMES_CALL} two.\n", "One\n\n two.\n", [ROME, ROME]),
        (HERMES, f"<tool_call>{{json}} is a tag.\n{HERMES_CALL}", "<tool_call>{json} is a tag.", [ROME]),
        (HERMES, f'<tool_call>{{"name": "wea {HERMES_CALL}', '<tool_call>{"name": "wea', [ROME]),
        (HERMES, f'<tool_call>{{"x": "<tool_call> {HERMES_CALL} "', '<tool_call>{"x": "<tool_call>  "', [ROME]),
        (HERMES, f"{HERMES_CALL.removesuffix('</tool_call>')}{HERMES_CALL}", "", [ROME, ROME]),
        *((HERMES, HERMES_CALL[:-cut], "", [ROME]) for cut in range(1, len("</tool_call>"))),
        (HERMES, '<tool_call>{"name": "a <tool_call> b"}</tool_call>', "", [Call("a <tool_call> b", "{}")]),
        (HERMES, '<tool_call>{"name": "wea</tool_', '<tool_call>{"name": "wea</tool_', []),
        (HERMES, f"{TAGGED_CALL}\n{HERMES_CALL}", "", [Call("weather", '{"city": "a</tool_call>b"}'), ROME]),
        (HERMES, TAGGED_CALL.removesuffix("</tool_call>"), "", [Call("weather", '{"city": "a</tool_call>b"}')]),
        (HERMES, 'a <tool_call>{"x": "</tool_call>" b', 'a <tool_call>{"x": "</tool_call>" b', []),
        (HERMES, f'<tool_call>{{"x": "</tool_call>\n{HERMES_CALL}', '<tool_call>{"x": "</tool_call>', [ROME]),
        (HERMES, f'<tool_call>{{"x": "</tool_call> {HERMES_CALL}', '<tool_call>{"x": "</tool_call>', [ROME]),
        (HERMES, '<tool_call>{"x": "\\"</tool_call> y', '<tool_call>{"x": "\\"</tool_call> y', []),
        (HERMES, "Write a <tool_call> tag, then JSON.", "Write a <tool_call> tag, then JSON.", []),
        (HERMES, " \n<tool_call>\n</tool_call> ", " \n<tool_call>\n</tool_call> ", []),
        (HERMES, "a <tool_call></tool_call>  b", "a <tool_call></tool_call>  b", []),
        (HERMES, "a  <tool_call>\n [1]</tool_call>", "a  <tool_call>\n [1]</tool_call>", []),
        (HERMES, f"Use <tool_call> so: {HERMES_CALL}", "Use <tool_call> so:", [ROME]),
        (HERMES, f"{HERMES_CALL} \n <tool_call> x", "<tool_call> x", [ROME]),
        *((HERMES, f"<tool_call>{call}</tool_call>", "", [ROME]) for call in MIXED_UP),
        *((HERMES, f"a <tool_call>{text}</tool_call>", f"a <tool_call>{text}</tool_call>", []) for text in NO_CALLS),
        *((LLAMA, call, "", [ROME]) for call in (*MIXED_UP, f"<|python_tag|>{MIXED_UP[0]}")),
        *((LLAMA, text, text, []) for text in NO_CALLS),
        (LLAMA, f"{LLAMA_CALL}; {MIXED_UP[1]}", "", [ROME, ROME]),
        (LLAMA, f"{LLAMA_CALL}; {NO_CALLS[0]}", f"{LLAMA_CALL}; {NO_CALLS[0]}", []),
        (LLAMA, '{"name": "weather"}', "", [Call("weather", "{}")]),
        (LLAMA, '{"type": "function", "name": "weather"}', "", [Call("weather", "{}")]),
        (LLAMA, HALF_A_PAIR.replace("arguments", "parameters"), "", [REPLACED]),
        (HERMES, f"<tool_call>{HALF_A_PAIR}</tool_call>", "", [REPLACED]),
        (HERMES, "", "", []),
        (LLAMA, LLAMA_CALL, "", [ROME]),
        (LLAMA, f"\n<|python_tag|>{LLAMA_CALL}; {LLAMA_CALL}", "", [ROME, ROME]),
        (LLAMA, "It is sunny; {x}", "It is sunny; {x}", []),
        (LLAMA, '{"name": "unknown", "parameters": {}}', '{"name": "unknown", "parameters": {}}', []),
        (LLAMA, '{"temperature": 3}', '{"temperature": 3}', []),
        (LLAMA, LLAMA_CALL[:-4], LLAMA_CALL[:-4], []),
        (LLAMA, "<|python", "<|python", []),
        (LLAMA, "{" * 100_000, "{" * 100_000, []),
        (MISTRAL, f"[TOOL_CALLS] [{MISTRAL_CALL}]", "", [ROME]),
        (MISTRAL, f"[TOOL_CALLS][{MISTRAL_CALL}, {MISTRAL_CALL}]", "", [ROME, ROME]),
        (MISTRAL, f"Let me see.\n[TOOL_CALLS] [{MISTRAL_CALL}]\n", "Let me see.", [ROME]),
        (MISTRAL, '[TOOL_CALLS]weather[ARGS]{"city": "Rome"}', "", [ROME]),
        (MISTRAL, 'a[TOOL_CALLS]weather[CALL_ID]a1B2c3D4e[ARGS]{"city": "Rome"}', "a", [ROME]),
        (MISTRAL, '[TOOL_CALLS]weather{"city": "Rome"}[TOOL_CALLS]f[ARGS]{}', "", [ROME, Call("f", "{}")]),
        (MISTRAL, f"[{MISTRAL_CALL}]", "", [ROME]),
        (MISTRAL, f"Look: [{MISTRAL_CALL}]", f"Look: [{MISTRAL_CALL}]", []),
        (MISTRAL, '[{"name": "unknown", "arguments": {}}]', '[{"name": "unknown", "arguments": {}}]', []),
        (MISTRAL, "[1, 2] is a list. ", "[1, 2] is a list. ", []),
        (MISTRAL, " [TOOL", " [TOOL", []),
        (MISTRAL, "[TOOL_CALLS]", "[TOOL_CALLS]", []),
        (MISTRAL, "a [TOOL_CALLS] nonsense", "a [TOOL_CALLS] nonsense", []),
        (MISTRAL, f"a [TOOL_CALLS] [{MISTRAL_CALL}", f"a [TOOL_CALLS] [{MISTRAL_CALL}", []),
        (MISTRAL, f"[TOOL_CALLS] [{MISTRAL_CALL}, 3]", f"[TOOL_CALLS] [{MISTRAL_CALL}, 3]", []),
        (MISTRAL, f"[TOOL_CALLS] [{MISTRAL_CALL}] so", f"[TOOL_CALLS] [{MISTRAL_CALL}] so", []),
        *((MISTRAL, f"[TOOL_CALLS] [{text}]", f"[TOOL_CALLS] [{text}]", []) for text in NO_CALLS),
        *((MISTRAL, f"[TOOL_CALLS] [{text}]", "", [ROME]) for text in MIXED_UP),
        (MISTRAL, f"[TOOL_CALLS] [{HALF_A_PAIR}]", "", [REPLACED]),
        (MISTRAL, "", "", []),
    ],
)
def test_calls_are_found_however_the_text_is_cut(
    format: ToolFormat, text: str, content: str, calls: list[Call]
) -> None:
    for size in (1, 3, 7, max(len(text), 1)) if len(text) < 1000 else (len(text),):
        parser = tool_call_parser(format, {"weather"})
        found = [parser.push(text[i : i + size]) for i in range(0, len(text), size)] + [parser.finish()]
        assert "".join(part.content for part in found) == content
        assert [call for part in found for call in part.calls] == calls


def test_text_before_a_call_is_shown_at_once() -> None:
    parser = tool_call_parser(HERMES, ())
    assert parser.push("Let me see.").content == "Let me see."
    assert parser.push("\n<tool").content == ""
    assert parser.push("s>").content == "\n<tools>"


@pytest.mark.parametrize(
    ("source", "format"),
    [
        ("{{ messages[0].content }}", None),
        ("{% if tools %}<tool_call>{% endif %}", HERMES),
        ("{% if tools %}Environment: ipython{% endif %}", LLAMA),
        ("{% if tools %}[TOOL_CALLS]{% endif %}", MISTRAL),
        ("{% if tools %}{{ tools }}{% endif %}", None),
    ],
)
def test_the_template_tells_the_format(source: str, format: ToolFormat | None) -> None:
    assert ChatTemplate(source, {}).tool_format is format


@pytest.fixture(params=[HERMES, LLAMA, MISTRAL])
async def caller(request: pytest.FixtureRequest, start: StartServer) -> Running:
    """A server whose model calls a tool twice."""
    replies = {
        HERMES: f"Sure. {HERMES_CALL}\n{HERMES_CALL}",
        LLAMA: f"{LLAMA_CALL}; {LLAMA_CALL}",
        MISTRAL: f"Sure.[TOOL_CALLS] [{MISTRAL_CALL}, {MISTRAL_CALL}]",
    }
    server = await start(reply=replies[request.param])
    server.engine.tokenizer.tool_format = request.param
    return server


async def test_the_official_client_gets_tool_calls(caller: Running) -> None:
    async with openai.AsyncOpenAI(base_url=caller.url + "/v1", api_key="key", max_retries=0) as client:
        whole = (await client.chat.completions.create(model="tiny", messages=ASK, tools=TOOLS)).choices[0]
        assert whole.finish_reason == "tool_calls"
        calls = whole.message.tool_calls or []
        assert [(call.type, call.function.name, json.loads(call.function.arguments)) for call in calls] == [
            ("function", "weather", {"city": "Rome"})
        ] * 2
        assert len({call.id for call in calls}) == 2
        assert whole.message.content == (None if caller.engine.tokenizer.tool_format is LLAMA else "Sure.")
        answers = [{"role": "tool", "tool_call_id": call.id, "content": "sunny"} for call in calls]
        again: Any = [*ASK, whole.message, *answers]
        await client.chat.completions.create(model="tiny", messages=again, tools=TOOLS, tool_choice="none")
        prompt = bytes(caller.engine.live[-1].prompt).decode()
        assert prompt.startswith('[{"name": "weather", "arguments": {"city": "Rome"}}')
        assert prompt.endswith("<tool>sunny<tool>sunny<assistant>")
        one = await client.chat.completions.create(model="tiny", messages=ASK, tools=TOOLS, parallel_tool_calls=False)
        assert len(one.choices[0].message.tool_calls or []) == 1
        # Most releases of the client parse the calls of strict tools only.
        strict: Any = [{**tool, "function": {**tool["function"], "strict": True}} for tool in TOOLS]
        async with client.chat.completions.stream(model="tiny", messages=ASK, tools=strict) as events:
            final = (await events.get_final_completion()).choices[0]
        assert [call.function.name for call in final.message.tool_calls or []] == ["weather"] * 2
        assert final.finish_reason == "tool_calls"


async def test_streamed_calls_are_numbered_and_whole(caller: Running) -> None:
    chunks = await stream(caller, CHAT, messages=ASK, tools=TOOLS, logprobs=True)
    choices = [chunk["choices"][0] for chunk in chunks[:-1]]
    calls = [call for choice in choices for call in choice["delta"].get("tool_calls", ())]
    assert [call["index"] for call in calls] == [0, 1]
    assert [json.loads(call["function"]["arguments"]) for call in calls] == [{"city": "Rome"}] * 2
    assert choices[-1]["finish_reason"] == "tool_calls"
    told = sum(len((choice["logprobs"] or {"content": []})["content"]) for choice in choices)
    assert told == len(caller.engine.reply or "")


async def test_tool_choice_none_shows_and_parses_nothing(caller: Running) -> None:
    chunks = await stream(caller, CHAT, messages=ASK, tools=TOOLS, tool_choice="none")
    text = "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks[:-1])
    assert text == caller.engine.reply
    assert bytes(caller.engine.live[0].prompt) == b"<user>Weather in Rome?<assistant>"


async def test_the_template_is_shown_the_definitions(caller: Running) -> None:
    bare = {"type": "function", "function": {"name": "now"}}
    await stream(caller, CHAT, messages=ASK, tools=[*TOOLS, bare])
    prompt = bytes(caller.engine.live[0].prompt).decode()
    shown = json.loads(prompt[: prompt.index("<user>")])
    assert shown[0] == TOOLS[0]
    assert shown[1]["function"] == {"name": "now", "parameters": {"type": "object", "properties": {}}}


async def test_a_model_whose_template_shows_no_tools_says_so(start: StartServer) -> None:
    server = await start()
    server.engine.tokenizer.tool_format = None
    async with server.post(CHAT, {"messages": ASK, "tools": TOOLS}) as response:
        assert response.status == 400
        assert (await response.json())["error"]["param"] == "tools"
    async with server.post(CHAT, {"messages": ASK, "tools": TOOLS, "tool_choice": "none"}) as response:
        assert response.status == 200
