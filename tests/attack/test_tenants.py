"""Kind: one key takes the server from the other keys, or touches their streams."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from tests.free_blocks import until_all_free
from tests.http.conftest import Running, StartServer
from tests.http.test_keys import by
from tests.scripted import scripted_server, write_scripted_model
from tfserve.types import StreamState

PLAIN = "/v1/completions"
KEYS = [{"name": name, "key": f"sk-{name}"} for name in ("honest", "hostile")]
HONEST = {"prompt": "Tell me", "stream": True, "max_tokens": 20}


@pytest.fixture(params=["tokenflow", "fcfs", "fcfs-chunked"])
async def server(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Running]:
    settings: Any = {"max_num_seqs": 4, "max_num_batched_tokens": 64, "scheduler": {"policy": request.param}}
    keys: Any = {"api_keys": KEYS, "max_queued_requests": 300}
    async with scripted_server(
        write_scripted_model(tmp_path), "word and ", ends=False, server=keys, **settings
    ) as server:
        yield server
        await asyncio.wait_for(server.service.idle.wait(), 10)
        await until_all_free(server.engine)


async def flood(server: Running, bodies: list[dict[str, Any]]) -> list[asyncio.Task[int]]:
    """Requests of the hostile key, once the engine is full of them."""

    async def one(body: dict[str, Any]) -> int:
        async with server.post(PLAIN, body, headers=by("hostile")) as response:
            await response.read()
            return int(response.status)

    tasks = [asyncio.ensure_future(one(body)) for body in bodies]
    async with asyncio.timeout(10):
        while (stats := server.engine.stats()).num_running < 1 or stats.num_waiting + stats.num_paused < 4:
            await asyncio.sleep(0.02)
    return tasks


async def end(tasks: list[asyncio.Task[int]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


HOSTILE = {
    "many": [{"prompt": "x", "stream": True, "max_tokens": 3000} for _ in range(90)],
    "fast": [{"prompt": "x", "stream": True, "max_tokens": 3000, "consumption_rate": 50} for _ in range(90)],
    "slow": [{"prompt": "x", "stream": True, "max_tokens": 3000, "consumption_rate": 0.01} for _ in range(90)],
    "unread": [{"prompt": "x", "max_tokens": 3000, "priority": -(2**63)} for _ in range(90)],
    "prompts": [{"prompt": [5] * 3000, "n": 64, "max_tokens": 500}],
}


@pytest.mark.parametrize("hostile", HOSTILE)
async def test_a_second_key_is_served_while_the_first_floods(server: Running, hostile: str) -> None:
    tasks = await flood(server, HOSTILE[hostile])
    for body in (HONEST, {**HONEST, "stream": False}):
        async with asyncio.timeout(20), server.post(PLAIN, body, headers=by("honest")) as response:
            assert response.status == 200
            await response.read()
    assert not all(task.done() for task in tasks)
    await end(tasks)


async def test_a_queue_full_of_one_key_takes_requests_of_another(server: Running) -> None:
    tasks = await flood(server, [{"prompt": "x", "n": 76, "max_tokens": 3000} for _ in range(4)])
    async with server.post(PLAIN, {"prompt": "x", "max_tokens": 3000}, headers=by("hostile")) as response:
        assert (response.status, (await response.json())["error"]["code"]) == (429, "queue_full")
    async with asyncio.timeout(20), server.post(PLAIN, HONEST, headers=by("honest")) as response:
        assert response.status == 200
        await response.read()
    await end(tasks)


async def test_another_keys_streams_cannot_be_found_or_ended(server: Running) -> None:
    tasks = await flood(server, HOSTILE["many"])
    async with server.get("/v1/streams", headers=by("hostile")) as response:
        names = [row["id"] for row in (await response.json())["data"]]
    assert len(names) == 90
    async with server.get("/v1/streams", headers=by("honest")) as response:
        assert (await response.json())["data"] == []
    for name in names[:5]:
        for path, body in (
            ("/abort_request", {"request_id": name}),
            (f"/v1/streams/{name}/buffer", {"played_tokens": 9}),
        ):
            async with server.post(path, body, headers=by("honest")) as response:
                assert response.status == 404
    assert not any(task.done() for task in tasks)
    await end(tasks)


async def test_many_who_look_at_streams_ask_the_engine_once_together(
    start: StartServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = await start(reply=None, api_keys=KEYS)
    asked, told = 0, asyncio.Event()

    async def streams() -> list[StreamState]:
        nonlocal asked
        asked += 1
        await told.wait()
        return []

    monkeypatch.setattr(server.engine, "streams", streams)

    async def look(name: str) -> int:
        async with server.get("/v1/streams", headers=by(name)) as response:
            return int(response.status)

    looking = [asyncio.ensure_future(look("hostile" if number else "honest")) for number in range(60)]
    async with asyncio.timeout(10):
        while not asked:
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.2)
        told.set()
        assert set(await asyncio.gather(*looking)) == {200}
    # The first, and one for all that came while it was on its way.
    assert asked <= 3


async def test_a_key_pays_for_each_choices_prompt_and_for_what_it_does_not_read(start: StartServer) -> None:
    server = await start(reply=None, api_keys=[{**KEYS[1], "tokens_per_minute": 1000}])

    async def left() -> int:
        async with server.post(PLAIN, {"prompt": "x", "n": 0}, headers=by("hostile")) as response:
            return int(response.headers["x-ratelimit-remaining-tokens"])

    assert await left() == 1000
    body = {"prompt": "x" * 99, "n": 4}
    asking = asyncio.ensure_future(server.post(PLAIN, body, headers=by("hostile")).__aenter__())
    await server.engine.submitted.wait()
    assert 600 <= await left() < 625
    server.engine.live[0].token_s += [0.0] * 500  # generated, and in no output that was taken
    asking.cancel()
    await asyncio.wait_for(server.service.idle.wait(), 10)
    assert 100 <= await left() < 130


async def test_one_key_cannot_have_all_connections(start: StartServer) -> None:
    server = await start(reply="hello", api_keys=KEYS, max_connections=8)
    looking = {"headers": {**by("hostile"), "Accept": "text/event-stream"}}
    async with contextlib.AsyncExitStack() as stack:
        seen = [await stack.enter_async_context(server.get("/v1/streams", **looking)) for _ in range(8)]
        assert [response.status for response in seen] == [200] * 6 + [429] * 2
        async with server.post(PLAIN, {"prompt": "x"}, headers=by("honest")) as response:
            assert response.status == 200
        for response in seen:
            response.close()
    async with asyncio.timeout(10):
        while True:
            async with server.post(PLAIN, {"prompt": "x"}, headers=by("hostile")) as response:
                if response.status == 200:
                    break
