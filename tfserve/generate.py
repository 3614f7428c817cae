"""`tfserve generate`: one prompt, its answer streamed to the terminal."""

from __future__ import annotations

import asyncio
import sys

from tfserve.config import EngineConfig
from tfserve.engine.engine import Engine
from tfserve.types import RequestOutput, SamplingParams


def generate(config: EngineConfig, prompt: str, max_tokens: int, temperature: float, raw: bool) -> int:
    """Stream the answer to stdout and a line of figures to stderr; exit code 1 if the request failed."""
    params = SamplingParams(max_tokens=max_tokens, temperature=temperature)
    with Engine(config) as engine:
        tokens: str | list[int] = prompt
        if not raw:
            text = engine.tokenizer.apply_chat_template([{"role": "user", "content": prompt}])
            tokens = engine.tokenizer.encode(text, add_special_tokens=False)
        last = asyncio.run(_print_stream(engine, tokens, params))
    if last.error is not None:
        print(f"tfserve: error: {last.error}", file=sys.stderr)
        return 1
    times = last.times
    if times is not None and times.first_token_s is not None and times.finished_s is not None:
        ttft = times.first_token_s - times.arrival_s
        rate = (last.num_output_tokens - 1) / max(1e-9, times.finished_s - times.first_token_s)
        print(
            f"[{last.num_prompt_tokens} prompt tokens, {last.num_output_tokens} output tokens,"
            f" first after {ttft:.2f} s, then {rate:.1f} tokens/s]",
            file=sys.stderr,
        )
    return 0


async def _print_stream(engine: Engine, prompt: str | list[int], params: SamplingParams) -> RequestOutput:
    async for output in engine.stream(prompt, params):
        print(output.text, end="", flush=True)
        last = output
    print()
    return last
