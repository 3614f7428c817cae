"""Engines that stop, and connections and requests without end."""

from __future__ import annotations

import resource
import socket
import threading
import time
import urllib.parse

import psutil

from benchmarks.attack.attacks import Attack, Run, Target, at_once, get, open_socket, send

HELD_S = 5.0
"""Seconds for which an engine is stopped, or connections are held."""


def _large() -> bytes:
    stops = ",".join(f'"{number:03}{"x" * 253}"' for number in range(64))
    return f'{{"prompt":"x","max_tokens":1,"n":8,"stop":[{stops}]}}'.encode()


def _stopped_engine(target: Target) -> Run:
    """Large requests to an engine that is stopped for a time."""
    data = _large()

    def run() -> str:
        engine = psutil.Process(target.engine_pid)
        engine.suspend()
        going_on = threading.Timer(HELD_S, engine.resume)
        going_on.start()
        try:
            return at_once(40, lambda _: send(target, "POST", "/v1/completions", data))
        finally:
            going_on.join()

    return run


def _connections(count: int) -> Attack:
    """Connections that send nothing, held for a time."""

    def prepare(target: Target) -> Run:
        def run() -> str:
            hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
            opened: list[socket.socket] = []
            for _ in range(count):
                try:
                    opened.append(open_socket(target, b""))
                except OSError:
                    break
            time.sleep(HELD_S)
            return f"{len(opened)} connections; then " + send(target, "GET", "/version")

        return run

    return Attack(prepare)


def _framing(count: int) -> Attack:
    """Data that is not HTTP, each on its own connection."""

    def prepare(target: Target) -> Run:
        parts = urllib.parse.urlsplit(target.url)
        pieces = [b"\x16\x03\x01\x02\x00", b"GET / HTTP/9.9\r\n\r\n", b"GET / HTTP/1.1\r\nX: " + b"x" * 9000]

        def one(number: int) -> str:
            with socket.create_connection((parts.hostname or "", parts.port or 80), timeout=60) as connection:
                connection.sendall(pieces[number % 3] + b"\r\n\r\n")
                return connection.recv(12).decode(errors="replace")

        return lambda: at_once(count, one)

    return Attack(prepare)


ATTACKS = {
    "front-stopped-engine": Attack(_stopped_engine),
    "front-connections": _connections(6000),
    "front-framing": _framing(500),
    "front-metrics": get("/metrics", copies=500),
    "front-streams": get("/v1/streams", copies=500),
}
