"""`tfserve serve` in a process of its own, for tests that need a whole server."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Self

import psutil

from tests.http.test_server import free_port
from tfserve.engine.frontend.core_client import CORE_MODULE


class Server:
    """`tfserve serve` as a user starts it, with its engine process.

    `target` is a model directory or a YAML file; what it prints goes to `log`. `program` is how tfserve is called,
    `env` its environment.
    """

    def __init__(
        self,
        target: Path,
        log: Path,
        *settings: str,
        program: Sequence[str] = (sys.executable, "-m", "tfserve.cli"),
        env: Mapping[str, str] | None = None,
    ) -> None:
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.log = log.open("w+")
        defaults = (("--server.port", str(self.port)), ("--max-model-len", "1024"), ("--threads", "1"))
        words = [word for default in defaults if default[0] not in settings for word in default]
        command = [*program, "serve", str(target), *words, *settings]
        self.process = subprocess.Popen(command, stdout=self.log, stderr=subprocess.STDOUT, env=env)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()
        self.log.close()

    def wait_until_ready(self) -> None:
        """Raises AssertionError with the server's output if it does not get ready."""
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and self.process.poll() is None:
            try:
                with urllib.request.urlopen(self.url + "/ready", timeout=5):
                    return
            except urllib.error.HTTPError as error:
                error.close()
            except OSError:
                pass
            time.sleep(0.1)
        raise AssertionError(self.printed())

    def printed(self) -> str:
        return Path(self.log.name).read_text()

    def engine(self) -> psutil.Process:
        children = psutil.Process(self.process.pid).children()
        (child,) = [child for child in children if CORE_MODULE in child.cmdline()]
        return child

    async def exit_code(self) -> int:
        return await asyncio.to_thread(self.process.wait, 30)
