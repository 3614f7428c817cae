"""A chaos run: a real server with too little KV, a crowd of visitors, and the books that must balance at the end."""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np
import psutil

from tests.chaos.visitors import MAX_LEN, Visitors
from tests.serving import Server

SETTINGS: dict[str, Any] = {
    "served_model_name": "tiny",
    "max_num_seqs": 12,
    "max_num_batched_tokens": 24,  # prompts take a while, so that KV is worth bringing back
    "block_size": 16,
    # Three of the longest requests fit, so most of a crowd is elsewhere; the link makes a load last 20 ms.
    "num_gpu_blocks_override": 97,
    "host_kv_gib": 0.004,
    "emulated_bandwidth": 0.01,
    "debug_checks": True,
    "pipeline_depth": 2,
    "scheduler": {
        "policy": "tokenflow",
        "schedule_interval_s": 0.02,
        "tokenflow": {"min_residency_s": 0.02, "min_swap_gain_s": 0.02, "low_buffer_s": 0.05},
    },
    "server": {"max_queued_requests": 25, "keep_alive_s": 0.2, "drain_timeout": 0.5, "log_interval_s": 1.0},
}

MAX_AT_ONCE = 80
CALM_S = 30.0
"""Time limit for the engine to become empty after the last client."""

WARM_UP = 0.25
"""Share of the run before memory is judged."""


class Memory:
    """Resident memory of the server's two processes over time, in MiB."""

    def __init__(self, server: Server) -> None:
        self._parts = {"server": psutil.Process(server.process.pid), "engine": server.engine()}
        self._begun_s = time.monotonic()
        self._samples: list[tuple[float, ...]] = []

    def sample(self) -> None:
        sizes = (part.memory_info().rss / 2**20 for part in self._parts.values())
        self._samples.append((time.monotonic() - self._begun_s, *sizes))

    def slopes(self) -> dict[str, float]:
        """MiB per minute by least squares, after the warm-up."""
        table = np.array([row for row in self._samples if row[0] >= WARM_UP * self._samples[-1][0]])
        at_min = table[:, 0] / 60
        return {name: float(np.polyfit(at_min, table[:, i + 1], 1)[0]) for i, name in enumerate(self._parts)}

    def last(self) -> dict[str, float]:
        return dict(zip(self._parts, self._samples[-1][1:], strict=True))


@contextlib.contextmanager
def chaos_server(model_dir: Path, work_dir: Path) -> Iterator[Server]:
    target = work_dir / "chaos.yaml"
    target.write_text(json.dumps({**SETTINGS, "model": str(model_dir)}))
    with Server(target, work_dir / "log", "--max-model-len", str(MAX_LEN)) as server:
        server.wait_until_ready()
        yield server


async def run(model_dir: Path, work_dir: Path, seconds: float, seed: int) -> dict[str, Any]:
    """Run clients for that long, in bursts and lulls, then SIGTERM during a burst. Returns the counts."""
    with chaos_server(model_dir, work_dir) as server:
        connector = aiohttp.TCPConnector(limit=0)
        async with aiohttp.ClientSession(connector=connector) as session:
            rng = random.Random(seed)
            visitors = Visitors(server.url, session, rng)
            memory = Memory(server)
            hunting = asyncio.ensure_future(visitors.hunt())
            books: list[dict[str, Any]] = []
            # Check at half time as well: the end could free leaked blocks and hide a leak.
            for _ in range(2):
                await _crowd(visitors, rng, memory, seconds / 2)
                books.append(await _balance(server, session))
            closing = asyncio.ensure_future(_crowd(visitors, rng, memory, 2.0))
            await asyncio.sleep(1.0)
            engine = server.engine()
            visitors.is_closing = True
            server.process.terminate()
            await closing
            exit_code = await server.exit_code()
            hunting.cancel()
        return {
            "seconds": seconds,
            "seed": seed,
            "outcomes": dict(sorted(visitors.outcomes.items())),
            "broken": visitors.broken,
            "books": books,
            "exit_code": exit_code,
            "engine_left": engine.is_running(),
            "rss_mib_per_min": memory.slopes(),
            "rss_mib": memory.last(),
            "log_errors": _errors(server.printed().splitlines()),
        }


def _errors(lines: list[str]) -> list[str]:
    """Every error in the log, with the lines after it."""
    return ["\n".join(lines[i : i + 40]) for i, line in enumerate(lines) if " ERROR " in line]


async def _crowd(visitors: Visitors, rng: random.Random, memory: Memory, seconds: float) -> None:
    """Poisson arrivals, 30 a second in bursts and 3 in lulls, changing every two seconds or so; waits for all."""
    open_visits: set[asyncio.Task[None]] = set()
    end_s = time.monotonic() + seconds
    change_s = sampled_s = 0.0
    rate = 3.0
    while (now_s := time.monotonic()) < end_s:
        if now_s > change_s:
            rate, change_s = 33.0 - rate, now_s + rng.expovariate(0.5)
        if now_s > sampled_s + 1 and not visitors.is_closing:
            memory.sample()
            sampled_s = now_s
        if len(open_visits) < MAX_AT_ONCE:
            visit = asyncio.ensure_future(visitors.one())
            open_visits.add(visit)
            visit.add_done_callback(open_visits.discard)
        await asyncio.sleep(rng.expovariate(rate))
    while open_visits:
        await asyncio.wait(open_visits)


async def _balance(server: Server, session: aiohttp.ClientSession) -> dict[str, Any]:
    """The engine's counts once it is empty. Raises AssertionError if it does not get so: then something has leaked."""
    deadline = time.monotonic() + CALM_S
    while True:
        async with session.get(server.url + "/v1/streams") as response:
            picture = await response.json()
        stats = picture["stats"]
        kept = (
            stats["num_blocks"] - 1 - stats["num_free_blocks"],
            stats["num_host_blocks"] - stats["num_free_host_blocks"],
        )
        if not picture["data"] and kept[0] == 0 and kept[1] <= 1:  # block 0 of either tier is reserved
            async with session.get(server.url + "/health") as response:
                assert response.status == 200
            return {name: stats[name] for name in ("num_finished", "num_preemptions", "num_dropped", "step")}
        assert time.monotonic() < deadline, f"no client left, but (device, host) blocks are in use: {kept}; {picture}"
        await asyncio.sleep(0.1)
