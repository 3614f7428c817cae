"""Clients that name a rate to get more than their share: other clients are served, and the rate that counts is told."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from tests.attack.test_tenants import KEYS
from tests.free_blocks import until_all_free
from tests.http.conftest import Running
from tests.http.test_keys import by
from tests.scripted import scripted_server, write_scripted_model

PLAIN = "/v1/completions"
HONEST = {"prompt": "hello there", "stream": True, "max_tokens": 40, "ignore_eos": True, "consumption_rate": 6}
HOSTILE = {"prompt": "hello there", "stream": True, "max_tokens": 3000, "ignore_eos": True}


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_scripted_model(tmp_path_factory.mktemp("scripted"))


@contextlib.asynccontextmanager
async def attacked(server: Running, count: int, **body: Any) -> AsyncIterator[list[asyncio.Task[int]]]:
    """Hostile streams that are read to their end; each task gives its status. They are closed at the end."""

    async def one() -> int:
        async with server.post(PLAIN, {**HOSTILE, **body}) as response:
            await response.read()
            return int(response.status)

    tasks = [asyncio.ensure_future(one()) for _ in range(count)]
    try:
        while len(await live(server)) < count and not all(task.done() for task in tasks):
            await asyncio.sleep(0.01)
        yield tasks
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def live(server: Running) -> list[dict[str, Any]]:
    async with server.get("/v1/streams") as response:
        return list((await response.json())["data"])


async def blocks_are_back(server: Running) -> None:
    await until_all_free(server.engine)
    while await live(server):
        await asyncio.sleep(0.01)


# -- the highest rate


async def test_a_named_rate_above_the_highest_is_lowered(model_dir: Path) -> None:
    settings = {"scheduler": {"max_rate": 8.0}}
    body = {"prompt": "x", "stream": True, "consumption_rate": "fast"}
    async with scripted_server(model_dir, "a b c", **settings) as server, server.post(PLAIN, body) as response:
        assert response.headers["X-Consumption-Rate"] == "8"
        await response.read()


async def test_live_streams_show_the_rate_that_counts(model_dir: Path) -> None:
    async with scripted_server(model_dir, "a b c ", ends=False) as server:
        async with attacked(server, 2, consumption_rate=1e6):
            assert {stream["rate"] for stream in await live(server)} <= {50.0}
        await asyncio.wait_for(blocks_are_back(server), 30)


# -- other clients are served


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    ("overload", "count", "rate"),
    [
        ("queue", 20, 1e6),
        ("shed", 1, 1e6),
        ("queue", 20, 0.01),
        *(pytest.param(overload, 40, 0.01, marks=SLOW) for overload in ("queue", "share", "shed")),
        pytest.param("share", 20, 1e6, marks=SLOW),
    ],
)
async def test_honest_readers_are_served_beside_rates_of_all_kinds(
    model_dir: Path, overload: str, count: int, rate: float
) -> None:
    settings: dict[str, Any] = {"num_gpu_blocks_override": 260, "host_kv_gib": 0.01}
    settings["scheduler"] = {"overload": overload}

    async def honest(server: Running) -> int:
        async with server.post(PLAIN, HONEST) as response:
            await response.read()
            return int(response.status)

    async with scripted_server(model_dir, "a b c ", ends=False, **settings) as server:
        async with attacked(server, count, consumption_rate=rate) as hostile:
            statuses = await asyncio.wait_for(asyncio.gather(*(honest(server) for _ in range(8))), 60)
            assert statuses == [200] * 8
            if count > 1:
                assert not all(task.done() for task in hostile), "honest readers waited for all of the others"
        await asyncio.wait_for(blocks_are_back(server), 30)


async def test_under_shed_another_key_is_served_beside_one_that_has_all_that_can_be_promised(model_dir: Path) -> None:
    settings: dict[str, Any] = {"num_gpu_blocks_override": 260, "host_kv_gib": 0.01}
    settings |= {"scheduler": {"overload": "shed"}, "server": {"api_keys": KEYS}}

    async def hostile(server: Running) -> int:
        async with server.post(PLAIN, {**HOSTILE, "consumption_rate": 1e6}, headers=by("hostile")) as response:
            await response.read()
            return int(response.status)

    async with scripted_server(model_dir, "a b c ", ends=False, **settings) as server:
        tasks = [asyncio.ensure_future(hostile(server)) for _ in range(40)]
        await asyncio.wait_for(asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED), 60)
        assert 429 in {task.result() for task in tasks if task.done()}, "the engine is not overloaded"
        for _ in range(8):
            async with asyncio.timeout(60), server.post(PLAIN, HONEST, headers=by("honest")) as response:
                assert response.status == 200
                await response.read()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await asyncio.wait_for(until_all_free(server.engine), 30)


# -- reports


def events(data: bytes) -> Iterator[Any]:
    for line in data.splitlines():
        if line.startswith(b"data: {"):
            yield json.loads(line[6:])


@pytest.mark.parametrize("rate", ["auto", 6.0])
async def test_reports_that_all_is_played_claim_no_more_than_the_highest_rate(model_dir: Path, rate: Any) -> None:
    async with scripted_server(model_dir, "a b c ", ends=False) as server:
        body = {**HOSTILE, "max_tokens": 500, "consumption_rate": rate}
        async with server.post(PLAIN, body) as response:
            await claim_everything(server, response)
        await asyncio.wait_for(blocks_are_back(server), 30)


async def claim_everything(server: Running, response: aiohttp.ClientResponse) -> None:
    """Report nothing, then everything, in turn: a great leap in no time."""
    name, seen, reports = "", 0, 0
    async for line in response.content:
        for event in events(line):
            name, seen = event["id"], seen + 1
        if seen and seen % 50 == 0:
            reports += 1
            played = 0 if reports % 2 else seen
            async with server.post(f"/v1/streams/{name}/buffer", {"played_tokens": played}) as answer:
                assert answer.status in (200, 404)
            for stream in await live(server):
                assert stream["rate"] <= 50.0
                # No more is played than the highest rate can have read of it.
                assert stream["num_output_tokens"] - stream["num_unread"] <= 50.0 * stream["age_s"] + 1
