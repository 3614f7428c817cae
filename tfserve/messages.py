"""Messages between the front (tokenising, HTTP) and the core (the loop): one per step, never one per token."""

from __future__ import annotations

import msgspec

from tfserve.types import (
    ONE_TENANT,
    ConsumptionRate,
    EngineInfo,
    EngineStats,
    FinishReason,
    Place,
    RequestId,
    RequestTimes,
    SamplingParams,
    StreamState,
    Tenant,
    TokenLogprob,
)


class AddRequest(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """A validated request. `params.max_tokens` is resolved; `arrival_s` is CLOCK_MONOTONIC at the front.

    `rate` has the default filled in (`is_rate_assumed`: the request named none). Of requests without a rate, the
    smallest `priority` is served first. `siblings` are more requests for the same prompt: they differ only in id and
    seed, which counts up. `begins_in` is where the text begins; None: all of it is answer.
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
    begins_in: Place | None = None

    @property
    def request_ids(self) -> tuple[RequestId, ...]:
        """All ids of the message, in order."""
        return (self.request_id, *self.siblings)


class AbortRequest(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """Abort this request; unknown or finished ids are ignored."""

    request_id: RequestId


class ReportPlayed(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """A reader has read `num_tokens` of the output so far; unknown or finished ids are ignored."""

    request_id: RequestId
    num_tokens: int


class ListStreams(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """Asks for the state of every live request. The answer is a StreamStates with the same `query`."""

    query: int


class Shutdown(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """Abort all requests and end the loop."""


ToCore = AddRequest | AbortRequest | ReportPlayed | ListStreams | Shutdown


class TokenOutput(msgspec.Struct, frozen=True, array_like=True):
    """Result of a step for one request: its new tokens, and how it finished, if it did.

    `prompt_logprobs` are sent once, with the first token (or with the end, if no token is wanted). `retry_after_s` is
    set on a request that was refused before it started. `recurs`: the same request would fail again.
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
    """All outputs of one step; `started` are the requests that were admitted in it, with or without a token.

    `resumed` has an entry for each request that resumed after a preemption: the path, and the seconds it was preempted.
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
    """The core cannot start, or cannot continue. `key` names the wrong setting, if there is one.

    `exit_code` is the error's (see TfserveError); 1 for an unexpected error.
    """

    message: str
    key: str | None = None
    exit_code: int = 1


ToFront = StepOutputs | StreamStates | Ready | Failed
