"""Thoughts told from answers: whole and streamed at every split, with stops, choices, grammars and tools."""

from __future__ import annotations

from typing import Any

import openai
import pytest

from tests.http.conftest import Running, StartServer
from tests.http.fakes import FakeTokenizer
from tests.http.test_answers import stream
from tests.http.test_tools import HERMES_CALL, TOOLS
from tfserve.http.reasoning import ThoughtParser
from tfserve.model.text.chat_template import ChatTemplate
from tfserve.model.text.thoughts import ThoughtCounter, first_place
from tfserve.types import Place

CHAT = "/v1/chat/completions"
ASK: Any = [{"role": "user", "content": "Why?"}]
THOUGHT = "<think>\nLet me see: a < b.\n</think>\n\nBecause."


@pytest.mark.parametrize(
    ("place", "text", "thoughts", "answer", "num_tokens"),
    [
        (Place.BEFORE, THOUGHT, "Let me see: a < b.", "Because.", THOUGHT.index("\n\nB")),
        (Place.BEFORE, "Because.", "", "Because.", 0),
        (Place.BEFORE, "  Because </think> so", "", "  Because </think> so", 0),
        (Place.BEFORE, "\n<think>a</think>b", "a", "b", 17),
        (Place.BEFORE, "<think>\n\n</think>\n\nNo.", "", "No.", 17),
        (Place.BEFORE, "<think>a\n\n b ", "a\n\n b", "", 13),
        (Place.BEFORE, "<think>a </thi", "a </thi", "", 14),
        (Place.BEFORE, "<thi", "", "<thi", 0),
        (Place.BEFORE, "<thinking>a", "", "<thinking>a", 0),
        (Place.BEFORE, "<think>a<think>b</think>c</think>", "a<think>b", "c</think>", 24),
        (Place.BEFORE, "", "", "", 0),
        (Place.BEFORE, " \n", "", " \n", 0),
        (Place.BEFORE, "<think>é</thinker></think>ü", "é</thinker>", "ü", 27),
        (Place.THOUGHTS, "\nHm.\n</think>\n\nYes.\n", "Hm.", "Yes.\n", 13),
        (Place.THOUGHTS, "Hm. <think> again", "Hm. <think> again", "", 17),
        (Place.THOUGHTS, "</think>Yes", "", "Yes", 8),
        (Place.ANSWER, THOUGHT, "", THOUGHT, 0),
    ],
)
def test_thoughts_are_told_from_answers_however_the_text_is_cut(
    place: Place, text: str, thoughts: str, answer: str, num_tokens: int
) -> None:
    for size in (1, 2, 3, 7, max(len(text), 1)):
        parser, counter = ThoughtParser(place), ThoughtCounter(place, FakeTokenizer())
        parts = [parser.push(text[i : i + size]) for i in range(0, len(text), size)] + [parser.finish()]
        assert "".join(part.thoughts for part in parts) == thoughts
        assert "".join(part.answer for part in parts) == answer
        tokens = list(text.encode())
        for i in range(0, len(tokens), size):
            counter.push(tokens[i : i + size])
        assert counter.num_tokens == num_tokens


def test_what_is_certain_is_shown_at_once() -> None:
    parser = ThoughtParser(Place.BEFORE)
    assert parser.push("<think>Hm") == ("Hm", "")
    assert parser.push(", x <") == (", x", "")
    assert parser.push(" y") == (" < y", "")
    assert not parser.is_over
    assert parser.push("</think>\n\nA") == ("", "A")
    assert parser.is_over


@pytest.mark.parametrize(
    ("prompt", "continued", "place"),
    [
        ("<assistant>\n", None, Place.BEFORE),
        ("what is <think>? <assistant>\n", None, Place.BEFORE),
        ("<assistant>\n<think>\n", None, Place.THOUGHTS),
        ("<assistant>\n<think>\n\n</think>\n\n", None, Place.ANSWER),
        ("<assistant>\n<think>Hm", "<think>Hm", Place.THOUGHTS),
        ("<assistant>\n<think>Hm</think>Yes", "<think>Hm</think>Yes", Place.ANSWER),
        ("<assistant>\nYes, and", "Yes, and", Place.ANSWER),
        ("<assistant>\n", "", Place.BEFORE),
        ("<assistant>\n<think>\n", "", Place.THOUGHTS),
    ],
)
def test_the_prompt_tells_where_the_text_begins(prompt: str, continued: str | None, place: Place) -> None:
    assert first_place(prompt, continued) is place


def test_the_template_tells_whether_a_model_thinks() -> None:
    assert ChatTemplate("{{ messages[0].content.split('</think>')[-1] }}", {}).thinks
    assert not ChatTemplate("{{ messages[0].content }}", {}).thinks


async def thinker(start: StartServer, reply: str) -> Running:
    server = await start(reply=reply)
    server.engine.tokenizer.thinks = True
    return server


async def whole(server: Running, **fields: Any) -> dict[str, Any]:
    async with server.post(CHAT, {"messages": ASK, **fields}) as response:
        body: dict[str, Any] = await response.json()
        assert response.status == 200, body
        return body


def deltas(chunks: list[Any], name: str) -> dict[int, str]:
    """What the deltas of this name are together, by choice."""
    texts: dict[int, str] = {}
    for choice in (choice for chunk in chunks[:-1] for choice in chunk["choices"]):
        texts[choice["index"]] = texts.get(choice["index"], "") + choice["delta"].get(name, "")
    return texts


async def test_every_choice_has_its_thoughts_whole_and_streamed(start: StartServer) -> None:
    server = await thinker(start, THOUGHT)
    body = await whole(server, n=2)
    for choice in body["choices"]:
        assert choice["message"]["reasoning_content"] == "Let me see: a < b."
        assert choice["message"]["content"] == "Because."
    num_thoughts = THOUGHT.index("\n\nB")
    assert body["usage"]["completion_tokens_details"] == {"reasoning_tokens": 2 * num_thoughts}
    chunks = await stream(server, CHAT, messages=ASK, n=2, stream_options={"include_usage": True})
    assert deltas(chunks, "reasoning_content") == dict.fromkeys(range(2), "Let me see: a < b.")
    assert deltas(chunks, "content") == dict.fromkeys(range(2), "Because.")
    told = next(chunk["usage"] for chunk in chunks[:-1] if chunk.get("usage"))
    assert told["completion_tokens_details"] == {"reasoning_tokens": 2 * num_thoughts}


async def test_the_official_client_reads_the_thoughts(start: StartServer) -> None:
    server = await thinker(start, THOUGHT)
    async with openai.AsyncOpenAI(base_url=server.url + "/v1", api_key="key", max_retries=0) as client:
        answer = await client.chat.completions.create(model="tiny", messages=ASK)
        message = answer.choices[0].message
        assert (message.content, getattr(message, "reasoning_content", None)) == ("Because.", "Let me see: a < b.")
        assert answer.usage is not None
        assert answer.usage.completion_tokens_details is not None
        assert answer.usage.completion_tokens_details.reasoning_tokens == THOUGHT.index("\n\nB")


async def test_an_answer_that_never_begins_is_null(start: StartServer) -> None:
    server = await thinker(start, "<think>\nround and round")
    body = await whole(server)
    assert body["choices"][0]["message"]["content"] is None
    assert body["choices"][0]["message"]["reasoning_content"] == "round and round"
    details = body["usage"]["completion_tokens_details"]
    assert details["reasoning_tokens"] == body["usage"]["completion_tokens"]
    chunks = await stream(server, CHAT, messages=ASK)
    assert deltas(chunks, "content") == {0: ""}
    assert deltas(chunks, "reasoning_content") == {0: "round and round"}


async def test_thoughts_can_be_left_out_or_left_in(start: StartServer) -> None:
    server = await thinker(start, THOUGHT)
    hidden = (await whole(server, include_reasoning=False))["choices"][0]["message"]
    assert hidden["content"] == "Because."
    assert "reasoning_content" not in hidden
    chunks = await stream(server, CHAT, messages=ASK, include_reasoning=False)
    assert (deltas(chunks, "content"), deltas(chunks, "reasoning_content")) == ({0: "Because."}, {0: ""})
    inside = (await whole(server, separate_reasoning=False))["choices"][0]["message"]
    assert inside["content"] == THOUGHT
    for fields in ({"stream_reasoning": False}, {"reasoning_format": "none"}):
        async with server.post(CHAT, {"messages": ASK, **fields}) as response:
            assert response.status == 400
            assert (await response.json())["error"]["param"] in fields


async def test_a_call_among_the_thoughts_is_none_and_one_behind_them_is(start: StartServer) -> None:
    server = await thinker(start, f"<think>\nI write {HERMES_CALL}\n</think>\n\nSure.\n{HERMES_CALL}")
    choice = (await whole(server, tools=TOOLS))["choices"][0]
    assert choice["finish_reason"] == "tool_calls"
    assert choice["message"]["reasoning_content"] == f"I write {HERMES_CALL}"
    assert choice["message"]["content"] == "Sure."
    assert len(choice["message"]["tool_calls"]) == 1
    chunks = await stream(server, CHAT, messages=ASK, tools=TOOLS)
    calls = [call for chunk in chunks[:-1] for call in chunk["choices"][0]["delta"].get("tool_calls", ())]
    assert len(calls) == 1
    assert deltas(chunks, "reasoning_content") == {0: f"I write {HERMES_CALL}"}


async def test_a_grammar_leaves_no_room_for_thoughts(start: StartServer) -> None:
    server = await thinker(start, '{"a": "<think>b</think>"}')
    message = (await whole(server, response_format={"type": "json_object"}))["choices"][0]["message"]
    assert message["content"] == '{"a": "<think>b</think>"}'
    assert "reasoning_content" not in message


async def test_a_model_that_does_not_think_answers_as_it_stands(start: StartServer) -> None:
    server = await start(reply=THOUGHT)
    body = await whole(server)
    assert body["choices"][0]["message"]["content"] == THOUGHT
    assert "completion_tokens_details" not in body["usage"]
