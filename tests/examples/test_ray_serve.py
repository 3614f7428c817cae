"""The Ray Serve example: two replicas share the streams, return the engine's tokens, refuse overload, notice aborts."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from tests.http.test_server import free_port
from tests.tokenizers import write_tiny_tokenizer
from tfserve.config import config_from
from tfserve.engine.engine import Engine
from tfserve.types import SamplingParams

REPO = Path(__file__).parents[2]
PROMPT, NUM_TOKENS, FOREVER = [5, 6, 7], 40, 900

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(600),
    # Ignore warnings of other libraries.
    pytest.mark.filterwarnings("ignore"),
]


class Cluster:
    """Ray and Ray Serve on this machine."""

    def __init__(self, serve: Any, port: int, model_dir: Path) -> None:
        self._serve = serve
        self.model_dir = model_dir
        self.url = f"http://127.0.0.1:{port}"

    def deploy(self, **args: Any) -> None:
        """Run the example with these arguments instead of what runs now."""
        from examples.ray_serve.app import build

        settings = {"model": self.model_dir, "max_model_len": 1024, "threads": 1, "cpus": 0.5}
        self._serve.run(build({name: str(value) for name, value in (settings | args).items()}))

    def remove(self) -> None:
        """End what runs; returns when its replicas are gone."""
        self._serve.delete("default")


@pytest.fixture(scope="module")
def cluster(tiny_qwen25: Path) -> Iterator[Cluster]:
    ray = pytest.importorskip("ray", reason="ray[serve] is not installed; `make test-all` does (extra ray)")
    from ray import serve

    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    port = free_port()
    # The workers import this tree; its tests need neither a dashboard nor gigabytes of shared memory.
    env = {"env_vars": {"PYTHONPATH": str(REPO)}}
    ray.init(num_cpus=4, include_dashboard=False, object_store_memory=100 * 2**20, runtime_env=env, log_to_driver=False)
    try:
        serve.start(http_options={"host": "127.0.0.1", "port": port})
        yield Cluster(serve, port, write_tiny_tokenizer(tiny_qwen25))
    finally:
        serve.shutdown()
        ray.shutdown()


@asynccontextmanager
async def session_of(cluster: Cluster) -> Any:
    async with aiohttp.ClientSession(cluster.url, timeout=aiohttp.ClientTimeout(60)) as session:
        yield session


async def read(response: aiohttp.ClientResponse) -> tuple[list[int], str]:
    """Tokens and finish reason of a stream, which must be whole."""
    events = [line[6:].strip() async for line in response.content if line.startswith(b"data: ")]
    assert events[-1] == b"[DONE]"
    choices = [json.loads(event)["choices"][0] for event in events[:-1]]
    return [token for choice in choices for token in choice["token_ids"]], choices[-1]["finish_reason"]


def body(max_tokens: int = NUM_TOKENS, **fields: Any) -> dict[str, Any]:
    return {"prompt": PROMPT, "max_tokens": max_tokens, "temperature": 0, "ignore_eos": True, **fields}


async def open_stream(session: aiohttp.ClientSession, max_tokens: int = FOREVER) -> aiohttp.ClientResponse:
    """A stream whose first token is there."""
    response = await session.post("/v1/completions", json=body(max_tokens))
    assert response.status == 200, await response.text()
    return response


async def stats(session: aiohttp.ClientSession, num_replicas: int) -> dict[str, dict[str, Any]]:
    """The statistics of every replica. Each query reaches one of them, so it is repeated until all have answered."""
    found: dict[str, dict[str, Any]] = {}
    for _ in range(200):
        async with session.get("/stats") as response:
            answer = await response.json()
        found[answer["replica"]] = answer
        if len(found) == num_replicas:
            return found
        await asyncio.sleep(0.02)
    raise AssertionError(f"only {set(found)} answered")


async def test_two_replicas_share_streams_and_say_the_engines_tokens(cluster: Cluster) -> None:
    await asyncio.to_thread(cluster.deploy, replicas=2, ongoing=1, waiting=1)
    config = config_from({"model": str(cluster.model_dir), "max_model_len": 1024, "threads": 1})
    with await asyncio.to_thread(Engine, config) as engine:
        params = SamplingParams(temperature=0, max_tokens=NUM_TOKENS, ignore_eos=True)
        (expected,) = await asyncio.to_thread(engine.generate, [PROMPT], params)
    async with session_of(cluster) as session:
        # Both are still open when the second one's first token is here.
        both = [await open_stream(session) for _ in range(2)]
        assert len({response.headers["X-Replica"] for response in both}) == 2
        for response in both:
            tokens, finish = await read(response)
            assert tokens[:NUM_TOKENS] == expected.token_ids
            assert (len(tokens), finish) == (FOREVER, "length")


async def test_the_engine_notices_a_client_that_leaves(cluster: Cluster) -> None:
    await asyncio.to_thread(cluster.deploy, replicas=2, ongoing=4, waiting=4)
    async with session_of(cluster) as session:
        response = await open_stream(session)
        assert (await response.content.readline()).startswith(b"data: ")
        response.close()
        for _ in range(100):
            replicas = (await stats(session, 2)).values()
            if not any(replica["num_running"] for replica in replicas):
                break
            await asyncio.sleep(0.1)
        assert sum(replica["num_finished"] for replica in replicas) == 1
        assert 0 < sum(replica["num_output_tokens"] for replica in replicas) < FOREVER
        assert all(replica["num_free_blocks"] == replica["num_blocks"] - 1 for replica in replicas)


async def test_both_queues_push_back(cluster: Cluster) -> None:
    # Ray Serve's: one request at the only replica, one waiting, no third.
    await asyncio.to_thread(cluster.deploy, replicas=1, ongoing=1, waiting=1)
    async with session_of(cluster) as session:
        first = await open_stream(session)
        second = asyncio.ensure_future(session.post("/v1/completions", json=body()))
        await asyncio.sleep(0.5)
        async with session.post("/v1/completions", json=body()) as third:
            assert third.status == 503
        await read(first)
        assert (await read(await second))[1] == "length"
    # The engine's: one request runs, none may wait.
    limits = {"max_num_seqs": 1, "server.max_queued_requests": 0}
    await asyncio.to_thread(cluster.deploy, replicas=1, ongoing=8, waiting=8, **limits)
    async with session_of(cluster) as session:
        first = await open_stream(session)
        async with session.post("/v1/completions", json=body()) as second:
            assert second.status == 429
            assert int(second.headers["Retry-After"]) >= 1
        assert (await read(first))[1] == "length"
        async with session.post("/v1/completions", json=body(-1)) as wrong:
            assert wrong.status == 400


async def test_a_replica_that_must_go_finishes_its_streams(cluster: Cluster) -> None:
    await asyncio.to_thread(cluster.deploy, replicas=1)
    async with session_of(cluster) as session:
        response = await open_stream(session)
        going = asyncio.ensure_future(asyncio.to_thread(cluster.remove))
        tokens, finish = await read(response)
        assert (len(tokens), finish) == (FOREVER, "length")
        await going
