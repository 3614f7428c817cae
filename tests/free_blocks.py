"""Waits until an engine has every KV block back.

A block is given back when its copy to the host has ended, which may be after the last output of its request.
"""

import asyncio
import time

from tfserve.engine.engine import Engine


def are_all_free(engine: Engine) -> bool:
    stats = engine.stats()
    return stats.num_free_blocks == stats.num_blocks - 1 and not stats.num_running  # block 0 is never given out


def wait_until_all_free(engine: Engine, timeout_s: float = 20.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not are_all_free(engine):
        assert time.monotonic() < deadline, f"blocks were not freed: {engine.stats()}"
        time.sleep(0.01)


async def until_all_free(engine: Engine, timeout_s: float = 20.0) -> None:
    """The same on the event loop, which goes on meanwhile."""
    deadline = time.monotonic() + timeout_s
    while not are_all_free(engine):
        assert time.monotonic() < deadline, f"blocks were not freed: {engine.stats()}"
        await asyncio.sleep(0.01)
