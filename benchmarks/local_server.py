"""A server on this machine for the time of a measurement, and a client in a process of its own."""

from __future__ import annotations

import contextlib
import json
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

CLIENT_NICE = ["nice", "-n", "10"]
"""The client shares the cores with the server. Niced, it only uses idle time, and sees tokens a little later."""


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


class Server(NamedTuple):
    """A server that is ready: the seconds it took, and its process."""

    ready_s: float
    process: subprocess.Popen[bytes]


@contextlib.contextmanager
def running(
    command: Sequence[str], url: str, ready_path: str, *, patience_s: float = 120, env: Mapping[str, str] | None = None
) -> Iterator[Server]:
    """Start a server, wait until `ready_path` answers 200, stop it at the end.

    Raises SystemExit with the server's output if it does not get ready.
    """
    begin = time.perf_counter()
    # Python's own answer to SIGTERM would leave the server behind.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    with tempfile.TemporaryFile("w+") as log:
        server = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=env)
        try:
            while not answers(url + ready_path):
                if server.poll() is not None or time.perf_counter() - begin > patience_s:
                    log.seek(0)
                    state = "did not get ready" if server.poll() is None else f"ended with {server.returncode}"
                    raise SystemExit(f"{' '.join(command)} {state}:\n{log.read()[-8000:]}")
                time.sleep(0.02)
            yield Server(time.perf_counter() - begin, server)
        finally:
            server.send_signal(signal.SIGTERM)
            try:
                server.wait(30)
            except subprocess.TimeoutExpired:
                server.kill()
                server.wait()


def answers(url: str) -> bool:
    """Whether a GET is answered with 200."""
    try:
        with urllib.request.urlopen(url, timeout=1) as response:
            return bool(response.status == 200)
    except OSError:
        return False


def get_json(url: str) -> Any:
    with urllib.request.urlopen(url, timeout=10) as response:
        return json.load(response)


def run_json(command: Sequence[str], output: Path, timeout_s: float = 900) -> Any:
    """Run a command that writes JSON to `output` and return that. Raises SystemExit if it fails.

    `bench serve` exits with 1 if requests failed: then there is still a result, with these failures.
    """
    output.unlink(missing_ok=True)
    command = [*command, "--output", str(output)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=timeout_s, check=False)
    if done.returncode not in {0, 1} or not output.exists():
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stdout}\n{done.stderr}")
    return json.loads(output.read_text())
