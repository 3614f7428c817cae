"""Several engines behind one address, by Ray Serve: streams, back-pressure, an orderly end.

    .venv/bin/pip install -e '.[ray]'
    serve run examples.ray_serve.app:build model=demo replicas=2

    curl -N http://127.0.0.1:8000/v1/completions -H 'Content-Type: application/json' -d '{"prompt": "Once upon a time"}'

Each replica is one `Engine` in its own process. Two queues push back: Ray Serve answers 503 when `waiting` requests
stand in its own queue, because every replica has `ongoing`; a replica answers 429 with Retry-After when its engine will
take no more (`server.max_queued_requests`, or a policy that sheds load). A client that leaves ends its request in the
engine. A replica that is told to go finishes its streams first, for at most DRAIN_S.
"""

# No `from __future__ import annotations`: FastAPI could not resolve the annotations of a deployment's methods.
import math
from collections.abc import AsyncIterator, Mapping
from typing import Any

import msgspec
from fastapi import FastAPI, HTTPException
from pydantic import BaseModel
from ray import serve
from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from tfserve.config import config_from
from tfserve.engine.engine import Engine
from tfserve.engine.frontend.stream import RequestStream
from tfserve.errors import EngineDeadError, QueueFullError, RequestError
from tfserve.types import RequestOutput, SamplingParams

DRAIN_S = 30.0

api = FastAPI()


class Completion(BaseModel):
    """The supported fields of a completion request; `tfserve serve` has the whole API."""

    prompt: str | list[int]
    max_tokens: int = 16
    temperature: float = 1.0
    seed: int | None = None
    ignore_eos: bool = False
    consumption_rate: float | str | None = None


class EventStream(StreamingResponse):
    """Server-sent events of one request. When the response ends, in any way, the request ends in the engine too."""

    def __init__(self, stream: RequestStream, first: RequestOutput, headers: Mapping[str, str]) -> None:
        self._stream = stream
        super().__init__(self._events(first), headers=headers, media_type="text/event-stream")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._stream.abort()

    async def _events(self, first: RequestOutput) -> AsyncIterator[bytes]:
        output: RequestOutput | None = first
        while output is not None:
            choice: dict[str, Any] = {"index": 0, "text": output.text, "token_ids": output.token_ids}
            choice["finish_reason"] = output.finish_reason
            chunk = {"id": output.request_id, "object": "text_completion", "choices": [choice]}
            yield b"data: %b\n\n" % msgspec.json.encode({"error": output.error} if output.error else chunk)
            try:
                output = None if output.finished else await self._stream.next()
            except EngineDeadError as error:
                yield b"data: %b\n\n" % msgspec.json.encode({"error": str(error)})
                break
        yield b"data: [DONE]\n\n"


# Above the class: `serve.ingress` copies it, with what its module holds so far.
def too_many(message: str, retry_after_s: float) -> HTTPException:
    return HTTPException(429, message, {"Retry-After": str(max(1, math.ceil(retry_after_s)))})


@serve.deployment(graceful_shutdown_timeout_s=DRAIN_S + 5, graceful_shutdown_wait_loop_s=0.2, health_check_period_s=5)
@serve.ingress(api)
class Replica:
    """One engine and its part of the requests."""

    def __init__(self, settings: dict[str, Any]) -> None:
        self._engine = Engine(config_from(settings))
        self._name = serve.get_replica_context().replica_id.unique_id

    def check_health(self) -> None:
        """Ray Serve asks now and then, and replaces a replica that raises: EngineDeadError does."""
        self._engine.check_health()

    def __del__(self) -> None:
        """Ray Serve calls this once the last request of a replica that is to go has ended."""
        self._engine.shutdown()

    @api.get("/stats")
    async def stats(self) -> dict[str, Any]:
        """Statistics of the replica that answers."""
        return {"replica": self._name, **msgspec.to_builtins(self._engine.stats())}

    @api.post("/v1/completions")
    async def complete(self, body: Completion) -> StreamingResponse:
        """A stream of completion chunks. 400 for an invalid request, 429 and 503 if it cannot be served now."""
        params = SamplingParams(
            temperature=body.temperature, max_tokens=body.max_tokens, seed=body.seed, ignore_eos=body.ignore_eos
        )
        try:
            # Null is "no reader"; left out, the engine assumes one.
            rate = body.consumption_rate if "consumption_rate" in body.model_fields_set else msgspec.UNSET
            stream = self._engine.submit(body.prompt, params, rate=rate)
        except RequestError as error:
            raise HTTPException(400, str(error)) from None
        except QueueFullError as error:
            raise too_many(str(error), error.retry_after_s) from None
        except EngineDeadError as error:
            raise HTTPException(503, str(error)) from None
        try:
            # The first output shows whether the policy admits the request, so the status waits for it.
            first = await stream.next()
            assert first is not None
        except BaseException:
            stream.abort()
            raise
        if first.retry_after_s is not None:
            raise too_many(first.error or "The server is overloaded.", first.retry_after_s)
        return EventStream(stream, first, {"X-Replica": self._name})


def build(args: Mapping[str, str]) -> serve.Application:
    """The application: `replicas`, `ongoing`, `waiting`, `cpus` and `gpus` (each replica's); the rest are settings.

    Settings are those of `tfserve serve`, dotted where they are nested: `scheduler.policy=tokenflow`.
    """
    rest = dict(args)
    options = {name: float(rest.pop(name, default)) for name, default in DEFAULTS.items()}
    settings: dict[str, Any] = {}
    for dotted, value in rest.items():
        *parents, leaf = dotted.split(".")
        node = settings
        for parent in parents:
            node = node.setdefault(parent, {})
        node[leaf] = value
    return Replica.options(
        num_replicas=int(options["replicas"]),
        max_ongoing_requests=int(options["ongoing"]),
        max_queued_requests=int(options["waiting"]),
        ray_actor_options={"num_cpus": options["cpus"], "num_gpus": options["gpus"]},
    ).bind(settings)


DEFAULTS = {"replicas": 2, "ongoing": 64, "waiting": 64, "cpus": 1, "gpus": 0}
