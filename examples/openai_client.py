"""Talk to a running tfserve with the official client: `pip install openai`, then `python examples/openai_client.py`.

The same with curl:

    curl -N http://127.0.0.1:8000/v1/chat/completions -H 'Content-Type: application/json' \
        -d '{"stream": true, "messages": [{"role": "user", "content": "Why is the sky blue?"}]}'
"""

from __future__ import annotations

import sys

from openai import OpenAI


def main() -> None:
    base_url = sys.argv[1] if len(sys.argv) > 1 else "http://127.0.0.1:8000/v1"
    client = OpenAI(base_url=base_url, api_key="unused unless the server was started with api_keys")
    model = client.models.list().data[0].id

    print(f"{model}, streamed:")
    stream = client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": "Why is the sky blue?"}],
        max_tokens=100,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
    )
    for chunk in stream:
        if chunk.choices:
            print(chunk.choices[0].delta.content or "", end="", flush=True)
        if chunk.usage:
            print(f"\n({chunk.usage.prompt_tokens} prompt + {chunk.usage.completion_tokens} output tokens)\n")

    # Two prompts at once, not streamed; fields that are not in OpenAI's API go into extra_body.
    completion = client.completions.create(
        model=model,
        prompt=["The capital of France is", "Water boils at"],
        max_tokens=12,
        extra_body={"top_k": 20, "repetition_penalty": 1.1},
    )
    for choice in completion.choices:
        print(f"{choice.index}: {choice.text!r} ({choice.finish_reason})")


if __name__ == "__main__":
    main()
