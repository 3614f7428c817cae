"""The tracker's columns as StreamStates: what /v1/streams and the live page show. Torch-free."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any, Literal

import numpy as np

from tfserve.arrays import Floats, Mask
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
    ids = c.ids_of(order)
    has_named_rate = ~is_rate_assumed & ~np.isnan(c.rate)
    fields: dict[str, Iterable[Any]] = {
        "id": ids,
        "phase": map(_NAMES.__getitem__, c.state[order].tolist()),
        "age_s": (now_s - c.arrival_s[order]).tolist(),
        "num_prompt_tokens": c.num_prompt[order].tolist(),
        "num_output_tokens": c.num_output[order].tolist(),
        "num_thought_tokens": c.num_thoughts[order].tolist(),
        "max_tokens": c.max_tokens[order].tolist(),
        "rate": _known(c.rate[order]),
        "is_rate_assumed": is_rate_assumed[order].tolist(),
        "num_unread": c.unread[order].tolist(),
        "time_to_empty_s": _known(c.time_to_empty_s[order]),
        "stall_s": _known(np.where(has_named_rate, c.stall_s, np.nan)[order]),
        "ttft_s": _known((c.first_token_s - c.arrival_s)[order]),
        "num_preemptions": c.num_preemptions[order].tolist(),
        "reason": map(reasons.__getitem__, ids),
    }
    return [StreamState(**dict(zip(fields, values, strict=True))) for values in zip(*fields.values(), strict=True)]


def state_before_queue(request: Request, default_rate: float, now_s: float) -> StreamState:
    """The state of a request that no tracker knows yet."""
    return StreamState(
        id=request.id,
        phase="waiting",
        age_s=now_s - request.arrival_s,
        num_prompt_tokens=request.num_prompt_tokens,
        num_output_tokens=0,
        max_tokens=request.max_tokens,
        rate=_known(np.array([resolve_rate(request.rate, default_rate)]))[0],
        is_rate_assumed=request.is_rate_assumed or request.rate == AUTO,
        num_unread=0.0,
        time_to_empty_s=None,
        stall_s=None,
        ttft_s=None,
        num_preemptions=0,
        reason=str(Cause.GRAMMAR),
    )


def _known(values: Floats) -> list[float | None]:
    """NaN and infinity, which JSON lacks, become None."""
    return [value if math.isfinite(value) else None for value in values.tolist()]
