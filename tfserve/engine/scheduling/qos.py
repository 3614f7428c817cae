"""QoS of a run, from timestamps alone, so that one code scores any server from its client's side. Torch-free.

After the TokenFlow paper; docs/performance.md says what each number means. Times are seconds on one clock, rates
tokens/s; NaN is a request without a reader.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import msgspec
import numpy as np

from tfserve.arrays import Floats

TAU_FULL, TAU_ZERO = 0.1, 0.2
"""Share of a request's output that may be unread before a token counts less, and before it counts nothing."""

PATIENCE_S = 1.3
"""How long after its arrival a request's playback clock starts, for on-time goodput."""


class Served(msgspec.Struct, frozen=True):
    """One request as its client saw it: when it was sent, how fast it is read, when each token came."""

    arrival_s: float
    rate: float
    token_s: Floats


class QosReport(msgspec.Struct, frozen=True, kw_only=True):
    """Scores of one run. Times in seconds, throughputs in tokens/s; NaN where there is nothing to measure.

    `stall_share` is stall / (stall + playback). `effective_throughput` weighs each token by how full the buffer was and
    is never to be read alone: see the others.
    """

    num_requests: int
    num_tokens: int
    duration_s: float
    raw_throughput: float
    effective_throughput: float
    on_time_goodput: float
    ttft_mean_s: float
    ttft_p50_s: float
    ttft_p99_s: float
    tbt_p99_s: float
    stall_s: float
    stall_share: float


class Bounds(msgspec.Struct, frozen=True, kw_only=True):
    """What a scheduler is held against in the same run.

    None can beat the first two; `fluid_effective_throughput` can be, by letting a few run far ahead. `effective_ratio`
    is over fcfs; `ttft_p99_s`, the time to prefill 99 % of the prompts; `fluid_effective_throughput`,
    what the measured capacity gives when it is shared perfectly.
    """

    effective_ratio: float
    ttft_p99_s: float
    fluid_effective_throughput: float


def reading_starts(request: Served) -> Floats:
    """When the reader begins with each token: reading starts with the first one and waits where one is not there yet.

    Each takes 1/rate. The request must have a reader.
    """
    # Token j is there for the reader once it came; the reader has read j of them 1/r after starting on the j-th.
    # starts[j] = max(times[j], starts[j-1] + 1/r), unrolled into one running maximum.
    pace = np.arange(len(request.token_s)) / request.rate
    starts: Floats = np.maximum.accumulate(request.token_s - pace) + pace
    return starts


def buffer_sizes(request: Served) -> tuple[Floats, float]:
    """Unread tokens just after each token came, that token included; and the request's stall seconds.

    See `reading_starts`; without a reader nothing is ever unread but the token that has just come.
    """
    times, n = request.token_s, len(request.token_s)
    generated = np.arange(1, n + 1, dtype=np.float64)
    if n == 0 or math.isnan(request.rate):
        return np.ones(n), 0.0
    starts = reading_starts(request)
    stall = float(starts[-1] - starts[0] - (n - 1) / request.rate)
    # Read by the time token k comes: whole tokens before the one being read, and a fraction of that one.
    index = np.searchsorted(starts, times, side="right") - 1
    index = np.minimum(index, np.arange(n) - 1)
    read = np.where(
        index >= 0,
        index + np.clip((times - starts[np.maximum(index, 0)]) * request.rate, 0.0, 1.0),
        0.0,
    )
    return generated - read, max(stall, 0.0)


def token_weights(request: Served, tau_full: float, tau_zero: float) -> Floats:
    """Weight of each token: 1 while at most `tau_full` tokens are unread, falling to 0 at `tau_zero`."""
    unread, _ = buffer_sizes(request)
    if tau_zero <= tau_full:
        return np.where(unread <= tau_full, 1.0, 0.0)
    return np.clip((tau_zero - unread) / (tau_zero - tau_full), 0.0, 1.0)


def effective_tokens(request: Served) -> float:
    """Sum of weights, thresholds at 10 % and 20 % of the request's output; without a reader every token counts."""
    n = len(request.token_s)
    if math.isnan(request.rate):
        return float(n)
    return float(token_weights(request, TAU_FULL * n, TAU_ZERO * n).sum())


def on_time_tokens(request: Served) -> int:
    """Tokens that came before their turn, had playback started PATIENCE_S after arrival and never waited."""
    n = len(request.token_s)
    if math.isnan(request.rate):
        return n
    deadline = request.arrival_s + PATIENCE_S + np.arange(n) / request.rate
    return int((request.token_s <= deadline).sum())


def qos(requests: Sequence[Served], *, tau: float, alpha: float, ttft_penalty: float, stall_penalty: float) -> float:
    """The paper's QoS: weights less `ttft_penalty` (lambda) and `stall_penalty` (mu) tokens a second, per second.

    A token weighs 1 while at most `tau` are unread and `alpha` less for each one beyond, not below 0.
    """
    total = 0.0
    for request in requests:
        if len(request.token_s) == 0:
            continue
        unread, stall_s = buffer_sizes(request)
        weights = np.clip(1.0 - alpha * (unread - tau), 0.0, 1.0)
        ttft_s = float(request.token_s[0]) - request.arrival_s
        total += float(weights.sum()) - ttft_penalty * ttft_s - stall_penalty * stall_s
    return total / _duration_s(requests)


def score(requests: Sequence[Served]) -> QosReport:
    """Every number of a run that a comparison must show side by side."""
    duration = _duration_s(requests)
    answered = [r for r in requests if len(r.token_s)]
    num_tokens = sum(len(r.token_s) for r in answered)
    ttft = np.array([r.token_s[0] - r.arrival_s for r in answered])
    gaps = np.concatenate([np.diff(r.token_s) for r in answered]) if answered else np.empty(0)
    read = [r for r in answered if not math.isnan(r.rate)]
    stall = sum(buffer_sizes(r)[1] for r in read)
    playback = sum(len(r.token_s) / r.rate for r in read)
    return QosReport(
        num_requests=len(requests),
        num_tokens=num_tokens,
        duration_s=duration,
        raw_throughput=num_tokens / duration,
        effective_throughput=sum(map(effective_tokens, answered)) / duration,
        on_time_goodput=sum(map(on_time_tokens, answered)) / duration,
        ttft_mean_s=float(ttft.mean()) if len(ttft) else math.nan,
        ttft_p50_s=_percentile(ttft, 50),
        ttft_p99_s=_percentile(ttft, 99),
        tbt_p99_s=_percentile(gaps, 99),
        stall_s=stall,
        stall_share=stall / (stall + playback) if read else math.nan,
    )


def bounds(
    requests: Sequence[Served],
    fcfs: QosReport,
    *,
    raw_throughput: float,
    prompt_tokens: Sequence[int],
    prefill_tokens_per_s: float,
    capacity: float,
) -> Bounds:
    """What the best schedule of these requests could reach; `requests` give arrivals, rates and output lengths.

    `raw_throughput` is the compared run's, `fcfs` the baseline's report; `prompt_tokens` are computed in order of
    arrival at `prefill_tokens_per_s`; `capacity` is the measured tokens/s of generation.
    """
    return Bounds(
        effective_ratio=raw_throughput / fcfs.effective_throughput if fcfs.effective_throughput else math.inf,
        ttft_p99_s=prefill_bound_s([r.arrival_s for r in requests], prompt_tokens, prefill_tokens_per_s),
        fluid_effective_throughput=fluid_effective_throughput(requests, capacity),
    )


def prefill_bound_s(arrival_s: Sequence[float], prompt_tokens: Sequence[int], tokens_per_s: float) -> float:
    """P99 TTFT of a server that does nothing but prefill, first come first served."""
    order = np.argsort(arrival_s, kind="stable")
    arrivals = np.asarray(arrival_s, np.float64)[order]
    work = np.asarray(prompt_tokens, np.float64)[order] / tokens_per_s
    done = np.cumsum(work)
    # A queue that empties waits for the next arrival: the running maximum of arrival less work done before it.
    end = done + np.maximum.accumulate(arrivals - (done - work))
    return _percentile(end - arrivals, 99)


def fluid_effective_throughput(requests: Sequence[Served], capacity: float) -> float:
    """Effective tokens/s if `capacity` tokens/s flowed to all present readers in proportion to their rates.

    Up to its rate a reader's buffer stays empty and every token counts. What capacity is left over goes to those
    without a reader, then makes all streams faster in proportion, at the expense of their weights.
    """
    n = np.array([len(r.token_s) for r in requests], np.float64)
    rate = np.array([r.rate for r in requests])
    arrival = np.array([r.arrival_s for r in requests])
    reads = ~np.isnan(rate)
    demand = np.where(reads, rate, 0.0)
    done, consumed, effective = np.zeros(len(n)), np.zeros(len(n)), np.zeros(len(n))
    now, last = float(arrival.min()), float(arrival.min())
    dt = max(float(n.sum()) / capacity / 2000, 1e-6)
    while (done < n).any():
        live = (arrival <= now) & (done < n)
        wanted = demand * live
        total = wanted.sum()
        blind = live & ~reads
        if total >= capacity or (total > 0 and not blind.any()):
            speed = wanted * (capacity / total)
        else:
            speed = wanted + blind * ((capacity - total) / max(int(blind.sum()), 1))
        step = np.minimum(speed * dt, n - done)
        done += step
        consumed = np.minimum(done, consumed + demand * dt * (done > 0))
        unread = done - consumed
        weight = np.clip((TAU_ZERO * n - unread) / np.maximum((TAU_ZERO - TAU_FULL) * n, 1e-12), 0.0, 1.0)
        effective += step * np.where(reads, weight, 1.0)
        now += dt
        last = now if step.any() else last
    return float(effective.sum() / (last - arrival.min()))


def _duration_s(requests: Sequence[Served]) -> float:
    """From the first arrival to the last token; at least a microsecond."""
    ends = [float(r.token_s[-1]) for r in requests if len(r.token_s)]
    starts = [r.arrival_s for r in requests]
    return max(max(ends, default=0.0) - min(starts, default=0.0), 1e-6)


def _percentile(values: Floats, q: float) -> float:
    return float(np.percentile(values, q)) if len(values) else math.nan
