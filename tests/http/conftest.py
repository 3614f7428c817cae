"""A server on a real loopback port with a FakeEngine behind it."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import aiohttp
import msgspec
import pytest
from aiohttp import web

from tests.http.fakes import FakeEngine
from tfserve.config import EngineConfig, config_from
from tfserve.http.app import create_app
from tfserve.http.connections import IDLE_TIMEOUT_S, MAX_CONNECTIONS, create_runner
from tfserve.http.service import Service


class Running:
    """A running server: its engine and service to poke at, a session to talk to it."""

    def __init__(self, url: str, engine: FakeEngine, service: Service, session: aiohttp.ClientSession) -> None:
        self.url = url
        self.engine = engine
        self.service = service
        self.session = session

    def post(self, path: str, body: Any, **kwargs: Any) -> Any:
        data = body if isinstance(body, bytes) else msgspec.json.encode(body)
        return self.session.post(self.url + path, data=data, **kwargs)

    def get(self, path: str, **kwargs: Any) -> Any:
        return self.session.get(self.url + path, **kwargs)


StartServer = Callable[..., Awaitable[Running]]


@pytest.fixture
async def start() -> AsyncIterator[StartServer]:
    """Start servers: `await start(reply=..., keep_alive_s=..., ...)`; `loaded=False` leaves it loading."""
    runners: list[web.AppRunner] = []
    sessions: list[aiohttp.ClientSession] = []

    async def begin(
        reply: str | None = "Hello, wide world",
        step_s: float = 0.0,
        loaded: bool = True,
        overload: str = "queue",
        engine_class: type[FakeEngine] = FakeEngine,
        idle_timeout_s: float = IDLE_TIMEOUT_S,
        **server: Any,
    ) -> Running:
        scheduler = {"policy": "tokenflow", "overload": overload}
        config: EngineConfig = config_from({"model": "models/tiny", "server": server, "scheduler": scheduler})
        service = Service(config)
        engine = engine_class(config, reply, step_s)
        if loaded:
            service.ready(engine)
        most = config.server.max_connections or MAX_CONNECTIONS
        runner = create_runner(
            create_app(service, most), shutdown_timeout_s=1.0, idle_timeout_s=idle_timeout_s, max_connections=most
        )
        runners.append(runner)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        session = aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(10))
        sessions.append(session)
        return Running(f"http://127.0.0.1:{runner.addresses[0][1]}", engine, service, session)

    yield begin
    for session in sessions:
        await session.close()
    for runner in runners:
        await runner.cleanup()
