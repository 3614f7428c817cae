"""One line of numbers every few seconds, to read and to grep: what the engine did meanwhile."""

from __future__ import annotations

import asyncio
import logging

from tfserve.engine.engine import Engine
from tfserve.types import EngineStats

log = logging.getLogger(__name__)


async def log_intervals(engine: Engine, interval_s: float) -> None:
    """Log a line every `interval_s` in which something was there to do; runs until it is cancelled."""
    before = engine.stats()
    while True:
        await asyncio.sleep(interval_s)
        now = engine.stats()
        if now.step != before.step or now.num_waiting:
            log.info("%s", interval_line(before, now, interval_s))
        before = now


def interval_line(before: EngineStats, now: EngineStats, interval_s: float) -> str:
    """`interval key=value ...`: requests and KV now; tokens/s, ends, preemptions and bytes moved since `before`."""
    values = {
        "running": now.num_running,
        "waiting": now.num_waiting,
        "paused": now.num_paused,
        "loading": now.num_loading,
        "kv": f"{1 - now.num_free_blocks / max(now.num_blocks - 1, 1):.2f}",
        "prompt_tokens_per_s": f"{(now.num_prompt_tokens - before.num_prompt_tokens) / interval_s:.1f}",
        "output_tokens_per_s": f"{(now.num_output_tokens - before.num_output_tokens) / interval_s:.1f}",
        "finished": now.num_finished - before.num_finished,
        "preemptions": now.num_preemptions - before.num_preemptions,
        "steps": now.step - before.step,
    }
    if now.num_host_blocks:
        values["host_kv"] = f"{1 - now.num_free_host_blocks / max(now.num_host_blocks - 1, 1):.2f}"
        values["stored_mib"] = f"{(now.bytes_stored - before.bytes_stored) / 2**20:.1f}"
        values["loaded_mib"] = f"{(now.bytes_loaded - before.bytes_loaded) / 2**20:.1f}"
    return "interval " + " ".join(f"{key}={value}" for key, value in values.items())
