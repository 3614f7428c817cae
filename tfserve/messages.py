"""What the front (tokenising, HTTP) and the core (the loop) say to each other: a message per step, never per token."""

from __future__ import annotations

import msgspec

from tfserve.types import (
    ONE_TENANT,
    ConsumptionRate,
    EngineInfo,
    EngineStats,
    FinishReason,
    RequestId,
    RequestTimes,
    SamplingParams,
    StreamState,
    Tenant,
    TokenLogprob,
)


class AddRequest(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """A validated request. `params.max_tokens` is resolved; `arrival_s` is CLOCK_MONOTONIC at the front.

    `rate` is resolved as far as the default goes (`is_rate_assumed`: it is the default, since the request named none);
    of requests without one, the smallest `priority` is served first. `tenant` is for whom it is served. `siblings` are
    more requests for the same: they share all but their ids and their seeds, which count up.
    """

    request_id: RequestId
    prompt_token_ids: list[int]
    params: SamplingParams
    arrival_s: float
    rate: ConsumptionRate = None
    priority: int = 0
    is_rate_assumed: bool = False
    tenant: Tenant = ONE_TENANT
    siblings: tuple[RequestId, ...] = ()

    @property
    def request_ids(self) -> tuple[RequestId, ...]:
        """All that are asked for, in order."""
        return (self.request_id, *self.siblings)


class AbortRequest(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """Nobody wants this request any more; unknown or finished ids are fine."""

    request_id: RequestId


class ReportPlayed(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """A reader has read `num_tokens` of the output so far; unknown or finished ids are fine."""

    request_id: RequestId
    num_tokens: int


class ListStreams(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """Asks for every live request's state; StreamStates with the same `query` answers."""

    query: int


class Shutdown(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """Abort what is left and end the loop."""


ToCore = AddRequest | AbortRequest | ReportPlayed | ListStreams | Shutdown


class TokenOutput(msgspec.Struct, frozen=True, array_like=True):
    """What a step did for one request: its new tokens, and how it finished if it did.

    `prompt_logprobs` come once, with the first token (or with the end, where no token is wanted). `retry_after_s` is
    set on a request that was refused before it started: when to try again. `recurs`: the error is the request's own,
    and the same request would meet it again.
    """

    request_id: RequestId
    token_ids: list[int] = []
    logprobs: list[TokenLogprob] | None = None
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None
    error: str | None = None
    times: RequestTimes | None = None
    retry_after_s: float | None = None
    prompt_logprobs: list[TokenLogprob] | None = None
    recurs: bool = False


class StepOutputs(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """All outputs of one step; `started` are requests that were let in with it, whether they have a token yet or not.

    `resumed` are those that came back from a preemption with it: by which path, and after how many seconds.
    """

    outputs: list[TokenOutput]
    stats: EngineStats
    started: list[RequestId] = []
    resumed: list[tuple[str, float]] = []


class StreamStates(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """Every live request, in order of arrival."""

    query: int
    streams: list[StreamState]


class Ready(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """The model is loaded and the loop runs."""

    info: EngineInfo


class Failed(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """The core cannot start, or cannot go on. `key` names the setting at fault, if one is.

    `exit_code` is that of the error (see TfserveError); 1 for an unexpected one.
    """

    message: str
    key: str | None = None
    exit_code: int = 1


ToFront = StepOutputs | StreamStates | Ready | Failed
