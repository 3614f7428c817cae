"""Wrong requests: the status, OpenAI's error object, and that nothing reaches the engine."""

from __future__ import annotations

from typing import Any

import pytest

from tests.http.conftest import StartServer
from tests.panics import PanicException

CHAT = "/v1/chat/completions"
PLAIN = "/v1/completions"
ASK = [{"role": "user", "content": "Hi"}]


def message(**fields: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": "Hi", **fields}]


CALL = {"type": "function", "id": "1", "function": {"name": "f", "arguments": "{}"}}
TOOL = {"type": "function", "function": {"name": "f"}}


def called(arguments: str) -> dict[str, Any]:
    return {"role": "assistant", "tool_calls": [{**CALL, "function": {"name": "f", "arguments": arguments}}]}


def named(name: str) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name}}


def schema(body: Any) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "answer", "schema": body}}


@pytest.mark.parametrize(
    ("path", "body", "param", "says"),
    [
        (CHAT, b"{not json", None, "not valid JSON"),
        (CHAT, b'{"messages": [], "model": "\xff"}', "model", "not valid UTF-8"),
        (CHAT, b"", None, "not valid JSON"),
        (CHAT, [], None, "must be an object, got a list"),
        (CHAT, {}, "messages", "messages is required"),
        (CHAT, {"messages": []}, "messages", "at least one"),
        (CHAT, {"messages": "Hi"}, "messages", "must be a list, got a string"),
        (CHAT, {"messages": [{"content": "Hi"}]}, "messages[0].role", "required"),
        (CHAT, {"messages": message(role="wizard")}, "messages[0].role", "system, user, assistant or tool"),
        (CHAT, {"messages": message(role="tool", content=None)}, "messages[0].content", "required"),
        (CHAT, {"messages": message(tool_calls=[CALL])}, "messages[0].tool_calls", "only the assistant"),
        (CHAT, {"messages": [called("[]")]}, "messages[0].tool_calls[0].function.arguments", "object"),
        (CHAT, {"messages": [called("{")]}, "messages[0].tool_calls[0].function.arguments", "not valid JSON"),
        (CHAT, {"messages": message(content=None)}, "messages[0].content", "required"),
        (CHAT, {"messages": message(content=[{"type": "image_url"}])}, "messages[0].content[0]", "text"),
        (CHAT, {"messages": ASK, "max_tokens": -1}, "max_tokens", "at least 1, got -1"),
        (CHAT, {"messages": ASK, "max_completion_tokens": 0}, "max_completion_tokens", "at least 1, got 0"),
        (CHAT, {"messages": ASK, "max_tokens": 1.5}, "max_tokens", "must be an integer, got a number"),
        (CHAT, {"messages": ASK, "max_tokens": 10**30}, "max_tokens", "9223372036854775807"),
        (CHAT, {"messages": ASK, "top_p": 3}, "top_p", "between 0 and 1, got 3"),
        (CHAT, {"messages": ASK, "temperature": "hot"}, "temperature", "must be a number, got a string"),
        (CHAT, {"messages": ASK, "temperature": -1}, "temperature", "between 0 and 2"),
        (CHAT, {"messages": ASK, "top_logprobs": 3}, "top_logprobs", "needs logprobs"),
        (CHAT, {"messages": ASK, "logprobs": True, "top_logprobs": 21}, "top_logprobs", "between 0 and 20"),
        (CHAT, {"messages": ASK, "logit_bias": {"x": 1}}, "logit_bias", "keys that are each an integer"),
        (CHAT, {"messages": ASK, "logit_bias": {"5": None}}, "logit_bias['5']", "must be a number, got null"),
        (CHAT, {"messages": ASK, "logit_bias": {"999": 1}}, "logit_bias", "999"),
        (CHAT, {"messages": ASK, "logit_bias": {"7": "x"}}, "logit_bias['7']", "must be a number, got a string"),
        (CHAT, b'{"messages": [], "temperature": 1e999}', "temperature", "out of range"),
        (CHAT, b'{"messages": [], "max_tokens": 1' + b"0" * 5000 + b"}", "max_tokens", "out of range"),
        (CHAT, {"messages": ASK, "consumption_rate": []}, "consumption_rate", "must be a number or a string, got a"),
        (CHAT, {"messages": ASK, "tools": [named("a b")]}, "tools[0].function.name", "that matches"),
        (
            CHAT,
            {"messages": ASK, "tool_choice": {"type": "function", "function": {}}},
            "tool_choice.function.name",
            "is",
        ),
        (CHAT, {"messages": ASK, "stop": ["x"] * 65}, "stop", "at most 64"),
        (CHAT, {"messages": ASK, "stop": ""}, "stop", "non-empty"),
        (CHAT, {"messages": ASK, "stop_token_ids": [300]}, "stop_token_ids", "300"),
        (CHAT, {"messages": ASK, "stream_options": {"include_usage": True}}, "stream_options", "stream"),
        (CHAT, {"messages": ASK, "n": 0}, "n", "between 1 and 128"),
        (CHAT, {"messages": ASK, "n": 129}, "n", "between 1 and 128"),
        (CHAT, {"messages": ASK, "tools": [{"type": "function"}]}, "tools[0].function", "required"),
        (CHAT, {"messages": ASK, "tools": [TOOL] * 129}, "tools", "at most 128"),
        (CHAT, {"messages": ASK, "tool_choice": "required"}, "tool_choice", "no tools"),
        (CHAT, {"messages": ASK, "tools": [TOOL], "tool_choice": "wobble"}, "tool_choice", "must be none, auto"),
        (CHAT, {"messages": ASK, "tools": [TOOL], "tool_choice": named("g")}, "tool_choice", "'g', which is not"),
        (
            CHAT,
            {"messages": ASK, "tools": [TOOL], "response_format": {"type": "json_object"}},
            "response_format",
            "tools",
        ),
        (CHAT, {"messages": ASK, "response_format": {"type": "wobble"}}, "response_format.type", "wobble"),
        (
            CHAT,
            {"messages": ASK, "response_format": {"type": "json_schema"}},
            "response_format.json_schema",
            "required",
        ),
        (CHAT, {"messages": ASK, "response_format": schema({"type": "wobble"})}, "response_format", "cannot be served"),
        (CHAT, {"messages": ASK, "response_format": schema({}), "min_tokens": 3}, "min_tokens", "0 where a grammar"),
        (CHAT, {"messages": ASK, "response_format": schema({"enum": ["x" * 150_000]})}, "response_format", "too long"),
        (CHAT, {"messages": ASK, "functions": [{}]}, "functions", "not supported"),
        (CHAT, {"messages": message(content="x" * 2000)}, "messages", "tokens"),
        (PLAIN, {}, "prompt", "required"),
        (PLAIN, {"prompt": []}, "prompt", "list of token ids"),
        (PLAIN, {"prompt": ["a", 1]}, "prompt", "not mix"),
        (PLAIN, {"prompt": [1, 300]}, "prompt", "token id 300 is not in the vocabulary"),
        (PLAIN, {"prompt": [2**63]}, "prompt[0]", "9223372036854775807"),
        (PLAIN, {"prompt": {"a": 1}}, "prompt", "must be a string or a list"),
        (PLAIN, {"prompt": "x", "best_of": 2}, "best_of", "must equal n (1), got 2"),
        (PLAIN, {"prompt": "x", "max_tokens": 0}, "max_tokens", "at least 1, got 0"),
        (PLAIN, {"prompt": "x", "max_tokens": -1, "echo": True}, "max_tokens", "at least 0, got -1"),
        (PLAIN, {"prompt": ["x"] * 100, "n": 3}, "n", "at most 256 choices"),
        (PLAIN, {"prompt": [1, 999], "echo": True}, "prompt", "token id 999"),
        (PLAIN, {"prompt": [1, -(2**40)], "echo": True}, "prompt", "not in the vocabulary"),
        (PLAIN, {"prompt": "x", "suffix": "y"}, "suffix", "not supported"),
        (PLAIN, {"prompt": "x", "logprobs": -1}, "logprobs", "between 0 and 20"),
    ],
)
async def test_bad_requests_are_400_and_say_why(
    start: StartServer, path: str, body: Any, param: str | None, says: str
) -> None:
    server = await start()
    streamed = [{**body, "stream": True}] if isinstance(body, dict) and "stream_options" not in body else []
    for request in [body, *streamed]:
        async with server.post(path, request) as response:
            assert response.status == 400
            assert response.content_type == "application/json"
            error = (await response.json())["error"]
        assert set(error) == {"message", "type", "param", "code"}
        assert error["type"] == "invalid_request_error"
        assert error["param"] == param
        assert says in error["message"]
    assert server.engine.live == []
    assert server.service.num_open == 0


async def test_values_that_ask_for_nothing_are_accepted(start: StartServer) -> None:
    server = await start()
    idle = {
        "n": 1,
        "tools": [],
        "response_format": {"type": "text"},
        "tool_choice": "none",
        "audio": None,
        "store": False,
    }
    async with server.post(CHAT, {"messages": ASK, **idle}) as response:
        assert response.status == 200


async def test_over_length_has_openais_code(start: StartServer) -> None:
    server = await start()
    async with server.post(PLAIN, {"prompt": "x" * 2000}) as response:
        assert (await response.json())["error"]["code"] == "context_length_exceeded"


async def test_one_bad_prompt_rejects_the_list_and_frees_the_others(start: StartServer) -> None:
    server = await start(reply=None)
    async with server.post(PLAIN, {"prompt": [[1], [2], [999]]}) as response:
        assert response.status == 400
    assert len(server.engine.live) == 2
    assert all(stream.aborted.is_set() for stream in server.engine.live)


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", "/v1/models/nope", 404, "model_not_found"),
        ("GET", "/v2/models", 404, "not_found"),
        ("GET", CHAT, 405, "method_not_allowed"),
        ("DELETE", "/health", 405, "method_not_allowed"),
    ],
)
async def test_wrong_addresses_are_json_errors(
    start: StartServer, method: str, path: str, status: int, code: str
) -> None:
    server = await start()
    async with server.session.request(method, server.url + path) as response:
        assert response.status == status
        assert (await response.json())["error"]["code"] == code


async def test_unknown_model_is_404_and_names_the_served_one(start: StartServer) -> None:
    server = await start()
    async with server.post(CHAT, {"model": "gpt-5", "messages": ASK}) as response:
        error = (await response.json())["error"]
    assert response.status == 404
    assert (error["param"], error["code"]) == ("model", "model_not_found")
    assert "'tiny'" in error["message"]


@pytest.mark.parametrize("chunked", [False, True])
async def test_a_body_over_the_limit_is_413(start: StartServer, chunked: bool) -> None:
    server = await start(max_body_bytes=1000)

    async def pieces() -> Any:
        for _ in range(20):
            yield b"x" * 100

    async with server.session.post(server.url + PLAIN, data=pieces() if chunked else b"x" * 2000) as response:
        assert response.status == 413
        assert "1000 bytes" in (await response.json())["error"]["message"]


async def test_a_full_queue_is_429_with_retry_after(start: StartServer) -> None:
    server = await start()
    server.engine.queue_full = True
    async with server.post(CHAT, {"messages": ASK, "stream": True}) as response:
        assert response.status == 429
        assert response.headers["Retry-After"] == "3"
        assert (await response.json())["error"]["code"] == "queue_full"


@pytest.mark.parametrize(("fields", "param"), [({"n": 34}, "n"), ({"prompt": ["a"] * 34}, "prompt")])
async def test_more_choices_than_ever_fit_are_no_429(start: StartServer, fields: dict[str, Any], param: str) -> None:
    """A client would send them again and again."""
    server = await start(max_queued_requests=1)  # and 32 run
    async with server.post(PLAIN, {"prompt": "a", **fields}) as response:
        assert (response.status, response.headers["X-Should-Retry"]) == (400, "false")
        assert (await response.json())["error"]["param"] == param


@pytest.mark.parametrize(
    ("header", "status"),
    [(None, 401), ("Bearer wrong", 401), ("Basic key-2", 401), ("Bearer clé", 401), ("Bearer key-2", 200)],
)
async def test_keys_guard_the_api_and_not_the_probes(start: StartServer, header: str | None, status: int) -> None:
    server = await start(api_keys=["key-1", "key-2"])
    headers = {"Authorization": header} if header else {}
    async with server.get("/v1/models", headers=headers) as response:
        assert response.status == status
        if status == 401:
            assert response.headers["WWW-Authenticate"] == "Bearer"
            assert (await response.json())["error"]["code"] == "invalid_api_key"
    async with server.get("/health") as response:
        assert response.status == 200


async def test_nothing_is_served_while_loading(start: StartServer) -> None:
    server = await start(loaded=False)
    async with server.post(CHAT, {"messages": ASK}) as response:
        assert (response.status, response.headers["Retry-After"]) == (503, "1")
        assert (await response.json())["error"]["code"] == "loading"
    for path in ("/health", "/ready"):
        async with server.get(path) as response:
            assert (response.status, await response.json()) == (503, {"status": "loading"})
    server.service.ready(server.engine)
    async with server.post(CHAT, {"messages": ASK}) as response:
        assert response.status == 200


async def test_an_engine_without_progress_is_unhealthy(start: StartServer) -> None:
    server = await start()
    server.engine.stuck = True
    async with server.get("/health") as response:
        assert response.status == 503
        assert "no progress" in (await response.json())["status"]


async def test_a_bug_is_a_bare_500_and_a_logged_traceback(start: StartServer, caplog: pytest.LogCaptureFixture) -> None:
    server = await start()
    server.engine.tokenizer = None  # type: ignore[assignment]
    async with server.post(CHAT, {"messages": ASK}) as response:
        text = await response.text()
    assert response.status == 500
    assert "NoneType" not in text
    assert any(record.exc_info for record in caplog.records)


async def test_a_panic_of_a_library_fails_its_request_and_no_other(
    start: StartServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the event loop, in the thread that tokenises long texts, and in the one that checks grammars."""

    def panic(*_: object, **__: object) -> None:
        raise PanicException("index out of bounds")

    server = await start()
    for work in ("encode", "exceeds"):
        monkeypatch.setattr(server.engine.tokenizer, work, panic, raising=False)
    monkeypatch.setattr("tfserve.http.structured.check_grammar", panic)
    bodies = ({"messages": ASK}, {"messages": [{"role": "user", "content": "a" * 40_000}]})
    for body in (*bodies, {"messages": ASK, "response_format": {"type": "json_object"}}):
        async with server.post(CHAT, body) as response:
            assert (response.status, (await response.json())["error"]["type"]) == (500, "server_error")
    monkeypatch.undo()
    async with server.post(CHAT, {"messages": ASK}) as response:
        assert response.status == 200


@pytest.mark.parametrize(
    "body",
    [
        {"prompt": ["a"] * 300},
        b'{"prompt": "x", "z": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    ],
    ids=["too many prompts", "nested too deeply"],
)
async def test_bodies_made_to_hurt_are_refused(start: StartServer, body: Any) -> None:
    server = await start()
    async with server.post("/v1/completions", body) as response:
        assert response.status == 400
        assert not server.engine.live
