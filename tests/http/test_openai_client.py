"""The official client works unchanged: sync and async, streaming and not, errors as its own exceptions."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import openai
import pytest

from tests.http.conftest import Running, StartServer
from tests.http.fakes import FakeEngine
from tfserve.types import FinishReason

ASK: Any = [{"role": "user", "content": "Hi"}]


def sync_client(server: Running, **kwargs: Any) -> openai.OpenAI:
    return openai.OpenAI(base_url=server.url + "/v1", api_key="key", **{"max_retries": 0, **kwargs})


def async_client(server: Running, **kwargs: Any) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(base_url=server.url + "/v1", api_key="key", **{"max_retries": 0, **kwargs})


@pytest.fixture
def in_thread() -> Iterator[Any]:
    """Run a blocking call beside the server's loop."""
    with ThreadPoolExecutor(1) as pool:

        async def run(call: Any) -> Any:
            return await asyncio.get_running_loop().run_in_executor(pool, call)

        yield run


async def test_sync_client(start: StartServer, in_thread: Any) -> None:
    server = await start(api_keys=["key"])

    def talk() -> None:
        with sync_client(server) as client:
            assert [model.id for model in client.models.list()] == ["tiny"]
            assert client.models.retrieve("tiny").object == "model"
            chat = client.chat.completions.create(model="tiny", messages=ASK, max_tokens=20)
            assert chat.choices[0].message.content == "Hello, wide world"
            assert chat.usage is not None
            assert chat.usage.completion_tokens == 17
            chunks = list(client.chat.completions.create(model="tiny", messages=ASK, stream=True))
            assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == "Hello, wide world"
            assert chunks[-1].choices[0].finish_reason == "stop"
            plain = client.completions.create(model="tiny", prompt=["a", "b"], logprobs=1)
            assert [choice.text for choice in plain.choices] == ["Hello, wide world"] * 2
            parts = list(client.completions.create(model="tiny", prompt=[1, 2], stream=True))
            assert "".join(part.choices[0].text for part in parts) == "Hello, wide world"

    await in_thread(talk)


async def test_async_client(start: StartServer) -> None:
    server = await start()
    async with async_client(server) as client:
        chat = await client.chat.completions.create(
            model="tiny", messages=ASK, logprobs=True, top_logprobs=1, extra_body={"top_k": 5}
        )
        assert chat.choices[0].logprobs is not None
        assert len(chat.choices[0].logprobs.content or []) == 17
        assert server.engine.live[0].params.top_k == 5
        stream = await client.chat.completions.create(
            model="tiny", messages=ASK, stream=True, stream_options={"include_usage": True}
        )
        chunks = [chunk async for chunk in stream]
        assert chunks[-1].usage is not None
        assert chunks[-1].usage.completion_tokens == 17
        assert chunks[-1].choices == []


async def test_errors_are_the_clients_own_exceptions(start: StartServer) -> None:
    server = await start(api_keys=["key"])
    async with async_client(server) as client:
        with pytest.raises(openai.NotFoundError) as missing:
            await client.chat.completions.create(model="gpt-5", messages=ASK)
        assert missing.value.code == "model_not_found"
        with pytest.raises(openai.BadRequestError) as bad:
            await client.chat.completions.create(model="tiny", messages=ASK, n=0)
        assert bad.value.param == "n"
        server.engine.queue_full = True
        with pytest.raises(openai.RateLimitError):
            await client.chat.completions.create(model="tiny", messages=ASK)
        with pytest.raises(openai.AuthenticationError):
            await client.with_options(api_key="wrong").models.list()


async def test_an_error_mid_stream_is_raised(start: StartServer) -> None:
    server = await start(reply=None)
    async with async_client(server) as client:
        stream = await client.completions.create(model="tiny", prompt="x", stream=True)
        server.engine.live[0].say("first")
        assert (await anext(stream)).choices[0].text == "first"
        server.engine.live[0].fail("out of KV blocks")
        with pytest.raises(openai.APIError, match="out of KV blocks"):
            await anext(stream)


async def test_closing_a_stream_aborts_the_request(start: StartServer) -> None:
    server = await start(reply=None)
    async with async_client(server) as client:
        stream = await client.chat.completions.create(model="tiny", messages=ASK, stream=True)
        server.engine.live[0].say("first")
        await anext(stream)
        await stream.close()
        await asyncio.wait_for(server.engine.live[0].aborted.wait(), 2)


async def test_a_client_that_times_out_aborts_the_request(start: StartServer) -> None:
    server = await start(reply=None)
    async with async_client(server, timeout=0.2) as client:
        with pytest.raises(openai.APITimeoutError):
            await client.completions.create(model="tiny", prompt="x")
    await asyncio.wait_for(server.engine.live[0].aborted.wait(), 2)
    server.engine.live[0].say("late", FinishReason.STOP)
    await asyncio.wait_for(server.service.idle.wait(), 2)


ENDS: dict[str, Any] = {
    "aborted": lambda server, stream: server.post("/abort_request", {"request_id": stream.request_id[:-2]}),
    "aborted by a choice": lambda server, stream: server.post("/abort_request", {"request_id": stream.request_id}),
    "its own failure": lambda server, stream: stream.fail("not finite", recurs=True),
    "a failed step": lambda server, stream: stream.fail("a step failed"),
    "the engine ends": lambda server, stream: stream.abort(),
    "draining": lambda server, stream: server.service.abort_open("The server is shutting down."),
    "dead": lambda server, stream: server.engine.die("killed"),
    "refused": lambda server, stream: stream.refuse(3.0),
}
"""How an answer that is not streamed may come to no good end."""

RECURS = {"aborted", "aborted by a choice", "its own failure"}


@pytest.mark.parametrize("end", ENDS)
async def test_what_would_come_out_the_same_again_says_so(start: StartServer, end: str) -> None:
    server = await start(reply=None)
    asked = asyncio.ensure_future(server.post("/v1/completions", {"prompt": "x"}).__aenter__())
    await asyncio.wait_for(server.engine.submitted.wait(), 2)
    ending = ENDS[end](server, server.engine.live[0])
    if ending is not None:
        (await ending).close()
    response = await asked
    assert response.status in (429, 500, 503)
    assert response.headers.get("x-should-retry") == ("false" if end in RECURS else None)
    response.close()


async def test_the_official_client_repeats_nothing_that_would_come_out_the_same_again(start: StartServer) -> None:
    server = await start(reply=None)
    async with async_client(server, max_retries=3) as client:
        for number, end in enumerate(sorted(RECURS)):
            asked = asyncio.ensure_future(client.chat.completions.create(model="tiny", messages=ASK))
            await asyncio.wait_for(server.engine.submitted.wait(), 2)
            server.engine.submitted.clear()
            ending = ENDS[end](server, server.engine.live[-1])
            if ending is not None:
                (await ending).close()
            with pytest.raises(openai.InternalServerError):
                await asked
            assert len(server.engine.live) == number + 1


async def test_a_bug_of_ours_is_met_once(start: StartServer) -> None:
    class Broken(FakeEngine):
        def submit(self, *args: Any, **kwargs: Any) -> Any:
            super().submit(*args, **kwargs)
            raise ZeroDivisionError

    server = await start(reply=None, engine_class=Broken)
    async with async_client(server, max_retries=3) as client:
        with pytest.raises(openai.InternalServerError):
            await client.chat.completions.create(model="tiny", messages=ASK)
    assert len(server.engine.live) == 1
