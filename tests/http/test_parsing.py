"""Bodies as JSON has them: one kind of number, an optional byte order mark, and errors in the client's own names."""

from __future__ import annotations

import codecs
from typing import Any

import msgspec
import pytest
from msgspec import inspect

from tests.http.conftest import StartServer
from tests.http.fakes import FakeEngine, FakeStream
from tfserve.engine.frontend.validation import check_tokens
from tfserve.errors import RequestError
from tfserve.http.parsing import BodyParser
from tfserve.http.protocol import ChatRequest, CompletionRequest
from tfserve.http.streams import PlayedReport
from tfserve.http.tokens import DetokenizeRequest, TokenizeRequest
from tfserve.types import SamplingParams

CHAT = "/v1/chat/completions"
PLAIN = "/v1/completions"
ASK = [{"role": "user", "content": "Hi"}]
NEED: dict[type[msgspec.Struct], dict[str, Any]] = {
    ChatRequest: {"messages": ASK},
    CompletionRequest: {"prompt": "x"},
    TokenizeRequest: {},
    DetokenizeRequest: {"tokens": []},
    PlayedReport: {},
}
SCHEMA = {"type": "object", "properties": {"a": {"minimum": 1.0}}}


def plain(kind: inspect.Type) -> inspect.Type:
    """A type without what the OpenAPI document says of it beyond the type."""
    return kind.type if isinstance(kind, inspect.Metadata) else kind


def members(kind: inspect.Type) -> list[inspect.Type]:
    return [plain(each) for each in getattr(plain(kind), "types", (kind,))]


def integer_fields() -> list[tuple[type[msgspec.Struct], str, bool]]:
    """Every field that takes an integer and no fraction, or (True) a list of integers."""
    found = []
    for struct in NEED:
        for field in inspect.type_info(struct).fields:  # type: ignore[attr-defined]
            kinds = members(field.type)
            names = {type(kind).__name__ for kind in kinds}
            if "IntType" in names and "FloatType" not in names:
                found.append((struct, field.name, False))
            lists = [kind.item_type for kind in kinds if isinstance(kind, inspect.ListType)]
            if any(isinstance(kind, inspect.IntType) for item in lists for kind in members(item)):
                found.append((struct, field.name, True))
    return found


def parse(struct: type[msgspec.Struct], **fields: Any) -> Any:
    return BodyParser(struct, {}).parse(msgspec.json.encode({**NEED[struct], **fields}))


@pytest.mark.parametrize(("struct", "name", "is_list"), integer_fields())
def test_whole_numbers_may_be_written_as_fractions(struct: type[msgspec.Struct], name: str, is_list: bool) -> None:
    whole, fraction, half = (([value, 1] if is_list else value) for value in (40, 40.0, 40.5))
    parsed = getattr(parse(struct, **{name: fraction}), name)
    assert parsed == getattr(parse(struct, **{name: whole}), name)
    assert type(parsed[0] if is_list else parsed) is int
    with pytest.raises(RequestError) as caught:
        parse(struct, **{name: half})
    assert caught.value.param == (f"{name}[0]" if is_list else name)


def test_there_are_integer_fields() -> None:
    names = {(struct.__name__, name) for struct, name, _ in integer_fields()}
    assert {("ChatRequest", "top_k"), ("CompletionRequest", "prompt"), ("PlayedReport", "played_chars")} <= names


def test_other_numbers_stay_as_they_are() -> None:
    request = parse(CompletionRequest, prompt=[[1.0, 2], [3]], temperature=1, logit_bias={"4": 1}, max_tokens=1e2)
    assert (request.prompt, request.temperature, request.max_tokens) == ([[1, 2], [3]], 1.0, 100)
    assert request.logit_bias == {4: 1.0}
    chat = parse(ChatRequest, response_format={"type": "json_object", "schema": SCHEMA}, consumption_rate=6.0)
    assert type(chat.response_format.schema["properties"]["a"]["minimum"]) is float
    assert type(chat.consumption_rate) is float
    with pytest.raises(RequestError, match="9223372036854775807"):
        parse(ChatRequest, max_tokens=1e30)
    for wrong in (True, "4"):
        with pytest.raises(RequestError, match="max_tokens must be an integer"):
            parse(ChatRequest, max_tokens=wrong)


@pytest.mark.parametrize("path", [CHAT, PLAIN])
@pytest.mark.parametrize(
    ("field", "value", "reaches"),
    [
        ("top_p", 0, ("top_p", 0.0)),
        ("top_p", 0.0, ("top_p", 0.0)),
        ("max_tokens", 4.0, ("max_tokens", 4)),
        ("max_completion_tokens", 4.0, ("max_tokens", 4)),
        ("top_k", 40.0, ("top_k", 40)),
        ("seed", 5.0, ("seed", 5)),
        ("stop_token_ids", [7.0, 8], ("stop_token_ids", (7, 8))),
        ("include_stop_str_in_output", True, ("include_stop_str_in_output", True)),
        ("reasoning_effort", "high", ("temperature", 1.0)),
    ],
)
async def test_what_the_protocol_allows_reaches_the_engine(
    start: StartServer, path: str, field: str, value: Any, reaches: tuple[str, Any]
) -> None:
    server = await start()
    need = {"messages": ASK} if path == CHAT else {"prompt": "x"}
    async with server.post(path, {**need, field: value}) as response:
        assert response.status == 200
    name, expected = reaches
    got = getattr(server.engine.live[0].params, name)
    assert (got, type(got)) == (expected, type(expected))


@pytest.mark.parametrize("mark", [b"", codecs.BOM_UTF8])
async def test_a_byte_order_mark_is_not_part_of_the_body(start: StartServer, mark: bytes) -> None:
    server = await start()
    bodies = ((PLAIN, {"prompt": "x"}), (CHAT, {"messages": ASK}), ("/tokenize", {"prompt": "x"}))
    for path, body in bodies:
        async with server.post(path, mark + msgspec.json.encode(body)) as response:
            assert response.status == 200
    async with server.post(PLAIN, codecs.BOM_UTF8 * 2 + b"{}") as response:
        assert response.status == 400


class Particular(FakeEngine):
    """Refuses, as the real engine does, what is too long together, and grammars."""

    def submit(self, prompt: Any, params: SamplingParams, **options: Any) -> FakeStream:
        check_tokens(prompt, 300)
        if params.grammar is not None:
            raise RequestError("grammar", "this model's outputs cannot be held to a grammar")
        if params.max_tokens is not None and len(prompt) + params.max_tokens > 100:
            raise RequestError("max_tokens", f"the prompt and max_tokens ({params.max_tokens}) exceed the context")
        return super().submit(prompt, params, **options)


TOOL = {"type": "function", "function": {"name": "f"}}
JSON = {"response_format": {"type": "json_object"}}


@pytest.mark.parametrize(
    ("path", "body", "param", "says"),
    [
        (CHAT, {"max_tokens": 100}, "max_tokens", "and max_tokens (100)"),
        (CHAT, {"max_completion_tokens": 100}, "max_completion_tokens", "and max_completion_tokens (100)"),
        (CHAT, {"max_completion_tokens": 100, "max_tokens": 2}, "max_completion_tokens", "max_completion_tokens (100)"),
        (PLAIN, {"max_tokens": 100}, "max_tokens", "and max_tokens (100)"),
        (PLAIN, {"max_completion_tokens": 100}, "max_completion_tokens", "and max_completion_tokens (100)"),
        (CHAT, {"max_completion_tokens": 3, "min_tokens": 4}, "min_tokens", "at most max_completion_tokens (3)"),
        (CHAT, {"max_tokens": 3, "min_tokens": 4}, "min_tokens", "at most max_tokens (3)"),
        (CHAT, {"messages": [{"role": "user", "content": "x" * 2000}]}, "messages", "the prompt has"),
        (PLAIN, {"prompt": "x" * 2000, "max_tokens": None}, "max_tokens", "the prompt"),
        (PLAIN, {"prompt": "", "add_special_tokens": False}, "prompt", "the prompt is empty"),
        (PLAIN, {"logprobs": 21, "echo": True, "max_tokens": 0}, "logprobs", "logprobs must be"),
        (PLAIN, JSON, "response_format", "grammar"),
        (CHAT, JSON, "response_format", "grammar"),
        (CHAT, {"tools": [TOOL], "tool_choice": "none", **JSON}, "response_format", "grammar"),
        (CHAT, {"tools": [TOOL], "tool_choice": "required"}, "tools", "grammar"),
        (PLAIN, {"response_format": {"type": "json_object", "schema": {"type": 3}}}, "response_format", "cannot be"),
    ],
)
async def test_errors_of_the_engine_name_what_the_client_sent(
    start: StartServer, path: str, body: dict[str, Any], param: str, says: str
) -> None:
    server = await start(engine_class=Particular)
    need = {"messages": ASK} if path == CHAT else {"prompt": "x"}
    async with server.post(path, {**need, **body}) as response:
        error = (await response.json())["error"]
    assert (response.status, error["param"]) == (400, param)
    assert says in error["message"]


@pytest.mark.parametrize(
    ("path", "body", "status", "param"),
    [
        ("/abort_request", {"request_id": "unknown"}, 404, "request_id"),
        ("/v1/streams/unknown/buffer", {"played_tokens": 3}, 404, "id"),
        ("/detokenize", {"tokens": [300]}, 400, "tokens"),
    ],
)
async def test_errors_about_live_streams_and_tokens_name_what_the_client_sent(
    start: StartServer, path: str, body: dict[str, Any], status: int, param: str
) -> None:
    server = await start()
    async with server.post(path, body) as response:
        assert (response.status, (await response.json())["error"]["param"]) == (status, param)


@pytest.mark.parametrize(
    ("body", "param"),
    [({}, "played_tokens"), ({"played_tokens": -1}, "played_tokens"), ({"played_chars": -1}, "played_chars")],
)
async def test_a_report_that_makes_no_sense_is_named(start: StartServer, body: dict[str, Any], param: str) -> None:
    server = await start(reply=None)
    async with server.post(PLAIN, {"prompt": "x", "stream": True}) as opened:
        stream = server.engine.live[0].request_id
        async with server.post(f"/v1/streams/{stream}/buffer", body) as response:
            assert (response.status, (await response.json())["error"]["param"]) == (400, param)
        opened.close()
