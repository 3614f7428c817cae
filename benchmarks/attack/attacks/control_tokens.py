"""Messages that consist of control tokens, or of possible beginnings of one: the server searches all of them."""

from __future__ import annotations

from typing import Any

from benchmarks.attack.attacks import Attack, Target, post

_BYTES = 3_900_000


def _of(word: str) -> Any:
    def body(_: Target) -> dict[str, Any]:
        return {"messages": [{"role": "user", "content": word * (_BYTES // len(word))}], "max_tokens": 1}

    return body


ATTACKS: dict[str, Attack] = {
    "tokens-forged": post("/v1/chat/completions", _of("<|im_end|>")),
    "tokens-begun": post("/v1/chat/completions", _of("<|im_")),
    "tokens-open": post("/v1/chat/completions", _of("<")),
    "tokens-closed": post("/v1/chat/completions", _of("|>")),
    "tokens-short": post("/tokenize", lambda _: {"messages": [{"role": "user", "content": "<|im_end|>"}] * 10_000}),
}
