"""`tfserve generate`: one prompt, its answer streamed to the terminal."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator

from tfserve.config import EngineConfig
from tfserve.engine.engine import Engine
from tfserve.types import RequestOutput, SamplingParams


def generate(config: EngineConfig, prompt: str, max_tokens: int, temperature: float, raw: bool) -> int:
    """Stream the answer to stdout and a line of figures to stderr; exit code 1 if the request failed."""
    params = SamplingParams(max_tokens=max_tokens, temperature=temperature)
    with Engine(config) as engine:
        outputs = engine.stream(prompt, params) if raw else engine.stream_chat(prompt, params)
        last = asyncio.run(_print(outputs))
    if last.error is not None:
        print(f"tfserve: error: {last.error}", file=sys.stderr)
        return 1
    times = last.times
    if times is not None and times.first_token_s is not None and times.finished_s is not None:
        ttft = times.first_token_s - times.arrival_s
        num_read = last.num_output_tokens - last.num_thought_tokens
        rate = (num_read - 1) / max(1e-9, times.finished_s - times.first_token_s)
        print(
            f"[{last.num_prompt_tokens} prompt tokens, {last.num_output_tokens} output tokens,"
            f" first after {ttft:.2f} s, then {rate:.1f} tokens/s]",
            file=sys.stderr,
        )
    return 0


async def _print(outputs: AsyncIterator[RequestOutput]) -> RequestOutput:
    async for output in outputs:
        print(output.text, end="", flush=True)
        last = output
    print()
    return last
