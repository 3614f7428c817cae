"""The server's life: bind, load, serve, drain. `serve` blocks until it is over and returns the exit code."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import os
import signal
import sys
import threading
from collections.abc import Awaitable, Callable

import msgspec
from aiohttp import web

from tfserve.config import EngineConfig
from tfserve.engine.engine import Engine
from tfserve.errors import TfserveError
from tfserve.heap import freeze_heap, trim_heap
from tfserve.http.app import create_app
from tfserve.http.banner import banner
from tfserve.http.connections import MAX_CONNECTIONS, create_runner
from tfserve.http.interval_log import log_intervals
from tfserve.http.service import Phase, Service
from tfserve.http.sockets import allow_connections, listen, quiet_exhaustion
from tfserve.std_streams import say

log = logging.getLogger(__name__)

EngineFactory = Callable[[EngineConfig], Engine]
"""Loads a model; blocks for seconds and raises TfserveError."""

EXIT_OK, EXIT_FAILED = 0, 1

NICENESS = 10
"""How far the HTTP side steps back behind an engine in its own process, whose steps a busy core makes 4-10x slower."""

SWITCH_S = 0.0005
"""How long a thread keeps the interpreter lock from another one.

The event loop gives it away at each send and receive. While something computes off the loop, each costs this much:
with Python's own 5 ms, writing to twenty streams took a tenth of a second.
"""

DEATH_GRACE_S = 1.0
"""How long a server whose engine died stays up, so that streams and health checks are told of it."""

GOODBYE_S = 2.0
"""How long aborted streams have to send their last events."""

ABANDON_LOAD_S = 5.0
"""How long a server told to stop waits for a model that is still loading, before it leaves without it."""

ENGINE_SHUTDOWN_S = 10.0
"""How long the engine has to end."""


def serve(config: EngineConfig, engine_factory: EngineFactory | None = None) -> int:
    """Serve `config.model` until a signal or the engine's death; return the process's exit code.

    0: stopped by SIGTERM, SIGINT or SIGHUP. 1: the engine died, or the model could not be downloaded now. 2: a setting
    cannot be honoured, a port in use among them, or the model cannot be loaded. `engine_process: auto` means a process
    of its own here. `engine_factory` makes the engine; tests give their own.
    """
    if config.engine_process == "auto":
        config = msgspec.structs.replace(config, engine_process="on")
    trim_heap()
    sys.setswitchinterval(SWITCH_S)
    try:
        return asyncio.run(_Server(config, engine_factory or Engine).run())
    except TfserveError as error:
        print(f"tfserve: error: {error}", file=sys.stderr)
        return error.exit_code


class _Server:
    """One run of the server."""

    def __init__(self, config: EngineConfig, load: EngineFactory) -> None:
        self._config = config
        self._load = load
        self._engine: Engine | None = None
        self._service = Service(config)
        self._stop = asyncio.Event()
        self._stop_now = asyncio.Event()

    async def run(self) -> int:
        """Bind first (a taken port costs no load), answer while loading, serve, drain. Raises TfserveError."""
        loop = asyncio.get_running_loop()
        quiet_exhaustion(loop)
        most = allow_connections(_wanted_connections(self._config))
        app = create_app(self._service, most)
        runner = create_runner(app, shutdown_timeout_s=GOODBYE_S, max_connections=most)
        await runner.setup()
        try:
            url = await self._bind(runner)
            log.info("Bound to %s: /health answers from now on", url)
            numbers = [signal.SIGTERM, signal.SIGINT]
            if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # as nohup leaves it
                numbers.append(signal.SIGHUP)
            for number in numbers:
                loop.add_signal_handler(number, self._on_signal)
            await self._load_engine()
            if self._engine is not None and not self._stop.is_set():
                self._go_live(self._engine, url)
                logging_intervals = asyncio.ensure_future(self._log_intervals(self._engine))
                await self._serve()
                logging_intervals.cancel()
        finally:
            await runner.cleanup()
            if self._engine is not None:
                await asyncio.to_thread(self._engine.shutdown, ENGINE_SHUTDOWN_S)
        return EXIT_FAILED if self._service.phase is Phase.DEAD else EXIT_OK

    async def _bind(self, runner: web.AppRunner) -> str:
        """Listen; return the URL to reach the server at. Raises ConfigError."""
        server = self._config.server
        await listen(runner, server.host, server.port)
        host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(server.host, server.host)
        port = runner.addresses[0][1]
        return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"

    def _on_signal(self) -> None:
        (self._stop_now if self._stop.is_set() else self._stop).set()

    async def _load_engine(self) -> None:
        """Load in a daemon thread, which cannot hold up a process that is told to stop and leaves without an engine."""
        loop = asyncio.get_running_loop()
        loading: asyncio.Future[Engine] = loop.create_future()

        def load() -> None:
            try:
                settle = functools.partial(loading.set_result, self._load(self._config))
            except BaseException as error:
                settle = functools.partial(loading.set_exception, error)
            with contextlib.suppress(RuntimeError):  # the loop has ended: we left without the model
                loop.call_soon_threadsafe(settle)

        self._tell(f"Loading {self._config.model} ...")
        threading.Thread(target=load, name="tfserve-load", daemon=True).start()
        await _first(loading, self._stop.wait())
        if self._stop.is_set():
            await _first(loading, self._stop_now.wait(), timeout_s=ABANDON_LOAD_S)
        if loading.done():
            self._engine = loading.result()

    def _go_live(self, engine: Engine, url: str) -> None:
        loop = asyncio.get_running_loop()

        def die(reason: str) -> None:
            loop.call_soon_threadsafe(self._service.die, reason)

        engine.on_death(die)
        if self._config.engine_process != "off":
            os.nice(NICENESS)  # only now: the engine's process would have inherited it
        freeze_heap()
        self._service.ready(engine)
        self._tell(banner(engine.info, self._service, url))

    def _tell(self, text: str) -> None:
        """Print for the person at the terminal; where lines are JSON, as one of them."""
        if self._config.log_format == "json":
            log.info("%s", text)
        else:
            say(text)

    async def _log_intervals(self, engine: Engine) -> None:
        if self._config.server.log_interval_s > 0:
            await log_intervals(engine, self._config.server.log_interval_s)

    async def _serve(self) -> None:
        """Until a signal, then drain; or until the engine's death."""
        service = self._service
        await _first(self._stop.wait(), service.died.wait())
        if not service.died.is_set():
            service.drain()
            log.info("Draining %d open requests; a second signal aborts them", service.num_open)
            timeout_s = self._config.server.drain_timeout
            await _first(service.idle.wait(), self._stop_now.wait(), service.died.wait(), timeout_s=timeout_s)
            service.abort_open("The server is shutting down.")
            await _first(service.idle.wait(), service.died.wait(), timeout_s=GOODBYE_S)
        if service.died.is_set():
            log.error("The engine has died; leaving")
            await asyncio.sleep(DEATH_GRACE_S)


def _wanted_connections(config: EngineConfig) -> int:
    if config.server.max_connections is not None:
        return config.server.max_connections
    return max(MAX_CONNECTIONS, (config.max_num_seqs + config.server.max_queued_requests) * 5 // 4)


async def _first(*waits: Awaitable[object], timeout_s: float | None = None) -> None:
    """Return when the first of `waits` is done or after `timeout_s`; the other coroutines are cancelled."""
    tasks = [asyncio.ensure_future(wait) for wait in waits]
    await asyncio.wait(tasks, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
    for task in tasks:
        if isinstance(task, asyncio.Task):
            task.cancel()
