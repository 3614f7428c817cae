"""Bounds that no scheduler can exceed on the same hardware with the same requests."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
import numpy as np

from benchmarks.paper.cases import Case
from benchmarks.paper.hardware import capacity, prefill_tokens_per_s
from tfserve.arrays import Floats
from tfserve.engine.scheduling.qos import TAU_FULL, TAU_ZERO, Served, fluid_effective_throughput, prefill_bound_s
from tfserve.engine.simulation.engine import SimRequest

_BINS = 1000


class RowBounds(msgspec.Struct, frozen=True, kw_only=True):
    """Bounds of one case and seed, whatever the policy.

    `capacity` is Gamma by the device's roofline; `demand` is the peak of the readers' rates if each is served from its
    arrival; both in tokens/s. `ttft_p99_s` is the P99 if the device only computed prompts. `fluid` is the effective
    throughput of a constant `capacity` shared in proportion to rates.
    """

    capacity: float
    demand: float
    ttft_p99_s: float
    fluid: float

    @property
    def is_feasible(self) -> bool:
        """True where demand is within capacity."""
        return self.demand <= self.capacity

    @property
    def is_relaxed(self) -> bool:
        """True where demand is within 0.9 of the capacity."""
        return self.demand <= 0.9 * self.capacity


def row_bounds(case: Case, requests: Sequence[SimRequest]) -> RowBounds:
    """The bounds of a case; its settings play no part."""
    prompt = float(np.mean([request.prompt_tokens for request in requests]))
    output = float(np.mean([request.output_tokens for request in requests]))
    top = capacity(case.profile, prompt, output)
    served = [Served(r.arrival_s, r.rate, np.zeros(r.output_tokens)) for r in requests]
    return RowBounds(
        capacity=top,
        demand=peak_demand(requests),
        ttft_p99_s=prefill_bound_s(
            [r.arrival_s for r in requests],
            [r.prompt_tokens for r in requests],
            prefill_tokens_per_s(case.profile, prompt),
        ),
        fluid=fluid_effective_throughput(served, top),
    )


def peak_demand(requests: Sequence[SimRequest]) -> float:
    """Peak of the summed rates in tokens/s, if each reader starts at its arrival and never waits."""
    starts = [(r.arrival_s, r.rate) for r in requests]
    ends = [(r.arrival_s + r.output_tokens / r.rate, -r.rate) for r in requests]
    rates = np.cumsum([rate for _, rate in sorted(starts + ends)])
    return float(rates.max())


def fluid_of_run(served: Sequence[Served]) -> float:
    """Effective tokens/s if at every moment the run's own tokens had gone to the emptiest buffers.

    The tokens of each moment fill the buffers of the requests that have arrived, the smallest unread share of the
    answer first, to one level. The run's raw throughput over time is kept; only the sharing is perfect.
    """
    answered = [request for request in served if len(request.token_s)]
    if not answered:
        return 0.0
    n = np.array([len(request.token_s) for request in answered], np.float64)
    rate = np.array([request.rate for request in answered])
    arrival = np.array([request.arrival_s for request in answered])
    times = np.concatenate([request.token_s for request in answered])
    begin, end = float(arrival.min()), float(times.max())
    edges = np.linspace(begin, end, _BINS + 1)
    produced, _ = np.histogram(times, edges)
    done, read, effective, carried = np.zeros(len(n)), np.zeros(len(n)), 0.0, 0.0
    for tokens, since, until in zip(produced, edges[:-1], edges[1:], strict=True):
        live = (arrival <= until) & (done < n)
        carried += float(tokens)
        given = _level(done - read, n, np.where(live, n - done, 0.0), carried)
        carried -= float(given.sum())
        done += given
        # On average a bin's tokens are available for half of it.
        unread = np.maximum(done - read - rate * (until - since) / 2, 0.0)
        weight = np.clip((TAU_ZERO * n - unread) / ((TAU_ZERO - TAU_FULL) * n), 0.0, 1.0)
        effective += float((given * weight).sum())
        read = np.minimum(done, read + rate * (until - since))
    return effective / max(end - begin, 1e-6)


def _level(unread: Floats, n: Floats, room: Floats, tokens: float) -> Floats:
    """Tokens for each request, at most `room`, so that all that get tokens end at one level of unread / n."""
    total = float(room.sum())
    if tokens >= total:
        return room
    low, high = float((unread / n).min()), float(((unread + room) / n).max())
    for _ in range(40):
        middle = (low + high) / 2
        # Half of the time of scoring a run is spent here; np.clip would double it.
        if float(np.minimum(np.maximum(middle * n - unread, 0.0), room).sum()) < tokens:
            low = middle
        else:
            high = middle
    return np.clip(high * n - unread, 0.0, room)
