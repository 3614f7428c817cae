"""Pictures of the live streams, for their viewers and for Prometheus."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Iterator
from typing import Literal

import msgspec
from aiohttp import web

from tfserve.engine.scheduling.policies import POLICIES
from tfserve.errors import EngineStalledError
from tfserve.http.fresh import Fresh
from tfserve.http.keys import Caller
from tfserve.http.service import Service
from tfserve.types import EngineStats, StreamState, Tenant

PATIENCE_S = 10.0
"""How long the engine, which answers between two steps, may take to tell of its streams."""


class StreamList(msgspec.Struct, kw_only=True):
    """Body of GET /v1/streams, and the data of each of its events; `policy` and `stats` are the engine's.

    `policy_ignores` names what a request may say that the policy takes no notice of.
    """

    created: float
    policy: str
    policy_ignores: tuple[str, ...]
    stats: EngineStats
    data: list[StreamState]
    object: Literal["list"] = "list"


class StreamFeed:
    """Pictures of the streams that a caller may see. The engine is asked once, however many look."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._fresh = Fresh(self._list)
        self._pictures: dict[Tenant | None, bytes] = {}
        self.num_viewers = 0

    @contextlib.contextmanager
    def viewing(self) -> Iterator[None]:
        """Count a viewer while it gets pictures."""
        self.num_viewers += 1
        try:
            yield
        finally:
            self.num_viewers -= 1

    async def listed(self, max_age_s: float) -> StreamList:
        """All streams, at most `max_age_s` older than this call, however long the engine takes.

        Raises ApiError, EngineDeadError.
        """
        return await self._fresh.get(max_age_s)

    async def picture(self, max_age_s: float, caller: Caller) -> bytes:
        """JSON of a StreamList that is no older than `max_age_s`. Raises ApiError, EngineDeadError."""
        try:
            async with asyncio.timeout(PATIENCE_S):
                listed = await self.listed(max_age_s)
        except TimeoutError:
            message = f"The engine has not told of its streams within {PATIENCE_S:g} s; see /health."
            raise EngineStalledError(message) from None
        viewer = None if caller.sees_all else caller.tenant
        if viewer not in self._pictures:
            data = listed.data
            if viewer is not None:
                data = [each for each in data if self._service.find(each.id.rpartition("-")[0], caller)]
            self._pictures[viewer] = msgspec.json.encode(msgspec.structs.replace(listed, data=data))
        return self._pictures[viewer]

    async def _list(self) -> StreamList:
        engine = self._service.engine_alive
        streams = await engine.streams()
        self._pictures.clear()
        policy = engine.info.policy
        return StreamList(
            created=time.time(),
            policy=policy,
            policy_ignores=POLICIES[policy].ignores,
            stats=engine.stats(),
            data=streams,
        )


FEED = web.AppKey("feed", StreamFeed)
"""The one feed of an application."""
