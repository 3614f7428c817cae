"""What a well-formed request gets: whole and streamed answers, framing, log probabilities, lists of prompts."""

from __future__ import annotations

import asyncio
import json
import math
from typing import Any

import pytest
from msgspec import UNSET

from tests.http import fakes
from tests.http.conftest import Running, StartServer
from tests.http.fakes import BOS
from tfserve.types import FinishReason, TokenLogprob

ASK = [{"role": "user", "content": "Hi"}]
TIMINGS = {"num_preemptions": 3, "ttft_s": 0.25}
"""What the fake engine says of every request that has ended."""


def events(raw: bytes) -> list[Any]:
    """The data of a stream's events; every line must be well framed."""
    assert raw.endswith(b"\n\n")
    blocks = raw.decode().split("\n\n")[:-1]
    data = [block.removeprefix("data: ") for block in blocks if not block.startswith(":")]
    assert len([block for block in blocks if not block.startswith((":", "data: "))]) == 0
    return [item if item == "[DONE]" else json.loads(item) for item in data]


async def stream(server: Running, path: str, **body: Any) -> list[Any]:
    async with server.post(path, {"stream": True, **body}) as response:
        assert response.status == 200
        return events(await response.read())


async def test_chat_stream_is_role_then_text_then_finish_then_done(start: StartServer) -> None:
    server = await start()
    async with server.post("/v1/chat/completions", {"model": "tiny", "messages": ASK, "stream": True}) as response:
        assert response.headers["Content-Type"].startswith("text/event-stream")
        assert response.headers["X-Accel-Buffering"] == "no"
        assert response.headers["Cache-Control"] == "no-cache"
        chunks = events(await response.read())
    assert chunks.pop() == "[DONE]"
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    assert len({chunk["id"] for chunk in chunks}) == 1
    assert all("usage" not in chunk for chunk in chunks)
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    assert deltas[0] == {"role": "assistant", "content": ""}
    assert all("role" not in delta for delta in deltas[1:])
    assert "".join(delta.get("content", "") for delta in deltas) == "Hello, wide world"
    reasons = [chunk["choices"][0]["finish_reason"] for chunk in chunks]
    assert reasons == [None] * (len(chunks) - 1) + ["stop"]


async def test_chat_prompt_is_the_template_without_added_special_tokens(start: StartServer) -> None:
    server = await start()
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    messages = [{"role": "developer", "content": "S"}, {"role": "user", "content": parts, "name": "me"}]
    async with server.post("/v1/chat/completions", {"messages": messages}) as response:
        assert response.status == 200
    assert bytes(server.engine.live[0].prompt) == b"<system>S<user>ab<assistant>"


async def test_whole_chat_answer_counts_tokens(start: StartServer) -> None:
    server = await start()
    async with server.post("/v1/chat/completions", {"model": "tiny", "messages": ASK}) as response:
        body = await response.json()
    assert body["object"] == "chat.completion"
    assert body["model"] == "tiny"
    choice = body["choices"][0]
    assert choice["message"]["content"] == "Hello, wide world"
    assert choice["finish_reason"] == "stop"
    assert choice["logprobs"] is None
    prompt = len("<user>Hi<assistant>")
    counts = {"prompt_tokens": prompt, "completion_tokens": 17, "total_tokens": prompt + 17}
    assert body["usage"] == {**counts, "prompt_tokens_details": {"cached_tokens": 0}, **TIMINGS}


async def test_usage_chunk_comes_last_when_asked_for(start: StartServer) -> None:
    server = await start()
    chunks = await stream(server, "/v1/completions", prompt="ab", stream_options={"include_usage": True})
    assert chunks[-1] == "[DONE]"
    assert chunks[-2]["choices"] == []
    counts = {"prompt_tokens": 3, "completion_tokens": 17, "total_tokens": 20}
    assert chunks[-2]["usage"] == {**counts, "prompt_tokens_details": {"cached_tokens": 0}, **TIMINGS}
    assert all(chunk["usage"] is None for chunk in chunks[:-2])


@pytest.mark.parametrize("is_streamed", [False, True])
@pytest.mark.parametrize(("rate", "has_stall"), [({}, False), (None, False), ("read", True), (3.5, True)])
async def test_usage_tells_stalls_where_a_rate_is_named(start: StartServer, is_streamed, rate, has_stall) -> None:
    server = await start()
    named = {} if rate == {} else {"consumption_rate": rate}
    if is_streamed:
        options = {"include_usage": True}
        usage = (await stream(server, "/v1/completions", prompt="ab", stream_options=options, **named))[-2]["usage"]
    else:
        async with server.post("/v1/completions", {"prompt": "ab", **named}) as response:
            usage = (await response.json())["usage"]
    assert usage.get("stall_s") == (0.5 if has_stall else None)


async def test_usage_tells_how_often_the_answers_were_interrupted(start: StartServer) -> None:
    server = await start(reply=None)
    options = {"include_usage": True}
    reading = asyncio.create_task(stream(server, "/v1/completions", prompt=["a", "b"], stream_options=options))
    while len(server.engine.live) < 2:
        await asyncio.sleep(0)
    for said, preemptions in zip(server.engine.live, (2, 3), strict=True):
        said.say("x", FinishReason.STOP, preemptions=preemptions)
    assert (await reading)[-2]["usage"]["num_preemptions"] == 5


async def test_tokens_without_text_make_no_chunk_but_are_counted(start: StartServer) -> None:
    server = await start(reply=None)
    reading = asyncio.create_task(
        stream(server, "/v1/completions", prompt="ab", stream_options={"include_usage": True})
    )
    await server.engine.submitted.wait()
    says = server.engine.live[0].say
    for text, tokens, finish in (("", 1, None), ("é", 1, None), ("", 2, FinishReason.LENGTH)):
        says(text, finish, tokens)
        await asyncio.sleep(0.02)
    chunks = await reading
    assert [chunk["choices"][0]["text"] for chunk in chunks[:-2]] == ["é", ""]
    assert chunks[-3]["choices"][0]["finish_reason"] == "length"
    assert chunks[-2]["usage"]["completion_tokens"] == 4


async def test_outputs_that_piled_up_are_one_chunk(start: StartServer) -> None:
    server = await start(reply=None)
    reading = asyncio.create_task(stream(server, "/v1/completions", prompt="ab"))
    await server.engine.submitted.wait()
    for letter in "abc":
        server.engine.live[0].say(letter)
    server.engine.live[0].say("d", FinishReason.STOP)
    chunks = await reading
    assert [chunk["choices"][0]["text"] for chunk in chunks[:-1]] == ["abcd"]


@pytest.mark.parametrize(
    ("prompt", "submitted"),
    [
        ("ab", [[BOS, 97, 98]]),
        (["a", "b"], [[BOS, 97], [BOS, 98]]),
        ([1, 2, 3], [[1, 2, 3]]),
        ([[1], [2, 3]], [[1], [2, 3]]),
    ],
)
async def test_every_shape_of_prompt(start: StartServer, prompt: Any, submitted: list[list[int]]) -> None:
    server = await start()
    async with server.post("/v1/completions", {"model": "tiny", "prompt": prompt}) as response:
        body = await response.json()
    assert [stream.prompt for stream in server.engine.live] == submitted
    assert [choice["index"] for choice in body["choices"]] == list(range(len(submitted)))
    assert {choice["text"] for choice in body["choices"]} == {"Hello, wide world"}
    assert body["usage"]["prompt_tokens"] == sum(map(len, submitted))
    assert body["usage"]["completion_tokens"] == 17 * len(submitted)


async def test_a_prompt_too_long_to_tokenise_on_the_loop_is_encoded_the_same(start: StartServer) -> None:
    server = await start()
    async with server.post("/tokenize", {"prompt": "é" * 40_000}) as response:
        answer = await response.json()
    assert response.status == 200
    assert answer["tokens"] == server.engine.tokenizer.encode("é" * 40_000)


async def test_a_list_of_prompts_streams_interleaved_by_index(start: StartServer) -> None:
    server = await start(reply=None)
    reading = asyncio.create_task(stream(server, "/v1/completions", prompt=["a", "b"]))
    await server.engine.submitted.wait()
    first, second = server.engine.live
    script = [
        (second, "x", None),
        (first, "1", FinishReason.STOP),
        (second, "y", None),
        (second, "z", FinishReason.STOP),
    ]
    for speaker, text, finish in script:
        speaker.say(text, finish)
        await asyncio.sleep(0.02)
    chunks = await reading
    told = [(chunk["choices"][0]["index"], chunk["choices"][0]["text"]) for chunk in chunks[:-1]]
    assert told == [(1, "x"), (0, "1"), (1, "y"), (1, "z")]


async def test_chat_logprobs_name_tokens_and_alternatives(start: StartServer) -> None:
    server = await start(reply="é!")
    async with server.post("/v1/chat/completions", {"messages": ASK, "logprobs": True, "top_logprobs": 2}) as response:
        content = (await response.json())["choices"][0]["logprobs"]["content"]
    assert [entry["bytes"] for entry in content] == [[0xC3], [0xA9], [33]]
    assert content[2]["token"] == "!"
    assert content[0]["logprob"] == -0.5
    assert [top["token"] for top in content[0]["top_logprobs"]] == ["b", "c"]


async def test_completion_logprobs_run_parallel_to_the_tokens(start: StartServer) -> None:
    server = await start(reply="ab")
    async with server.post("/v1/completions", {"prompt": "x", "logprobs": 1}) as response:
        logprobs = (await response.json())["choices"][0]["logprobs"]
    assert logprobs == {
        "tokens": ["a", "b"],
        "token_logprobs": [-0.5, -0.5],
        "text_offset": [0, 1],
        "top_logprobs": [{"b": -1.0, "a": -0.5}, {"b": -1.0}],
    }


async def test_text_offsets_go_on_from_chunk_to_chunk(start: StartServer) -> None:
    server = await start(reply="ab cd")
    chunks = await stream(server, "/v1/completions", prompt="x", logprobs=0)
    offsets = [offset for chunk in chunks[:-1] for offset in chunk["choices"][0]["logprobs"]["text_offset"]]
    assert offsets == [0, 1, 2, 3, 4]
    assert chunks[0]["choices"][0]["logprobs"]["top_logprobs"] is None


async def test_every_sampling_field_reaches_the_engine(start: StartServer) -> None:
    server = await start()
    sampling = {
        "temperature": 0,
        "top_p": 0.5,
        "top_k": 7,
        "min_p": 0.1,
        "repetition_penalty": 1.1,
        "frequency_penalty": 0.3,
        "presence_penalty": -0.2,
        "seed": 42,
        "min_tokens": 2,
        "ignore_eos": True,
        "skip_special_tokens": False,
    }
    body = {"messages": ASK, **sampling, "stop": "END", "stop_token_ids": [5], "logit_bias": {"7": -100}}
    async with server.post("/v1/chat/completions", {**body, "max_tokens": 3, "max_completion_tokens": 9}) as response:
        assert response.status == 200
    params = server.engine.live[0].params
    assert {name: getattr(params, name) for name in sampling} == sampling
    assert (params.stop, params.stop_token_ids, params.logit_bias) == (("END",), (5,), {7: -100.0})
    assert params.max_tokens == 9
    assert params.logprobs is None


async def test_defaults_are_openais(start: StartServer) -> None:
    server = await start()
    nothing = dict.fromkeys(["temperature", "stop", "max_tokens", "n", "logit_bias", "seed", "stream", "user"])
    for path, body in (("/v1/completions", {"prompt": "x"}), ("/v1/chat/completions", {"messages": ASK})):
        async with server.post(path, {**body, **nothing}) as response:
            assert response.status == 200
    completion, chat = (stream.params for stream in server.engine.live)
    assert (completion.temperature, completion.top_p, completion.max_tokens) == (1.0, 1.0, 16)
    assert chat.max_tokens is None


async def test_unknown_fields_are_ignored_and_logged_once(start: StartServer, caplog: pytest.LogCaptureFixture) -> None:
    server = await start()
    caplog.set_level("INFO")
    for _ in range(2):
        async with server.post("/v1/completions", {"prompt": "a secret", "wobble": 3, "user": "me"}) as response:
            assert response.status == 200
    assert len([record for record in caplog.records if "wobble" in record.getMessage()]) == 1
    assert "secret" not in caplog.text


async def test_request_id_is_echoed_or_made_and_logged(start: StartServer, caplog: pytest.LogCaptureFixture) -> None:
    server = await start()
    caplog.set_level("INFO")
    async with server.post("/v1/completions", {"prompt": "x"}, headers={"X-Request-Id": "mine-1"}) as response:
        assert response.headers["X-Request-Id"] == "mine-1"
    async with server.get("/v1/models?key=secret", headers={"X-Request-Id": "é" * 3}) as response:
        assert response.headers["X-Request-Id"].startswith("req-")
    lines = [record.getMessage() for record in caplog.records if record.name == "tfserve.http.app"]
    assert lines[0].startswith("mine-1 POST /v1/completions 200 in ")
    assert lines[0].endswith(", 2 + 17 tokens")
    assert "secret" not in caplog.text


async def test_models_version_and_probes(start: StartServer) -> None:
    server = await start()
    async with server.get("/v1/models") as response:
        models = (await response.json())["data"]
    assert [(model["id"], model["max_model_len"]) for model in models] == [("tiny", 1000)]
    async with server.get("/v1/models/tiny") as response:
        assert (await response.json())["object"] == "model"
    async with server.get("/version") as response:
        assert set(await response.json()) == {"version"}
    for path in ("/health", "/ready"):
        async with server.get(path) as response:
            body = await response.json()
            assert (response.status, body["status"]) == (200, "ready")
            assert ("engine" in body) == (path == "/health")


async def test_the_readers_rate_reaches_the_engine_from_both_endpoints(start: StartServer) -> None:
    server = await start()
    for body, rate in (
        ({"consumption_rate": 7.5}, 7.5),
        ({"consumption_rate": "read"}, "read"),
        ({"consumption_rate": None}, None),
        ({"consumption_rate": None, "stream": True}, None),
        ({"stream": True}, UNSET),
        # An answer that comes whole has no reader, unless it names a rate.
        ({}, None),
    ):
        for path, ask in (("/v1/chat/completions", {"messages": ASK}), ("/v1/completions", {"prompt": "Hi"})):
            async with server.post(path, {**ask, **body}) as response:
                assert response.status == 200
                await response.read()
            assert server.engine.live[-1].asked_rate == rate


async def test_the_priority_reaches_the_engine(start: StartServer) -> None:
    server = await start()
    for body, priority in (({"priority": -7}, -7), ({"priority": None}, 0), ({}, 0)):
        for path, ask in (("/v1/chat/completions", {"messages": ASK}), ("/v1/completions", {"prompt": "Hi"})):
            async with server.post(path, {**ask, **body}) as response:
                assert response.status == 200
            assert server.engine.live[-1].asked_priority == priority


@pytest.mark.parametrize("rate", [0, -3, 1e-300, 1e308, "slowly", True, [6]])
async def test_a_bad_rate_is_named(start: StartServer, rate: object) -> None:
    server = await start()
    async with server.post("/v1/completions", {"prompt": "Hi", "consumption_rate": rate}) as response:
        assert response.status == 400
        assert (await response.json())["error"]["param"] == "consumption_rate"


@pytest.mark.parametrize("value", [-math.inf, math.nan])
async def test_log_probabilities_that_json_lacks_are_very_small_ones(
    start: StartServer, monkeypatch: pytest.MonkeyPatch, value: float
) -> None:
    scored = TokenLogprob(97, value, ((98, -0.5), (99, value)))
    monkeypatch.setattr(fakes, "_fake_logprobs", lambda ids, top: [scored] * len(ids))
    server = await start(reply="a")
    async with server.post("/v1/completions", {"prompt": "x", "logprobs": 2, "echo": True}) as response:
        plain = (await response.json())["choices"][0]["logprobs"]
    assert plain["token_logprobs"] == [None, -9999.0, -9999.0]
    assert plain["top_logprobs"][1:] == [{"b": -0.5, "c": -9999.0, "a": -9999.0}] * 2
    async with server.post("/v1/chat/completions", {"messages": ASK, "logprobs": True, "top_logprobs": 2}) as response:
        (entry,) = (await response.json())["choices"][0]["logprobs"]["content"]
    assert [entry["logprob"], *(top["logprob"] for top in entry["top_logprobs"])] == [-9999.0, -0.5, -9999.0]
