"""tfserve inside a Python program: a batch with `generate`, an answer with `chat`, a stream with `stream_chat`."""

import asyncio

from tfserve import Engine, EngineConfig, SamplingParams


async def read_aloud(engine: Engine) -> None:
    async for output in engine.stream_chat("Why is the sky blue?", SamplingParams(temperature=0, max_tokens=64)):
        print(output.text, end="", flush=True)
    print()


def main() -> None:
    # "demo" is SmolLM2-135M-Instruct, downloaded at its first use; a model directory or a hub id does as well.
    with Engine(EngineConfig(model="demo", max_model_len=2048)) as engine:
        params = SamplingParams(temperature=0, max_tokens=16)
        for output in engine.generate(["The capital of France is", "Two plus two is"], params):
            print(repr(output.text), output.finish_reason)
        messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is 2 + 2?"}]
        print(engine.chat(messages, params).text)
        asyncio.run(read_aloud(engine))


if __name__ == "__main__":
    main()
