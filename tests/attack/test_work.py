"""Small inputs that once made work or memory of another order: texts, keys and marks chosen to be looked at again."""

from __future__ import annotations

import io
import json
import string
import tracemalloc
from pathlib import Path
from typing import Any

import msgspec
import pytest

from tests.attack.work import num_calls
from tests.http.conftest import StartServer
from tests.tokenizers import write_tiny_tokenizer
from tfserve.http.chat_prompt import chat_prompt
from tfserve.http.protocol import ChatRequest
from tfserve.model.grammars.schema_limits import MAX_SCHEMA_CHARS, check_schema
from tfserve.model.text.detokenizer import Detokenizer
from tfserve.model.text.tokenizer import Tokenizer
from tfserve.strict_json import unreadable

LONG = "\x7f" * 500_000
ASK = [{"role": "user", "content": "x"}]
TOOL = {"type": "function", "function": {"name": "f"}}


@pytest.fixture
def tokenizer(tmp_path: Path) -> Tokenizer:
    return Tokenizer.from_dir(write_tiny_tokenizer(tmp_path))


NEARLY = {
    "many that begin alike": ["a" * 255 + "b", *(f"ab{number}" for number in range(63))],
    "many that are long alike": ["a" * 255 + "b", *("a" * 64 + "b" + "a" * 60 + f"{number}a" for number in range(63))],
    "periods": ["ab" * 127 + "c", *("ab" * length + "c" for length in range(1, 64))],
}


@pytest.mark.parametrize("stop", NEARLY.values(), ids=NEARLY)
@pytest.mark.parametrize("text", ["a" * 1000, "ab" * 500, "a" * 255 + "ba" * 300], ids=["a", "ab", "both"])
def test_stop_strings_that_nearly_match_cost_no_more_than_others(
    tokenizer: Tokenizer, stop: list[str], text: str
) -> None:
    tokens = tokenizer.encode(text, add_special_tokens=False)
    other = tuple(each.translate(str.maketrans("abc", "xyz")) for each in stop)

    def follow(stop: tuple[str, ...]) -> int:
        detokenizer = Detokenizer(tokenizer, stop=stop)
        return num_calls(lambda: [detokenizer.push([token]) for token in tokens])

    # Each character is looked at by some calls, once; each stop string by one for a token, as without any likeness.
    assert follow(tuple(stop)) <= follow(other) + 10 * len(text)


@pytest.mark.parametrize(
    "wrap", [lambda inner: {"const": inner}, lambda inner: {"properties": {"a": {"enum": [inner]}}}]
)
def test_a_long_key_is_not_kept_for_each_value_below_it(wrap: Any) -> None:
    schema = wrap({"k" * (MAX_SCHEMA_CHARS // 2): [0] * (MAX_SCHEMA_CHARS // 5)})
    tracemalloc.start()
    try:
        check_schema(schema, "x")
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 100 * MAX_SCHEMA_CHARS


def test_the_place_of_what_is_unreadable_is_told() -> None:
    assert unreadable({"a": [1, {"b": 2**64}]}) == "$.a[1].b is an integer beyond 64 bits"
    assert unreadable(2**64) == "$ is an integer beyond 64 bits"


@pytest.mark.parametrize("first", [True, False])
def test_messages_with_nearly_every_private_character_cost_no_more_than_others(
    tokenizer: Tokenizer, first: bool
) -> None:
    private = "".join(map(chr, range(0xE000, 0xF900)))

    def render(text: str) -> int:
        contents = ["<" + text, *([""] * 400)] if first else [*([""] * 400), "<" + text]
        messages = [{"role": "user", "content": content} for content in contents]
        asked = msgspec.convert({"messages": messages}, ChatRequest)
        return num_calls(lambda: chat_prompt(tokenizer, asked.messages, asked, None))

    assert render(private[1:]) < 2 * render(string.ascii_letters * 120)


QUOTED: dict[str, tuple[str, dict[str, Any]]] = {
    "model": ("/v1/chat/completions", {"messages": ASK, "model": LONG}),
    "tokenize's model": ("/tokenize", {"prompt": "x", "model": LONG}),
    "role": ("/v1/chat/completions", {"messages": [{"role": LONG, "content": "x"}]}),
    "part": ("/v1/chat/completions", {"messages": [{"role": "user", "content": [{"type": LONG}]}]}),
    "rate": ("/v1/completions", {"prompt": "x", "consumption_rate": LONG}),
    "variable": ("/v1/chat/completions", {"messages": ASK, "chat_template_kwargs": {LONG: 1}}),
    "choice": ("/v1/chat/completions", {"messages": ASK, "tools": [TOOL], "tool_choice": LONG}),
    "named choice": (
        "/v1/chat/completions",
        {"messages": ASK, "tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": LONG}}},
    ),
    "format": ("/v1/completions", {"prompt": "x", "response_format": {"type": LONG}}),
    "schema": (
        "/v1/completions",
        {"prompt": "x", "response_format": {"type": "json_object", "schema": {LONG[:50_000]: 2**64}}},
    ),
    "bias": ("/v1/completions", {"prompt": "x", "logit_bias": {LONG: 1}}),
    "number": ("/v1/completions", {"prompt": "x", "n": LONG}),
}


@pytest.mark.parametrize("case", QUOTED.values(), ids=QUOTED)
async def test_an_error_does_not_say_again_all_that_was_sent(
    start: StartServer, case: tuple[str, dict[str, Any]]
) -> None:
    server = await start()
    path, body = case
    data = io.BytesIO(json.dumps(body).encode())
    async with server.session.post(server.url + path, data=data) as response:
        answer = await response.read()
        assert response.status in (400, 404)
    assert len(answer) < 30_000
