"""Hostile requests for benchmarks/attack/run.py, a module for each kind: its `ATTACKS` maps names to Attacks."""

from __future__ import annotations

import http.client
import importlib
import json
import pkgutil
import socket
import threading
import urllib.parse
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

PATIENCE_S = 90.0
"""Longest wait of an attack for an answer."""


class Target(NamedTuple):
    """The server under attack: its URL, the name of its model, and its two processes."""

    url: str
    model: str
    front_pid: int
    engine_pid: int


Run = Callable[[], str]
"""Runs an attack; returns a short text about the server's answer."""


class Attack(NamedTuple):
    """`prepare` builds the requests before the measurement; the function it returns runs in its own process.

    `settings` are command-line settings that the server needs for this attack.
    """

    prepare: Callable[[Target], Run]
    settings: Mapping[str, str] = {}


def attacks() -> dict[str, Attack]:
    """Every attack by its name, kind after kind."""
    found: dict[str, Attack] = {}
    for module in sorted(pkgutil.iter_modules(__path__), key=lambda module: module.name):
        found |= importlib.import_module(f"{__name__}.{module.name}").ATTACKS
    return found


def post(path: str, body: Callable[[Target], Any], copies: int = 1, **settings: str) -> Attack:
    """Send one body, `copies` times at once. `body` returns it: bytes unchanged, anything else as JSON."""

    def prepare(target: Target) -> Run:
        made = body(target)
        data = made if isinstance(made, bytes) else json.dumps(made, separators=(",", ":")).encode()
        return lambda: at_once(copies, lambda _: send(target, "POST", path, data))

    return Attack(prepare, settings)


def get(path: str, copies: int = 1, **settings: str) -> Attack:
    """GET one path, `copies` times at once."""
    return Attack(lambda target: lambda: at_once(copies, lambda _: send(target, "GET", path)), settings)


def at_once(copies: int, one: Callable[[int], str]) -> str:
    """Run `one` in `copies` threads. Returns the different answers, each with its count."""
    answers: Counter[str] = Counter()
    threads = [threading.Thread(target=lambda n=n: answers.update([one(n)])) for n in range(copies)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return "; ".join(answer if count == 1 else f"{count}x {answer}" for answer, count in answers.most_common(3))


def send(target: Target, method: str, path: str, data: bytes | None = None, **headers: str) -> str:
    """Send one request and read its answer. Returns the status, and the field and text of an error, or the size."""
    host = urllib.parse.urlsplit(target.url).netloc
    connection = http.client.HTTPConnection(host, timeout=PATIENCE_S)
    try:
        connection.request(method, path, data, {"Content-Type": "application/json", **headers})
        response = connection.getresponse()
        size, start = 0, b""
        while piece := response.read1(1 << 20):
            size += len(piece)
            start = (start + piece)[:4096]
    except TimeoutError:
        return f"no answer in {PATIENCE_S:.0f} s"
    except (OSError, http.client.HTTPException) as error:
        return f"cut: {type(error).__name__}"
    finally:
        connection.close()
    if response.status == 200:
        return f"200, {size:,} bytes"
    try:
        fault = json.loads(start)["error"]
        return f"{response.status} {fault['param']}: {fault['message'][:90]}"
    except (ValueError, KeyError, TypeError):
        return f"{response.status} {start[:60]!r}"


def open_socket(target: Target, data: bytes) -> socket.socket:
    """A connection on which `data` was sent, for attacks that do not read, or read in an unusual way."""
    parts = urllib.parse.urlsplit(target.url)
    connection = socket.create_connection((parts.hostname or "", parts.port or 80), timeout=PATIENCE_S)
    connection.sendall(data)
    return connection
