"""What the server is doing (loading, ready, draining, dead) and the requests that are open."""

from __future__ import annotations

import asyncio
import contextlib
import enum
import functools
import os
import time
from collections.abc import Iterator

from aiohttp import web

from tfserve.config import EngineConfig
from tfserve.engine.engine import Engine
from tfserve.errors import EngineDeadError, EngineStalledError
from tfserve.http.bodies import BodyBudget
from tfserve.http.errors import ApiError, unavailable
from tfserve.http.keys import Caller, Keyring
from tfserve.http.metrics import Metrics
from tfserve.http.request_group import RequestGroup
from tfserve.types import EngineStats


class Phase(enum.StrEnum):
    """The server's life: LOADING -> READY -> DRAINING; the engine may make it DEAD at any time."""

    LOADING = "loading"
    READY = "ready"
    DRAINING = "draining"
    DEAD = "dead"


class Service:
    """The engine behind the API: admits requests while it is ready and knows which are open."""

    def __init__(self, config: EngineConfig) -> None:
        self.config = config
        self.keys = Keyring(config)
        self.model_name = config.served_model_name or os.path.basename(os.path.abspath(config.model))
        self.created = int(time.time())
        self.phase = Phase.LOADING
        self.died = asyncio.Event()
        self.idle = asyncio.Event()
        self.idle.set()
        self._death = ""
        self._loaded: Engine | None = None
        self.metrics = Metrics()
        self.bodies = BodyBudget(
            config.server.inflight_body_bytes, functools.partial(self.metrics.on_refusal, "body_memory")
        )
        self._open: dict[str, RequestGroup] = {}

    def ready(self, engine: Engine) -> None:
        """Start to admit requests."""
        self._loaded = engine
        self.metrics.attach(engine)
        if self.phase is Phase.LOADING:
            self.phase = Phase.READY

    def drain(self) -> None:
        """Admit no more requests; the open ones go on."""
        if self.phase is not Phase.DEAD:
            self.phase = Phase.DRAINING

    def die(self, reason: str) -> None:
        """The engine has died; its streams end by themselves."""
        self.phase = Phase.DEAD
        self._death = reason
        self.died.set()

    @property
    def is_ending(self) -> bool:
        """True once the server is on its way out."""
        return self.phase in (Phase.DRAINING, Phase.DEAD)

    @property
    def engine_alive(self) -> Engine:
        """The engine, for requests that only look: while draining too. Raises ApiError (503) before and after."""
        if self.phase is Phase.DRAINING and self._loaded is not None:
            return self._loaded
        return self.engine

    @property
    def engine(self) -> Engine:
        """The engine, for requests that it serves. Raises ApiError (503) unless READY."""
        match self.phase:
            case Phase.DRAINING:
                raise unavailable("The server is shutting down.", "draining")
            case Phase.DEAD:
                raise unavailable(f"The engine has died: {self._death}", "engine_dead")
        if self._loaded is None:
            raise unavailable("The model is still loading; try again soon.", "loading", retry_after_s=1)
        return self._loaded

    def check_model(self, name: str | None) -> None:
        """Raise ApiError (404) unless `name` is the served model; None means the served model."""
        if name is not None and name != self.model_name:
            message = f"The model {name[:100]!r} does not exist; this server serves {self.model_name!r}."
            raise ApiError(404, message, param="model", code="model_not_found")

    def health(self) -> tuple[str, EngineStats | None]:
        """In what phase the engine is or what is wrong with it, and its counts; None unless it lives and progresses."""
        if self.phase is Phase.DEAD:
            return f"dead: {self._death}", None
        if self._loaded is None:
            return self.phase, None
        try:
            self._loaded.check_health()
        except EngineStalledError as error:
            return f"stalled: {error}", None
        except EngineDeadError as error:
            return f"dead: {error}", None
        return self.phase, self._loaded.stats()

    @property
    def num_open(self) -> int:
        """API requests being answered by the engine now."""
        return len(self._open)

    @contextlib.contextmanager
    def group(self, name: str, caller: Caller) -> Iterator[RequestGroup]:
        """A place for one API request's streams; what is unfinished on the way out, however it comes, is aborted.

        `name` is the answer's id, unique, by which `find` finds it.
        """
        group = RequestGroup(self.engine, self.metrics.on_end, caller.tenant)
        self._open[name] = group
        self.idle.clear()
        try:
            yield group
        finally:
            self.metrics.on_abort(len(group.unfinished))
            group.close()
            del self._open[name]
            if not self._open:
                self.idle.set()

    def find(self, name: str, caller: Caller) -> RequestGroup | None:
        """The open request whose answer has this id, if the caller may see it."""
        group = self._open.get(name)
        return group if group is not None and caller.may_see(group.tenant) else None

    def abort_open(self, reason: str) -> None:
        """Abort every open request; their clients are told `reason`."""
        for group in tuple(self._open.values()):
            group.abort(reason)


SERVICE = web.AppKey("service", Service)
"""Where an application has its Service."""
