"""The whole path: HTTP, engine process, a tiny real model; clients that leave and processes that die."""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
from pathlib import Path

import aiohttp
import pytest
from aiohttp import web

from tests.free_blocks import until_all_free
from tests.serving import Server
from tests.tokenizers import write_tiny_tokenizer
from tfserve.config import EngineConfig
from tfserve.engine.engine import Engine
from tfserve.http.app import create_app
from tfserve.http.service import Service
from tfserve.types import SamplingParams

NUM_STREAMS, NUM_LEAVING, NUM_TOKENS = 100, 20, 40


@pytest.fixture(scope="module")
def model_dir(tiny_llama3: Path) -> Path:
    return write_tiny_tokenizer(tiny_llama3)


def prompt_of(index: int) -> list[int]:
    return [3 + (index * 7 + k) % 500 for k in range(1 + index % 30)]


async def read_stream(response: aiohttp.ClientResponse, leave_after: int | None = None) -> tuple[str, list[object]]:
    """The text and the raw events of a completion stream; leaves after that many events if asked to."""
    text, seen = "", []
    try:
        async for line in response.content:
            if not line.startswith(b"data: "):
                continue
            data = line[6:].strip()
            seen.append(data if data == b"[DONE]" else json.loads(data))
            if data != b"[DONE]" and "choices" in seen[-1]:
                text += "".join(choice["text"] for choice in seen[-1]["choices"])
            if leave_after is not None and len(seen) >= leave_after:
                break
    finally:
        response.close()
    return text, seen


async def test_eighty_of_a_hundred_streams_complete_exactly_while_twenty_clients_leave(model_dir: Path) -> None:
    config = EngineConfig(
        model=str(model_dir), engine_process="on", max_model_len=256, max_num_seqs=16, threads=1, debug_checks=True
    )
    params = SamplingParams(temperature=0, max_tokens=NUM_TOKENS, ignore_eos=True)
    rng = random.Random(5)
    leaving = set(rng.sample(range(NUM_STREAMS), NUM_LEAVING))
    with await asyncio.to_thread(Engine, config) as engine:
        prompts = [prompt_of(index) for index in range(NUM_STREAMS)]
        expected = [o.text for o in await asyncio.to_thread(engine.generate, prompts, params)]
        service = Service(engine.config)
        service.ready(engine)
        runner = web.AppRunner(create_app(service), handler_cancellation=True, access_log=None)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        url = f"http://127.0.0.1:{runner.addresses[0][1]}/v1/completions"

        async def one(index: int, session: aiohttp.ClientSession) -> str | None:
            body = {"prompt": prompts[index], "stream": True, "max_tokens": NUM_TOKENS, "temperature": 0}
            async with session.post(url, json={**body, "ignore_eos": True}) as response:
                assert response.status == 200
                if index in leaving:
                    # Some clients leave in the queue (before any event), some after a few tokens.
                    after = rng.randrange(0, 6)
                    if after == 0:
                        await asyncio.sleep(rng.random() * 0.2)
                        return None
                    await read_stream(response, leave_after=after)
                    return None
                text, seen = await read_stream(response)
                assert seen[-1] == b"[DONE]"
                return text

        connector = aiohttp.TCPConnector(limit=0)
        async with aiohttp.ClientSession(connector=connector) as session:
            got = await asyncio.gather(*(one(index, session) for index in range(NUM_STREAMS)))
        for index, text in enumerate(got):
            assert (text is None) == (index in leaving)
            assert text is None or text == expected[index]
        await until_all_free(engine)
        await runner.cleanup()


@pytest.fixture
def server(model_dir: Path, tmp_path: Path):
    with Server(model_dir, tmp_path / "log", "--server.drain_timeout", "1") as server:
        server.wait_until_ready()
        yield server


async def open_streams(server: Server, session: aiohttp.ClientSession, n: int) -> list[aiohttp.ClientResponse]:
    """Streams too long to finish by themselves, each of which has begun."""
    body = {"prompt": [5, 6, 7], "stream": True, "max_tokens": 1000, "temperature": 0, "ignore_eos": True}
    responses = [await session.post(server.url + "/v1/completions", json=body) for _ in range(n)]
    for response in responses:
        assert (await response.content.readline()).startswith(b"data: ")
    return responses


async def test_killed_engine_ends_streams_with_an_error_and_the_server_with_a_code(server: Server) -> None:
    async with aiohttp.ClientSession() as session:
        responses = await open_streams(server, session, 4)
        os.kill(server.engine().pid, signal.SIGKILL)
        for response in responses:
            _, seen = await read_stream(response)
            assert "SIGKILL" in seen[-2]["error"]["message"]
            assert seen[-1] == b"[DONE]"
        async with session.get(server.url + "/health") as health:
            assert health.status == 503
        assert await server.exit_code() == 1


async def test_killed_server_leaves_no_engine(server: Server) -> None:
    async with aiohttp.ClientSession() as session:
        responses = await open_streams(server, session, 2)
        engine = server.engine()
        server.process.kill()
        for response in responses:
            with pytest.raises(aiohttp.ClientError):
                await read_stream(response)
        await asyncio.to_thread(engine.wait, 10)


async def test_sigterm_drains_then_aborts_what_is_left(server: Server) -> None:
    async with aiohttp.ClientSession() as session:
        short = await session.post(
            server.url + "/v1/completions", json={"prompt": [5], "stream": True, "max_tokens": 2}
        )
        responses = await open_streams(server, session, 2)
        engine = server.engine()
        server.process.terminate()
        _, seen = await read_stream(short)
        assert "error" not in seen[-2]
        for response in responses:
            _, seen = await read_stream(response)
            assert seen[-1] == b"[DONE]"
        assert await server.exit_code() == 0
        assert not engine.is_running()


async def test_an_overloaded_server_refuses_a_rate_it_cannot_sustain_before_the_stream_begins(
    model_dir: Path, tmp_path: Path
) -> None:
    # A rate beyond the device counts as the speed of a stream: two of them take all there is.
    policy = ["--scheduler.policy", "tokenflow", "--scheduler.overload", "shed"]
    policy += ["--scheduler.max_rate", "1000000", "--max-num-seqs", "2"]
    body = {"prompt": [5, 6, 7], "stream": True, "max_tokens": 60, "ignore_eos": True, "consumption_rate": 1e6}

    async def one(server: Server, session: aiohttp.ClientSession) -> int:
        async with session.post(server.url + "/v1/completions", json=body) as response:
            if response.status == 429:
                assert int(response.headers["Retry-After"]) >= 1
                assert (await response.json())["error"]["code"] == "overloaded"
            else:
                _, seen = await read_stream(response)
                assert seen[-1] == b"[DONE]"
                assert all("error" not in chunk for chunk in seen[:-1])
            return response.status

    with Server(model_dir, tmp_path / "log", *policy) as server:
        server.wait_until_ready()
        async with aiohttp.ClientSession() as session:
            statuses = await asyncio.gather(*(one(server, session) for _ in range(20)))
            async with session.get(server.url + "/metrics") as response:
                metrics = await response.text()
    assert set(statuses) == {200, 429}
    refused = statuses.count(429)
    assert f'tfserve:requests_refused_total{{reason="overloaded"}} {float(refused)}' in metrics
