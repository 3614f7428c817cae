"""Requests that are long in one respect: entries, tokens, messages, choices, log probabilities."""

from __future__ import annotations

import json
import random
from typing import Any

from benchmarks.attack.attacks import Attack, Target, get, post

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
VOCAB = 49_000


def _bias(_: Target) -> dict[str, Any]:
    return {"prompt": "x", "n": 128, "max_tokens": 1, "logit_bias": {str(token): 1 for token in range(VOCAB)}}


def _stops(_: Target) -> dict[str, Any]:
    return {"prompt": "x", "n": 128, "max_tokens": 1, "stop": [str(number) + 3500 * "s" * 16 for number in range(64)]}


def _ids(number: int) -> list[int]:
    return [random.Random(1).randrange(100, VOCAB) for _ in range(number)]


def _words(num_bytes: int) -> str:
    words = (
        "sky",
        "blue",
        "light",
        "scatters",
        "the",
        "of",
        "why",
        "and",
        "colour",
        "evening",
        "\n",
        "1234",
        "greater",
    )
    chosen = random.Random(2).choices(words, k=num_bytes // 5)
    return " ".join(chosen)[:num_bytes]


def _chat(messages: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
    return {"messages": messages, "max_tokens": 1, **more}


def _echo(_: Target) -> dict[str, Any]:
    prompts = [_ids(4_000)] * 64
    return {"prompt": prompts, "max_tokens": 1, "echo": True, "logprobs": 20}


def _many_logprobs(_: Target) -> dict[str, Any]:
    words = [{"role": "user", "content": "x"}]
    return {"messages": words, "n": 128, "max_tokens": 300, "logprobs": True, "top_logprobs": 20, "ignore_eos": True}


_ONE = [{"role": "user", "content": "x"}]
_TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}

ATTACKS: dict[str, Attack] = {
    "lengths-bias": post(COMPLETIONS, _bias),
    "lengths-stop": post(COMPLETIONS, _stops),
    "lengths-ids": post(COMPLETIONS, lambda _: {"prompt": _ids(550_000), "max_tokens": 1}),
    "lengths-short-ids": post(COMPLETIONS, lambda _: {"prompt": [5] * 1_900_000, "max_tokens": 1}),
    "lengths-bad-ids": post(COMPLETIONS, lambda _: {"prompt": [5.0] * 900_000, "max_tokens": 1}),
    "lengths-nested-ids": post(COMPLETIONS, lambda _: {"prompt": [[5]] * 1_000_000, "max_tokens": 1}),
    "lengths-texts": post(COMPLETIONS, lambda _: {"prompt": ["a"] * 900_000, "max_tokens": 1}),
    "lengths-text": post(COMPLETIONS, lambda _: {"prompt": _words(3_800_000), "max_tokens": 1}),
    "lengths-text-of-one": post(COMPLETIONS, lambda _: {"prompt": "a" * 4_100_000, "max_tokens": 1}),
    "lengths-many-texts": post(COMPLETIONS, lambda _: {"prompt": [_words(15_000)] * 250, "max_tokens": 1}),
    "lengths-messages": post(CHAT, lambda _: _chat([{"role": "user", "content": ""}] * 130_000)),
    "lengths-parts": post(
        CHAT, lambda _: _chat([{"role": "user", "content": [{"type": "text", "text": ""}] * 130_000}])
    ),
    "lengths-tools": post(CHAT, lambda _: _chat(_ONE, tools=[_TOOL] * 45_000)),
    "lengths-call-arguments": post(
        CHAT,
        lambda _: _chat(
            [
                *_ONE,
                {
                    "role": "assistant",
                    "tool_calls": [{"function": {"name": "f", "arguments": json.dumps([{}] * 900_000)}}],
                },
            ]
        ),
    ),
    "lengths-chat-text": post(CHAT, lambda _: _chat([{"role": "user", "content": _words(3_800_000)}])),
    "lengths-template-values": post(CHAT, lambda _: _chat(_ONE, chat_template_kwargs={"tools_x": [1] * 1_900_000})),
    "lengths-unknown-fields": post(CHAT, lambda _: _chat(_ONE) | {f"f{number}": 1 for number in range(280_000)}),
    "lengths-stop-ids": post(COMPLETIONS, lambda _: {"prompt": "x", "stop_token_ids": [5] * 1_900_000}),
    "lengths-broken-json": post(CHAT, lambda _: b'{"messages": [' + b'{"role": "user", "content": 1.5},' * 120_000),
    "lengths-escapes": post(CHAT, lambda _: b'{"messages": "' + rb"\ud83d" * 690_000 + b'"}'),
    "lengths-gzip": post(CHAT, lambda _: b'{"messages": ' + b" " * 4_100_000 + b"[]}"),
    "lengths-echo-logprobs": post(COMPLETIONS, _echo),
    "lengths-echo-streamed": post(COMPLETIONS, lambda target: _echo(target) | {"stream": True}),
    "lengths-top-logprobs": post(CHAT, _many_logprobs),
    "lengths-top-streamed": post(CHAT, lambda target: _many_logprobs(target) | {"stream": True}),
    "lengths-tokenize": post("/tokenize", lambda _: {"prompt": _words(3_800_000), "return_token_strs": True}),
    "lengths-tokenize-chat": post("/tokenize", lambda _: {"messages": [{"role": "user", "content": ""}] * 130_000}),
    "lengths-detokenize": post("/detokenize", lambda _: {"tokens": [5] * 1_900_000}),
    "lengths-abort": post("/abort_request", lambda _: {"request_id": "x" * 4_100_000}),
    "lengths-buffer": post("/v1/streams/x/buffer", lambda _: {"played_tokens": [1] * 1_900_000}),
    "lengths-models": get("/v1/models", copies=50),
    "lengths-metrics": get("/metrics", copies=50),
    "lengths-openapi": get("/openapi.json", copies=50),
}
