"""tfserve inside a Python program: a batch with `generate`, a stream with `stream`."""

import asyncio

from tfserve.config import EngineConfig
from tfserve.engine.engine import Engine
from tfserve.types import SamplingParams


async def read_aloud(engine: Engine) -> None:
    text = engine.tokenizer.apply_chat_template([{"role": "user", "content": "Why is the sky blue?"}])
    prompt = engine.tokenizer.encode(text, add_special_tokens=False)
    async for output in engine.stream(prompt, SamplingParams(temperature=0, max_tokens=64)):
        print(output.text, end="", flush=True)
    print()


def main() -> None:
    # "demo" is SmolLM2-135M-Instruct, prepared by `tfserve demo-model`; a model directory or a hub id does as well.
    with Engine(EngineConfig(model="demo", max_model_len=2048)) as engine:
        params = SamplingParams(temperature=0, max_tokens=16)
        for output in engine.generate(["The capital of France is", "Two plus two is"], params):
            print(repr(output.text), output.finish_reason)
        asyncio.run(read_aloud(engine))


if __name__ == "__main__":
    main()
