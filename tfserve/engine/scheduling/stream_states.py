"""The tracker's columns as StreamStates: what /v1/streams and the live page show. Torch-free."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal

import numpy as np

from tfserve.arrays import Mask
from tfserve.engine.scheduling.columns import Columns
from tfserve.engine.scheduling.reasons import Cause
from tfserve.engine.scheduling.request import Request
from tfserve.engine.scheduling.state import RequestState
from tfserve.engine.scheduling.token_buffer import AUTO, resolve_rate
from tfserve.types import RequestId, StreamState

_NAMES: dict[int, Literal["waiting", "running", "paused", "loading"]] = {
    int(RequestState.WAITING): "waiting",
    int(RequestState.RUNNING): "running",
    int(RequestState.PAUSED): "paused",
    int(RequestState.LOADING): "loading",
}


def stream_states(
    columns: Columns, is_rate_assumed: Mask, reasons: Mapping[RequestId, str | None], now_s: float
) -> list[StreamState]:
    """Every request of `columns`, which are those of `now_s`, in order of arrival; `reasons` by their ids.

    A stall is told only where the rate is known: a request that named none has not said when it is late.
    """
    c = columns
    order = np.argsort(c.seq)
    table = zip(
        c.ids_of(order),
        c.state[order].tolist(),
        (now_s - c.arrival_s[order]).tolist(),
        c.num_prompt[order].tolist(),
        c.num_output[order].tolist(),
        c.num_thoughts[order].tolist(),
        c.max_tokens[order].tolist(),
        c.rate[order].tolist(),
        is_rate_assumed[order].tolist(),
        c.unread[order].tolist(),
        c.time_to_empty_s[order].tolist(),
        c.stall_s[order].tolist(),
        (c.first_token_s - c.arrival_s)[order].tolist(),
        c.num_preemptions[order].tolist(),
        strict=True,
    )
    return [
        StreamState(
            id=req,
            phase=_NAMES[phase],
            age_s=age_s,
            num_prompt_tokens=num_prompt,
            num_output_tokens=num_output,
            num_thought_tokens=num_thoughts,
            max_tokens=max_tokens,
            rate=_known(rate),
            is_rate_assumed=assumed,
            num_unread=unread,
            time_to_empty_s=_known(empty_s),
            stall_s=None if assumed or math.isnan(rate) else stall_s,
            ttft_s=_known(ttft_s),
            num_preemptions=preemptions,
            reason=reasons[req],
        )
        for (
            req,
            phase,
            age_s,
            num_prompt,
            num_output,
            num_thoughts,
            max_tokens,
            rate,
            assumed,
            unread,
            empty_s,
            stall_s,
            ttft_s,
            preemptions,
        ) in table
    ]


def state_before_queue(request: Request, default_rate: float, now_s: float) -> StreamState:
    """The state of a request that no tracker knows yet."""
    return StreamState(
        id=request.id,
        phase="waiting",
        age_s=now_s - request.arrival_s,
        num_prompt_tokens=request.num_prompt_tokens,
        num_output_tokens=0,
        max_tokens=request.max_tokens,
        rate=_known(resolve_rate(request.rate, default_rate)),
        is_rate_assumed=request.is_rate_assumed or request.rate == AUTO,
        num_unread=0.0,
        time_to_empty_s=None,
        stall_s=None,
        ttft_s=None,
        num_preemptions=0,
        reason=str(Cause.GRAMMAR),
    )


def _known(value: float) -> float | None:
    """NaN and infinity, which JSON lacks, become None."""
    return value if math.isfinite(value) else None
