"""Requests that make the server hold memory: answers that are not read, bodies that are not finished, many sizes."""

from __future__ import annotations

import gzip
import json
import socket
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from benchmarks.attack.attacks import Attack, Run, Target, at_once, open_socket, send

HOLD_S = 20.0
"""Seconds for which a client leaves its answer unread, or its body unfinished."""

_MIB = 2**20


def _request(path: str, body: bytes, length: int, *more: str) -> bytes:
    lines = [f"POST {path} HTTP/1.1", "Host: 127.0.0.1", f"Content-Length: {length}", *more]
    return "\r\n".join([*lines, "", ""]).encode() + body


def _held(requests: Sequence[bytes]) -> Attack:
    """Send each on a connection of its own, read nothing for a while, then close them."""

    def run(target: Target) -> str:
        def sending(data: bytes) -> None:
            with suppress(OSError):
                held.append(open_socket(target, data))

        held: list[socket.socket] = []
        threads = [threading.Thread(target=sending, args=(data,), daemon=True) for data in requests]
        for thread in threads:
            thread.start()
        time.sleep(HOLD_S)
        for connection in held:
            connection.close()
        return f"{len(held)} of {len(requests)} connections held for {HOLD_S:.0f} s"

    def prepare(target: Target) -> Run:
        return lambda: run(target)

    return Attack(prepare)


def _unread(copies: int, **more: Any) -> Attack:
    body = {"prompt": "x", "max_tokens": 3000, "ignore_eos": True, "logprobs": 20, **more}
    data = json.dumps(body).encode()
    return _held([_request("/v1/completions", data, len(data))] * copies)


def _sizes() -> Attack:
    """Prompts of every length, one after the other."""

    def run(target: Target) -> str:
        answers = [
            send(target, "POST", "/v1/completions", json.dumps({"prompt": [5] * length, "max_tokens": 1}).encode())
            for length in range(1, 257)
        ]
        return f"{sum(answer.startswith('200') for answer in answers)} of {len(answers)} answered"

    return Attack(lambda target: lambda: run(target))


def _packed(target: Target) -> Run:
    data = gzip.compress(json.dumps({"prompt": "x " * (2 * _MIB - 20)}).encode())
    return lambda: at_once(100, lambda _: send(target, "POST", "/tokenize", data, **{"Content-Encoding": "gzip"}))


ATTACKS: dict[str, Attack] = {
    "memory-unread-streams": _unread(12, stream=True),
    "memory-unread-whole": _unread(12, n=2),
    "memory-bodies": _held([_request("/tokenize", b"x" * (4 * _MIB - 1), 4 * _MIB)] * 120),
    "memory-packed-bodies": Attack(_packed),
    "memory-sizes": _sizes(),
}
