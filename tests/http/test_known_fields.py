"""Fields of other servers: what they ask for is done, or a 400 says that it is not; nothing is ignored in silence."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from tests.http.conftest import Running, StartServer
from tfserve.errors import RequestError
from tfserve.http.known_fields import CHAT_FIELDS, COMPLETION_FIELDS, EMPTY, TOKENIZE_FIELDS, Fields, Hint, Unsupported
from tfserve.http.parsing import BodyParser
from tfserve.http.protocol import ChatRequest, CompletionRequest
from tfserve.http.tokens import TokenizeRequest

CHAT = "/v1/chat/completions"
PLAIN = "/v1/completions"
TOKENS = "/tokenize"
BUFFER = "/v1/streams/x/buffer"
ABORT = "/abort_request"

USER = {"role": "user", "content": "Hi"}
CALL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
CALLING = {"role": "assistant", "tool_calls": [CALL]}
TOOL: dict[str, Any] = {"type": "function", "function": {"name": "f"}}
NAMED = {"type": "function", "function": {"name": "f"}}
SCHEMA = {"type": "object", "properties": {"a": {"type": "string"}}}
NEED: dict[str, dict[str, Any]] = {
    CHAT: {"messages": [USER]},
    PLAIN: {"prompt": "Hi"},
    TOKENS: {"prompt": "Hi"},
    BUFFER: {"played_tokens": 1},
    ABORT: {"request_id": "x"},
}


async def ask(server: Running, path: str, **body: Any) -> tuple[int, dict[str, Any]]:
    """Status, and the error object if there is one."""
    async with server.post(path, {**NEED[path], **body}) as response:
        return response.status, (await response.json()).get("error", {})


@pytest.mark.parametrize(
    ("path", "field", "value"),
    [
        *[
            (path, field, value)
            for path in (CHAT, PLAIN)
            for field, value in (
                ("guided_json", SCHEMA),
                ("guided_regex", "a+"),
                ("guided_choice", ["a", "b"]),
                ("guided_grammar", "root ::= 'a'"),
                ("structured_outputs", {"json": SCHEMA}),
                ("grammar", "root ::= 'a'"),
                ("regex", "a+"),
                ("json_schema", SCHEMA),
                ("bad_words", ["no"]),
                ("allowed_token_ids", [1]),
                ("truncate_prompt_tokens", 5),
                ("prompt_logprobs", 0),
                ("use_beam_search", True),
                ("length_penalty", 1.5),
                ("early_stopping", True),
                ("logits_processors", ["a.b"]),
                ("mm_processor_kwargs", {"a": 1}),
                ("lora", [{"id": 0, "scale": 1}]),
                ("do_sample", False),
                ("max_new_tokens", 5),
                ("repeat_penalty", 1.1),
                ("request_id", "mine"),
                ("reasoning", {"effort": "high"}),
                ("return_token_ids", True),
                ("guided_json", {}),
                ("json_schema", {}),
                ("web_search_options", {}),
                ("extra_body", {"guided_json": SCHEMA}),
                ("max_output_tokens", 5),
                ("system", "Be brief."),
                ("stop_sequence", ["a"]),
                ("no_repeat_ngram_size", 2),
                ("num_beams", 4),
                ("detokenize", False),
                ("response_format.value", SCHEMA),
                ("response_format.value", {}),
                ("response_format.regex", "a+"),
            )
        ],
        (CHAT, "best_of", 2),
        (CHAT, "prompt", "x"),
        (CHAT, "chat_template", "{{ messages }}"),
        (CHAT, "documents", [{"text": "x"}]),
        (CHAT, "echo", True),
        (CHAT, "function_call", {"name": "f"}),
        (PLAIN, "messages", [USER]),
        (PLAIN, "tools", [TOOL]),
        (PLAIN, "chat_template_kwargs", {"a": 1}),
        (PLAIN, "continue_final_message", True),
        (PLAIN, "top_logprobs", 3),
        (TOKENS, "chat_template", "x"),
        (TOKENS, "add_special", False),
        (TOKENS, "parse_special", False),
        (CHAT, "stream_options.include_obfuscation", True),
        (CHAT, "messages[0].audio", {"id": "a"}),
        (CHAT, "messages[0].prefix", True),
        (CHAT, "messages[0].function_call", {"name": "f", "arguments": "{}"}),
        (CHAT, "tools[0].defer_loading", True),
        (CHAT, "tools[0].function.arguments", SCHEMA),
        (CHAT, "tools[0].function.input_schema", SCHEMA),
        (CHAT, "tool_choice.disable_parallel_tool_use", True),
    ],
)
async def test_what_cannot_be_had_is_refused_by_name(start: StartServer, path: str, field: str, value: Any) -> None:
    server = await start()
    outer, _, inner = field.rpartition(".")
    nested: dict[str, Any] = {
        "stream_options": {"stream": True, "stream_options": {inner: value}},
        "messages[0]": {"messages": [{**USER, inner: value}]},
        "tools[0]": {"tools": [{**TOOL, inner: value}]},
        "tools[0].function": {"tools": [{**TOOL, "function": {**TOOL["function"], inner: value}}]},
        "tool_choice": {"tools": [TOOL], "tool_choice": {**NAMED, inner: value}},
        "response_format": {"response_format": {"type": "json_object", inner: value}},
    }
    status, error = await ask(server, path, **(nested[outer] if outer else {field: value}))
    assert (status, error.get("param"), error.get("code")) == (400, field, "unsupported_parameter")
    assert "remove it" in error["message"]
    assert not server.engine.live


@pytest.mark.parametrize(
    ("struct", "fields", "need"),
    [
        (ChatRequest, CHAT_FIELDS, NEED[CHAT]),
        (CompletionRequest, COMPLETION_FIELDS, NEED[PLAIN]),
        (TokenizeRequest, TOKENIZE_FIELDS, NEED[TOKENS]),
    ],
)
def test_values_that_ask_for_nothing_pass_and_all_others_do_not(
    struct: type[msgspec.Struct], fields: Fields, need: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    parser = BodyParser(struct, fields)
    plain = parser.parse(msgspec.json.encode(need))
    assert not fields.keys() & set(struct.__struct_fields__)

    def parsed(value: Any) -> msgspec.Struct:
        return parser.parse(msgspec.json.encode({**need, field: value}))

    for field, known in fields.items():
        match known:
            case Hint():
                assert parsed("any") == plain
            case Unsupported(harmless):
                neutral = (*EMPTY, *harmless)
                for value in (*neutral, "any", 17, ["a"], {"a": 1}):
                    if value in neutral and not any(value is wish or value == wish == {} for wish in known.wishes):
                        assert parsed(value) == plain
                        continue
                    with pytest.raises(RequestError) as caught:
                        parsed(value)
                    assert caught.value.param == field
    assert "unknown" not in caplog.text


@pytest.mark.parametrize(("field", "value"), [("prompt_logprobs", 0), ("mirostat", True), ("length_penalty", True)])
async def test_zero_is_not_false_and_one_is_not_true(start: StartServer, field: str, value: Any) -> None:
    server = await start()
    assert (await ask(server, PLAIN, **{field: value}))[0] == 400


@pytest.mark.parametrize(
    ("messages", "tools"),
    [
        ([{**USER, "cache_control": {"type": "ephemeral"}}], []),
        ([{"role": "user", "content": [{"type": "text", "text": "Hi", "cache_control": {"type": "ephemeral"}}]}], []),
        ([{**USER, "audio": None, "function_call": None, "prefix": False, "tool_calls": None, "refusal": None}], []),
        ([USER, {**CALLING, "tool_calls": [{**CALL, "index": 0}], "annotations": []}], []),
        ([USER], [{**TOOL, "cache_control": {"type": "ephemeral"}}]),
        ([USER], [{"type": "function", "function": {"name": "f", "strict": True}}]),
    ],
)
async def test_nested_fields_that_ask_for_nothing_pass(
    start: StartServer, messages: Any, tools: Any, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    server = await start()
    assert await ask(server, CHAT, messages=messages, tools=tools) == (200, {})
    assert "unknown" not in caplog.text


async def test_unknown_nested_fields_are_logged_once_without_their_place(
    start: StartServer, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    server = await start()
    wobbly = [{**USER, "wobble": 3}, {**USER, "wobble": 4}]
    for _ in range(2):
        assert (await ask(server, CHAT, messages=wobbly))[0] == 200
    told = [record.getMessage() for record in caplog.records if "wobble" in record.getMessage()]
    assert len(told) == 1
    assert "messages[].wobble" in told[0]


@pytest.mark.parametrize(
    ("path", "field"), [(BUFFER, "played"), (BUFFER, "played_words"), (ABORT, "abort_all"), (ABORT, "rid")]
)
async def test_bodies_of_our_own_have_no_other_fields(start: StartServer, path: str, field: str) -> None:
    server = await start()
    status, error = await ask(server, path, **{field: True})
    assert (status, error["param"]) == (400, field)
    assert next(iter(NEED[path])) in error["message"]


@pytest.mark.parametrize(
    ("options", "status"),
    [
        ({"include_usage": False, "continuous_usage_stats": False, "include_obfuscation": False}, 200),
        ({"include_usage": True, "continuous_usage_stats": True}, 200),
        ({"continuous_usage_stats": True}, 400),
    ],
)
async def test_stream_options_are_done_or_refused(start: StartServer, options: Any, status: int) -> None:
    server = await start()
    async with server.post(CHAT, {**NEED[CHAT], "stream": True, "stream_options": options}) as response:
        assert response.status == status


async def test_a_seed_of_minus_one_is_none(start: StartServer) -> None:
    server = await start()
    for path in (CHAT, PLAIN):
        for seed in (-1, -1.0):
            assert (await ask(server, path, seed=seed, n=2))[0] == 200
    assert [stream.params.seed for stream in server.engine.live] == [None] * 8
    assert (await ask(server, PLAIN, seed=-2, n=2))[0] == 200
    assert [stream.params.seed for stream in server.engine.live[-2:]] == [-2, -1]


async def test_special_tokens_are_added_where_asked_for(start: StartServer) -> None:
    server = await start()
    for path, default in ((CHAT, False), (PLAIN, True)):
        for wish, added in ((None, default), (False, False), (True, True)):
            assert (await ask(server, path, add_special_tokens=wish))[0] == 200
            assert (server.engine.live[-1].prompt[0] == 256) == added
    assert (await ask(server, PLAIN, prompt=[97], add_special_tokens=True))[0] == 200
    assert server.engine.live[-1].prompt == [97]


async def test_reasoning_effort_changes_nothing_where_the_template_does_not_read_it(start: StartServer) -> None:
    server = await start()
    for path in (CHAT, PLAIN):
        for effort in ("none", "minimal", "high", None):
            assert (await ask(server, path, reasoning_effort=effort))[0] == 200
    assert len({tuple(stream.prompt) for stream in server.engine.live[:4]}) == 1
