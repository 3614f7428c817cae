"""What the front (tokenising, HTTP) and the core (the loop) say to each other: a message per step, never per token."""

from __future__ import annotations

import msgspec

from tfserve.types import (
    ConsumptionRate,
    EngineInfo,
    EngineStats,
    FinishReason,
    RequestId,
    RequestTimes,
    SamplingParams,
    TokenLogprob,
)


class AddRequest(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """A validated request. `params.max_tokens` is resolved; `arrival_s` is CLOCK_MONOTONIC at the front.

    `rate` is resolved as far as the default goes.
    """

    request_id: RequestId
    prompt_token_ids: list[int]
    params: SamplingParams
    arrival_s: float
    rate: ConsumptionRate = None


class AbortRequest(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """Nobody wants this request any more; unknown or finished ids are fine."""

    request_id: RequestId


class Shutdown(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """Abort what is left and end the loop."""


ToCore = AddRequest | AbortRequest | Shutdown


class TokenOutput(msgspec.Struct, frozen=True, array_like=True):
    """What a step did for one request: its new tokens, and how it finished if it did.

    `prompt_logprobs` come once, with the first token (or with the end, where no token is wanted).
    """

    request_id: RequestId
    token_ids: list[int] = []
    logprobs: list[TokenLogprob] | None = None
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None
    error: str | None = None
    times: RequestTimes | None = None
    prompt_logprobs: list[TokenLogprob] | None = None


class StepOutputs(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """All outputs of one step."""

    outputs: list[TokenOutput]
    stats: EngineStats


class Ready(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """The model is loaded and the loop runs."""

    info: EngineInfo


class Failed(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """The core cannot start, or cannot go on. `key` names the setting at fault, if one is."""

    message: str
    key: str | None = None


ToFront = StepOutputs | Ready | Failed
