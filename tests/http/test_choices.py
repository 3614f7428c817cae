"""Several choices per prompt, echoed prompts with their log probabilities, and token counts along the way."""

from __future__ import annotations

from typing import Any

import pytest

from tests.http.conftest import Running, StartServer
from tests.http.test_answers import stream

CHAT = "/v1/chat/completions"
PLAIN = "/v1/completions"
ASK = [{"role": "user", "content": "Hi"}]
NEED: dict[str, dict[str, Any]] = {CHAT: {"messages": ASK}, PLAIN: {"prompt": "x"}}


async def ask(server: Running, path: str, **body: Any) -> Any:
    async with server.post(path, body) as response:
        assert response.status == 200, await response.text()
        return await response.json()


async def test_n_choices_of_every_prompt_in_order_with_seeds_of_their_own(start: StartServer) -> None:
    server = await start()
    body = await ask(server, PLAIN, prompt=["a", "b"], n=3, seed=2**63 - 2, best_of=3)
    assert [choice["index"] for choice in body["choices"]] == list(range(6))
    assert [bytes(stream.prompt[1:]) for stream in server.engine.live] == [b"a"] * 3 + [b"b"] * 3
    assert [stream.params.seed for stream in server.engine.live] == [2**63 - 2, 2**63 - 1, -(2**63)] * 2
    assert body["usage"]["prompt_tokens"] == 4  # each prompt once
    assert body["usage"]["completion_tokens"] == 6 * 17


async def test_n_chat_choices_streamed_each_have_a_role_and_a_finish_reason(start: StartServer) -> None:
    server = await start()
    chunks = await stream(server, CHAT, messages=ASK, n=2, stream_options={"include_usage": True})
    for index in range(2):
        mine = [c["choices"][0] for c in chunks[:-2] if c["choices"][0]["index"] == index]
        assert mine[0]["delta"] == {"role": "assistant", "content": ""}
        assert "".join(c["delta"].get("content", "") for c in mine) == "Hello, wide world"
        assert [c["finish_reason"] for c in mine] == [None] * (len(mine) - 1) + ["stop"]
    assert chunks[-2]["usage"]["completion_tokens"] == 34
    assert chunks[-2]["usage"]["prompt_tokens"] == len("<user>Hi<assistant>")
    assert [stream.params.seed for stream in server.engine.live] == [None, None]


@pytest.mark.parametrize("path", [CHAT, PLAIN])
async def test_continuous_usage_counts_up(start: StartServer, path: str) -> None:
    server = await start()
    options = {"include_usage": True, "continuous_usage_stats": True}
    chunks = await stream(server, path, **NEED[path], stream_options=options)
    counts = [chunk["usage"]["completion_tokens"] for chunk in chunks[:-1]]
    assert counts == sorted(counts)
    assert counts[-1] == 17
    assert len(set(counts)) > 1


@pytest.mark.parametrize("path", [CHAT, PLAIN])
async def test_both_names_of_the_token_limit(start: StartServer, path: str) -> None:
    server = await start()
    await ask(server, path, **NEED[path], max_tokens=3)
    await ask(server, path, **NEED[path], max_completion_tokens=4, max_tokens=9)
    assert [stream.params.max_tokens for stream in server.engine.live] == [3, 4]


async def test_null_stands_for_every_optional_field(start: StartServer) -> None:
    from tfserve.http.protocol import ChatRequest, CompletionRequest

    server = await start()
    for path, struct in ((CHAT, ChatRequest), (PLAIN, CompletionRequest)):
        await ask(server, path, **{**dict.fromkeys(struct.__struct_fields__), **NEED[path]})


async def test_an_evaluation_harness_scores_a_prompt_of_token_ids(start: StartServer) -> None:
    server = await start(reply="z")
    body = await ask(server, PLAIN, prompt=[[97, 98, 99], [256, 195, 169]], max_tokens=1, logprobs=1, echo=True, seed=1)
    first, second = body["choices"]
    assert first["text"] == "abcz"
    assert first["logprobs"] == {
        "tokens": ["a", "b", "c", "z"],
        "token_logprobs": [None, -0.5, -0.5, -0.5],
        "text_offset": [0, 1, 2, 3],
        "top_logprobs": [None, {"b": -1.0}, {"b": -1.0, "c": -0.5}, {"b": -1.0, "z": -0.5}],
    }
    assert second["text"] == "éz"
    assert second["logprobs"]["text_offset"] == [0, 0, 0, 1]  # a special token is no text, and é is one character
    assert second["logprobs"]["tokens"] == ["<s>", r"bytes:\xc3", r"bytes:\xa9", "z"]
    assert len(second["logprobs"]["top_logprobs"]) == 4


async def test_echo_without_generation(start: StartServer) -> None:
    server = await start(reply="z")
    scored = await ask(server, PLAIN, prompt="ab", max_tokens=0, logprobs=0, echo=True)
    assert scored["choices"][0]["text"] == "ab"
    assert scored["choices"][0]["logprobs"]["tokens"] == ["<s>", "a", "b"]
    assert scored["choices"][0]["logprobs"]["top_logprobs"] is None
    assert scored["usage"]["completion_tokens"] == 0
    alone = await ask(server, PLAIN, prompt=[97], max_tokens=0, logprobs=2, echo=True)
    assert alone["choices"][0]["logprobs"]["token_logprobs"] == [None]
    plain = await ask(server, PLAIN, prompt="ab", max_tokens=0, echo=True)
    assert plain["choices"][0] == {"index": 0, "text": "ab", "logprobs": None, "finish_reason": "stop"}


async def test_echo_streamed_comes_once_per_choice(start: StartServer) -> None:
    server = await start(reply="y z")
    chunks = await stream(server, PLAIN, prompt=["ab", "cd"], n=2, logprobs=0, echo=True)
    for index, text in enumerate(["ab", "ab", "cd", "cd"]):
        mine = [c["choices"][0] for c in chunks[:-1] if c["choices"][0]["index"] == index]
        assert "".join(c["text"] for c in mine) == f"{text}y z"
        offsets = [offset for c in mine for offset in c["logprobs"]["text_offset"]]
        assert offsets == [0, 0, 1, 2, 3, 4]
    assert {stream.params.prompt_logprobs for stream in server.engine.live} == {0}


async def test_echo_without_logprobs_costs_no_scoring(start: StartServer) -> None:
    server = await start(reply="z")
    body = await ask(server, PLAIN, prompt="ab", echo=True)
    assert body["choices"][0]["text"] == "abz"
    assert server.engine.live[0].params.prompt_logprobs is None
