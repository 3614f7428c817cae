"""Prometheus metrics: vLLM's names with our prefix, and metrics of readers' buffers.

Gauges and totals are read from the engine at each scrape. A request is observed once, when it ends, from the
times at which its tokens came. Nothing happens per token.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt
from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

from tfserve.engine.engine import Engine
from tfserve.engine.frontend.stream import RequestStream
from tfserve.engine.scheduling.qos import Served, effective_tokens
from tfserve.messages import StepOutputs
from tfserve.types import EngineStats, FinishReason, RequestOutput, RequestTimes, StreamState

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

PREFIX = "tfserve:"

OTHER = "other"
"""The label of requests with an unknown key."""

_GAP_S = (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0)
_SHORT_S = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75)
_FIRST_S = (*_SHORT_S, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0, 160.0, 640.0)
_LONG_S = (10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0, 480.0, 960.0)
_WHOLE_S = (0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, *_LONG_S)
_STALL_S = (0.0, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)
_RESUME_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
_TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10_000, 20_000, 50_000, 100_000)


class Metrics:
    """Everything `/metrics` shows, for one engine; `attach` it once that is loaded."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self._gaps = GapHistogram()
        self._registry.register(self._gaps)
        self._view: EngineView | None = None

        def histogram(name: str, text: str, buckets: Sequence[float], labels: Sequence[str] = ()) -> Histogram:
            return Histogram(PREFIX + name, text, labels, buckets=buckets, registry=self._registry)

        def counter(name: str, text: str, labels: Sequence[str] = ()) -> Counter:
            return Counter(PREFIX + name, text, labels, registry=self._registry)

        self._ttft = histogram("time_to_first_token_seconds", "From arrival to the answer's first token.", _FIRST_S)
        self._whole = histogram("e2e_request_latency_seconds", "From arrival to the last token.", _WHOLE_S)
        self._queue = histogram("request_queue_time_seconds", "From arrival until the request was let in.", _WHOLE_S)
        self._prompt = histogram("request_prompt_tokens", "Tokens of a request's prompt.", _TOKENS)
        self._output = histogram("request_generation_tokens", "Tokens generated for a request.", _TOKENS)
        self._stall = histogram(
            "stream_stall_seconds",
            "How long a request's reader, whose rate was named or reported, had nothing to read after its first token.",
            _STALL_S,
        )
        self._resume = histogram(
            "resume_seconds",
            "From the decision to bring a preempted request back until its next token.",
            _RESUME_S,
            ["path"],
        )
        self._ended = counter("request_success", "Requests that ended, by how.", ["finished_reason"])
        self._refused = counter("requests_refused", "Requests refused before they started.", ["reason"])
        self._unread = counter("unread_closed", "Connections closed because their client read nothing for too long.")
        self._effective = counter(
            "effective_tokens",
            "Tokens of ended requests that said how fast they are read, weighed by how full the reader's buffer was.",
        )
        self._key_answers = counter("key_requests", "Answers given, whole or in part, by the key's name.", ["key"])
        self._key_prompt = counter("key_prompt_tokens", "Prompt tokens of these answers.", ["key"])
        self._key_output = counter("key_generation_tokens", "Tokens generated for these answers.", ["key"])
        self._key_refused = counter("key_requests_refused", "Requests refused for their key.", ["key", "reason"])

    def attach(self, engine: Engine) -> None:
        """Show this engine."""
        self._view = EngineView(engine)
        self._registry.register(self._view)
        engine.on_step(self._on_step)

    def on_end(self, stream: RequestStream, output: RequestOutput) -> None:
        """A request has ended, with this last output."""
        if output.retry_after_s is not None:
            self.on_refusal("overloaded")
            return
        self._ended.labels(str(output.finish_reason)).inc()
        self._prompt.observe(stream.num_prompt_tokens)
        self._output.observe(len(stream.token_s))
        if output.times is not None:
            self._observe_times(stream, output.times)

    def on_abort(self, num_requests: int) -> None:
        """So many requests end before their last output: the client has gone, or they were aborted."""
        self._ended.labels(str(FinishReason.ABORT)).inc(num_requests)

    def on_refusal(self, reason: str) -> None:
        """A request was refused: `reason` is queue_full, overloaded or body_memory."""
        self._refused.labels(reason).inc()

    def on_unread(self) -> None:
        """A connection is closed because its client reads nothing."""
        self._unread.inc()

    def on_answer(self, key_name: str | None, num_prompt_tokens: int, num_output_tokens: int) -> None:
        """An API request has been answered; None: no keys are asked for."""
        if key_name is not None:
            self._key_answers.labels(key_name).inc()
            self._key_prompt.labels(key_name).inc(num_prompt_tokens)
            self._key_output.labels(key_name).inc(num_output_tokens)

    def on_key_refusal(self, key_name: str, reason: str) -> None:
        """A request was refused for what its key may not, or is not: rate_limit_exceeded or unauthorized."""
        self._key_refused.labels(key_name, reason).inc()

    def render(self, streams: Sequence[StreamState]) -> bytes:
        """The text that Prometheus reads; `streams` are the live requests now."""
        if self._view is not None:
            self._view.streams = streams
        return generate_latest(self._registry)

    def _observe_times(self, stream: RequestStream, times: RequestTimes) -> None:
        at = np.asarray(stream.token_s, np.float64)
        if times.first_scheduled_s is not None:
            self._queue.observe(times.first_scheduled_s - times.arrival_s)
        if not len(at):
            return
        self._whole.observe(max(at[-1] - times.arrival_s, 0.0))
        at = at[stream.num_thought_tokens :]
        if len(at):
            self._ttft.observe(max(at[0] - times.arrival_s, 0.0))
        self._gaps.observe(np.diff(at))
        if times.stall_s is not None:
            self._effective.inc(effective_tokens(Served(times.arrival_s, stream.rate, at)))
            self._stall.observe(times.stall_s)

    def _on_step(self, message: StepOutputs) -> None:
        for path, seconds in message.resumed:
            self._resume.labels(path).observe(seconds)


class GapHistogram(Collector):
    """inter_token_latency_seconds: takes all of a request's gaps at once, which the library's histogram cannot."""

    def __init__(self) -> None:
        self._counts = np.zeros(len(_GAP_S) + 1, np.int64)
        self._sum_s = 0.0

    def observe(self, gaps_s: npt.NDArray[np.float64]) -> None:
        """Count the times between tokens."""
        places = np.searchsorted(_GAP_S, gaps_s, side="left")
        self._counts += np.bincount(places, minlength=len(_GAP_S) + 1)
        self._sum_s += float(gaps_s.sum())

    def collect(self) -> Iterator[Metric]:
        """For the registry."""
        total = np.cumsum(self._counts).tolist()
        bounds = [*map(str, _GAP_S), "+Inf"]
        text = "Time between two tokens of a request, as the HTTP side got them."
        yield HistogramMetricFamily(
            PREFIX + "inter_token_latency_seconds", text, list(zip(bounds, total, strict=True)), self._sum_s
        )


class EngineView(Collector):
    """The engine's counts at the moment of a scrape."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self.streams: Sequence[StreamState] = ()

    def collect(self) -> Iterator[Metric]:
        """For the registry."""
        stats = self._engine.stats()
        yield from _gauges(stats)
        yield from _totals(stats)
        yield _buffers(self.streams)


def _gauges(stats: EngineStats) -> Iterator[Metric]:
    usable, host = max(stats.num_blocks - 1, 1), max(stats.num_host_blocks - 1, 1)
    host_used = host - stats.num_free_host_blocks if stats.num_host_blocks else 0
    for name, text, value in (
        ("num_requests_running", "Requests on the device.", stats.num_running),
        ("num_requests_waiting", "Requests without KV: new ones, and preempted ones to recompute.", stats.num_waiting),
        ("num_requests_paused", "Requests whose KV is on the host.", stats.num_paused),
        ("num_requests_loading", "Requests whose KV is on its way back to the device.", stats.num_loading),
        ("kv_cache_usage_perc", "Share of the device's KV blocks in use, 0 to 1.", 1 - stats.num_free_blocks / usable),
        ("host_kv_cache_usage_perc", "Share of the host's KV blocks in use, 0 to 1.", host_used / host),
    ):
        yield GaugeMetricFamily(PREFIX + name, text, value)


def _totals(stats: EngineStats) -> Iterator[Metric]:
    yield CounterMetricFamily(PREFIX + "prompt_tokens", "Prompt tokens taken in.", stats.num_prompt_tokens)
    yield CounterMetricFamily(PREFIX + "generation_tokens", "Tokens generated.", stats.num_output_tokens)
    yield CounterMetricFamily(PREFIX + "num_preemptions", "Times a request left the device.", stats.num_preemptions)
    preemptions = CounterMetricFamily(
        PREFIX + "preemptions",
        "Times a request left the device: its KV kept on the host, or dropped.",
        labels=["reason"],
    )
    preemptions.add_metric(["offload"], stats.num_preemptions - stats.num_dropped)
    preemptions.add_metric(["recompute"], stats.num_dropped)
    yield preemptions
    moved = CounterMetricFamily(PREFIX + "kv_transfer_bytes", "KV moved between device and host.", labels=["direction"])
    moved.add_metric(["store"], stats.bytes_stored)
    moved.add_metric(["load"], stats.bytes_loaded)
    yield moved


def _buffers(streams: Sequence[StreamState]) -> Metric:
    """How much live readers have left to read, in seconds."""
    text = "Seconds of unread text of the streams now, by quantile over streams that have a reader and a first token."
    gauge = GaugeMetricFamily(PREFIX + "stream_buffer_seconds", text, labels=["quantile"])
    seconds = [s.time_to_empty_s for s in streams if s.time_to_empty_s is not None and s.ttft_s is not None]
    if seconds:
        for share in (0.0, 0.1, 0.5, 0.9, 1.0):
            gauge.add_metric([str(share)], float(np.quantile(seconds, share)))
    return gauge
