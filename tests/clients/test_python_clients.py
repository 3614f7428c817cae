"""One conversation by every client that people bring: answer, stream, tool call and result, usage, errors."""

from __future__ import annotations

import json
from typing import Any

import openai
import pytest

from tests.clients.conftest import ASK, NO_END, TOOL
from tests.serving import Server

NUM_TOKENS = 12

pytestmark = [
    pytest.mark.slow,
    # Ignore warnings of other libraries at import.
    pytest.mark.filterwarnings("ignore"),
]


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """Switch the libraries' telemetry off."""
    monkeypatch.setenv("LITELLM_LOCAL_MODEL_COST_MAP", "True")
    monkeypatch.setenv("LANGSMITH_TRACING", "false")
    monkeypatch.setenv("DO_NOT_TRACK", "1")


def check_call(name: str, arguments: str) -> None:
    assert name == "weather"
    given = json.loads(arguments)
    assert given["city"] in ("Oslo", "Rome")
    assert given["days"] in (1, 2, 3)


def with_result(call: Any) -> list[dict[str, Any]]:
    """The conversation after the tool has run."""
    function = {"name": call.function.name, "arguments": call.function.arguments}
    calls = [{"id": call.id, "type": "function", "function": function}]
    return [
        *ASK,
        {"role": "assistant", "content": None, "tool_calls": calls},
        {"role": "tool", "tool_call_id": call.id, "content": "sunny"},
    ]


GREEDY: dict[str, Any] = {"temperature": 0, "max_tokens": NUM_TOKENS, "logit_bias": NO_END}
FORCED: dict[str, Any] = {"tools": [TOOL], "tool_choice": "required", "parallel_tool_calls": False, "seed": 1}


def test_openai(server: Server) -> None:
    with openai.OpenAI(base_url=server.url + "/v1", api_key="key", max_retries=0) as client:
        create: Any = client.chat.completions.create
        answer = create(model="tiny", messages=ASK, **GREEDY)
        text = answer.choices[0].message.content
        assert text
        assert answer.choices[0].finish_reason == "length"
        assert answer.usage.completion_tokens == NUM_TOKENS
        assert answer.usage.total_tokens == answer.usage.prompt_tokens + NUM_TOKENS

        chunks = list(create(model="tiny", messages=ASK, stream=True, stream_options={"include_usage": True}, **GREEDY))
        assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == text
        assert chunks[-1].usage.completion_tokens == NUM_TOKENS

        choice = create(model="tiny", messages=ASK, **FORCED).choices[0]
        assert choice.finish_reason == "tool_calls"
        (call,) = choice.message.tool_calls
        check_call(call.function.name, call.function.arguments)
        after = create(model="tiny", messages=with_result(call), tools=[TOOL], tool_choice="none", **GREEDY)
        assert after.choices[0].message.content
        assert after.usage.prompt_tokens > answer.usage.prompt_tokens

        with pytest.raises(openai.NotFoundError, match="gpt-5"):
            create(model="gpt-5", messages=ASK)
        with pytest.raises(openai.BadRequestError) as too_long:
            create(model="tiny", messages=[{"role": "user", "content": "sky " * 2000}])
        assert too_long.value.code == "context_length_exceeded"


async def test_async_openai(server: Server) -> None:
    async with openai.AsyncOpenAI(base_url=server.url + "/v1", api_key="key", max_retries=0) as client:
        create: Any = client.chat.completions.create
        text = (await create(model="tiny", messages=ASK, **GREEDY)).choices[0].message.content
        stream = await create(model="tiny", messages=ASK, stream=True, stream_options={"include_usage": True}, **GREEDY)
        chunks = [chunk async for chunk in stream]
        assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == text
        assert chunks[-1].usage.completion_tokens == NUM_TOKENS
        stream = await create(model="tiny", messages=ASK, stream=True, **FORCED)
        parts = [part async for chunk in stream if chunk.choices for part in chunk.choices[0].delta.tool_calls or []]
        check_call(parts[0].function.name, "".join(part.function.arguments or "" for part in parts))
        with pytest.raises(openai.AuthenticationError):
            await client.with_options(api_key="wrong").models.list()


def test_litellm(server: Server) -> None:
    litellm = pytest.importorskip("litellm", reason="litellm is not installed; `make test-all` does (extra clients)")

    def ask(messages: list[dict[str, Any]] = ASK, model: str = "openai/tiny", **fields: Any) -> Any:
        return litellm.completion(
            model=model, api_base=server.url + "/v1", api_key="key", messages=messages, max_retries=0, **fields
        )

    answer = ask(**GREEDY)
    text = answer.choices[0].message.content
    assert text
    assert answer.usage.completion_tokens == NUM_TOKENS

    chunks = list(ask(stream=True, stream_options={"include_usage": True}, **GREEDY))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == text
    assert litellm.stream_chunk_builder(chunks).usage.completion_tokens == NUM_TOKENS

    (call,) = ask(**FORCED).choices[0].message.tool_calls
    check_call(call.function.name, call.function.arguments)
    assert ask(with_result(call), tools=[TOOL], tool_choice="none", **GREEDY).choices[0].message.content

    with pytest.raises(litellm.NotFoundError):
        ask(model="openai/gpt-nowhere")
    with pytest.raises(litellm.ContextWindowExceededError):
        ask([{"role": "user", "content": "sky " * 2000}])


def test_langchain(server: Server) -> None:
    langchain_openai = pytest.importorskip(
        "langchain_openai", reason="langchain-openai is not installed; `make test-all` does (extra clients)"
    )

    def chat(model: str = "tiny", **fields: Any) -> Any:
        # The limit's newer name is the one that LangChain sends.
        return langchain_openai.ChatOpenAI(
            model=model, base_url=server.url + "/v1", api_key="key", max_retries=0, stream_usage=True, **fields
        )

    limited = chat(temperature=0, max_completion_tokens=NUM_TOKENS, logit_bias={2: -100})
    answer = limited.invoke("Why is the sky blue?")
    assert answer.content
    assert answer.usage_metadata["output_tokens"] == NUM_TOKENS

    chunks = list(limited.stream("Why is the sky blue?"))
    whole = chunks[0]
    for chunk in chunks[1:]:
        whole += chunk
    assert whole.content == answer.content
    assert whole.usage_metadata["output_tokens"] == NUM_TOKENS

    asked = chat(seed=1).bind_tools([TOOL], tool_choice="required", parallel_tool_calls=False).invoke("Rain?")
    (call,) = asked.tool_calls
    check_call(call["name"], json.dumps(call["args"]))
    result = {"role": "tool", "tool_call_id": call["id"], "content": "sunny"}
    assert limited.invoke([("user", "Rain?"), asked, result]).content

    with pytest.raises(openai.NotFoundError):
        chat("gpt-5").invoke("Hi")
