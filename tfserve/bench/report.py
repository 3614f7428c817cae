"""Results of a run: statistics over its request records, as a table and as JSON."""

from __future__ import annotations

import collections
import datetime
import math
import os
import platform
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import aiohttp
import msgspec
import numpy as np

import tfserve
from tfserve.bench.client import RequestRecord
from tfserve.bench.scoring import (
    QOS_ALPHA,
    QOS_STALL_PENALTY,
    QOS_TAU_TOKENS,
    QOS_TTFT_PENALTY,
    Quality,
    quality,
    quality_by_rate,
)
from tfserve.errors import TfserveError


class Spread(msgspec.Struct, frozen=True):
    """Mean, percentiles (linear interpolation) and maximum of one quantity."""

    mean: float
    p50: float
    p99: float
    max: float

    @classmethod
    def of(cls, values: Iterable[float | None]) -> Spread | None:
        """Of the measured values; None without any."""
        measured = [value for value in values if value is not None]
        if not measured:
            return None
        p50, p99 = np.percentile(measured, (50, 99))
        return cls(float(np.mean(measured)), float(p50), float(p99), max(measured))


class Summary(msgspec.Struct, frozen=True, kw_only=True):
    """One run in numbers; None is "not measured". Times in seconds; latencies and rates count completed requests only.

    `duration_s` is from the first arrival to the last token. `unplaced_tokens` are tokens that the server counted but
    that had no chunk of their own, so their arrival is unknown: `tbt` is the gap between chunks, `tpot` each request's
    mean time per token, which does not depend on the chunking. `surplus_chunks` exceed the server's count of tokens, so
    that count may be wrong. `send_lag` is the delay between the planned and the actual send. `quality` needs a reading
    rate for every request; `quality_by_rate` is empty unless there are several. `preemptions` are per request.
    """

    num_requests: int
    num_completed: int
    failures: dict[str, int]
    duration_s: float | None
    prompt_tokens: int | None
    output_tokens: int
    failed_output_tokens: int
    unplaced_tokens: int
    surplus_chunks: int
    counted_by: str
    output_tokens_per_s: float | None
    requests_per_s: float | None
    ttft: Spread | None
    tbt: Spread | None
    tpot: Spread | None
    e2e: Spread | None
    send_lag: Spread | None
    quality: Quality | None
    quality_by_rate: dict[str, Quality]
    preemptions: Spread | None
    client_cpu_s: float
    client_cpu_share: float

    @property
    def num_failed(self) -> int:
        """Requests that did not complete, of every kind."""
        return sum(self.failures.values())


def summarize(records: Sequence[RequestRecord], wall_s: float, cpu_s: float) -> Summary:
    """Summarise a run that took `wall_s`, and `cpu_s` of this process's CPU time."""
    completed = [record for record in records if record.error is None]
    spoken = [record for record in completed if record.chunks]
    output_tokens = sum(record.num_tokens for record in completed)
    duration_s = None
    if spoken:
        duration_s = max(record.chunks[-1][0] for record in spoken) - min(record.arrival_s for record in records)
    prompts = [record.prompt_tokens for record in completed if record.prompt_tokens is not None]
    return Summary(
        num_requests=len(records),
        num_completed=len(completed),
        failures=dict(collections.Counter(record.error for record in records if record.error)),
        duration_s=duration_s,
        prompt_tokens=sum(prompts) if prompts and len(prompts) == len(completed) else None,
        output_tokens=output_tokens,
        failed_output_tokens=sum(record.num_tokens for record in records if record.error),
        unplaced_tokens=sum(max(record.num_tokens - record.placed_tokens, 0) for record in completed),
        surplus_chunks=sum(max(record.placed_tokens - record.num_tokens, 0) for record in completed),
        counted_by=_counted_by(completed),
        output_tokens_per_s=output_tokens / duration_s if duration_s else None,
        requests_per_s=len(completed) / duration_s if duration_s else None,
        ttft=Spread.of(record.ttft_s for record in completed),
        tbt=Spread.of(gap for record in completed for gap in record.gaps_s),
        tpot=Spread.of(record.tpot_s for record in completed),
        e2e=Spread.of(record.end_s - record.sent_s for record in completed),
        send_lag=Spread.of(record.sent_s - record.arrival_s for record in records),
        quality=quality(records),
        quality_by_rate=quality_by_rate(records),
        preemptions=Spread.of(record.num_preemptions for record in completed),
        client_cpu_s=cpu_s,
        client_cpu_share=cpu_s / wall_s,
    )


def _counted_by(completed: Sequence[RequestRecord]) -> str:
    with_usage = sum(record.output_tokens is not None for record in completed)
    if with_usage == len(completed):
        return "usage"
    return "chunks" if with_usage == 0 else "usage, or chunks where the server gave none"


def environment() -> dict[str, Any]:
    """The client's machine and versions."""
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "platform": platform.platform(),
        "cpu_count": os.cpu_count(),
        "python": platform.python_version(),
        "tfserve": tfserve.__version__,
        "aiohttp": aiohttp.__version__,
    }


def write_json(path: Path, value: object, option: str) -> None:
    """Write a value as indented JSON. Raises TfserveError naming `option`, the command's, if that cannot be done."""
    with _writing(path, option):
        path.write_bytes(msgspec.json.format(msgspec.json.encode(value), indent=1) + b"\n")


def require_writable(path: Path) -> None:
    """Raise TfserveError if `write_result` could not write to the path. Creates an empty file if there is none."""
    with _writing(path, "--output"):
        path.open("ab").close()


def write_result(path: Path, config: dict[str, Any], summary: Summary, records: Sequence[RequestRecord]) -> None:
    """Write config, environment, summary and every request's record as one JSON object. Raises TfserveError."""
    head = {"config": config, "environment": environment(), "summary": summary}
    # Indented, but one line per request: with a line per chunk the file would be ten times as long.
    opened = msgspec.json.format(msgspec.json.encode(head), indent=1).removesuffix(b"\n}")
    lines = b",\n".join(msgspec.json.encode(record) for record in records)
    with _writing(path, "--output"):
        path.write_bytes(opened + b',\n "requests": [\n' + lines + b"\n]}\n")


@contextmanager
def _writing(path: Path, option: str) -> Iterator[None]:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield
    except OSError as error:
        raise TfserveError(f"{option}: cannot write {path}: {error.strerror}; name a writable file") from None


def table(summary: Summary) -> str:
    """The summary as text; n/a is a number that was not measured."""
    failures = "".join(f", {count} {kind}" for kind, count in sorted(summary.failures.items()))
    lines = [
        f"{'requests':<26}{summary.num_completed} completed, {summary.num_failed} failed{failures}",
        f"{'duration':<26}{_number(summary.duration_s, 's')}   first arrival to last token",
        f"{'prompt tokens':<26}{_number(summary.prompt_tokens)}",
        f"{'output tokens':<26}{summary.output_tokens} (counted by {summary.counted_by})",
        f"{'output throughput':<26}{_number(summary.output_tokens_per_s, 'tokens/s')}",
        f"{'request throughput':<26}{_number(summary.requests_per_s, 'requests/s')}",
        "",
        f"{'':<26}{'mean':>10}{'P50':>10}{'P99':>10}{'max':>10}",
        _row("time to first token, ms", summary.ttft, 1e3),
        _row("time between chunks, ms", summary.tbt, 1e3),
        _row("time per token, ms", summary.tpot, 1e3),
        _row("end to end, s", summary.e2e, 1),
        _row("sent later than due, ms", summary.send_lag, 1e3),
        _row("preemptions per request", summary.preemptions, 1),
        "",
        *_quality_lines(summary),
        "",
        f"{'client CPU':<26}{summary.client_cpu_s:.2f} s, {summary.client_cpu_share:.1%} of one core",
    ]
    if summary.failed_output_tokens:
        lines.append(f"{summary.failed_output_tokens} tokens of failed requests are not counted above")
    if summary.unplaced_tokens:
        share = summary.unplaced_tokens / summary.output_tokens
        lines.append(
            f"{share:.1%} of the tokens came without a chunk of their own: counted, but in no time between chunks"
        )
    if summary.surplus_chunks:
        lines.append(f"{summary.surplus_chunks} more chunks came than tokens were counted: doubt the server's usage")
    return "\n".join(lines)


def _quality_lines(summary: Summary) -> list[str]:
    """Scores of all requests, and of each class of readers if there are several."""
    columns = {"all": summary.quality, **{f"at {rate}/s": each for rate, each in summary.quality_by_rate.items()}}
    rows: list[tuple[str, Callable[[Quality], float]]] = [
        ("raw throughput, tok/s", lambda q: q.report.raw_throughput),
        ("effective, tok/s", lambda q: q.report.effective_throughput),
        ("on time, tok/s", lambda q: q.report.on_time_goodput),
        ("stalls, s", lambda q: q.report.stall_s),
        ("stall share, %", lambda q: 100 * q.report.stall_share),
        ("QoS *", lambda q: q.qos),
    ]
    lines = [f"{'':<26}" + "".join(f"{name:>10}" for name in columns)]
    for name, pick in rows:
        values = (math.nan if q is None else pick(q) for q in columns.values())
        lines.append(
            f"{name:<26}" + "".join(f"{'n/a' if math.isnan(value) else f'{value:.2f}':>10}" for value in values)
        )
    if summary.quality is not None:
        lines.append(
            f"* tau {QOS_TAU_TOKENS:g} tokens, alpha {QOS_ALPHA:g}, a second of waiting costs "
            f"{QOS_TTFT_PENALTY:g} token before the first one and {QOS_STALL_PENALTY:g} after it"
        )
    return lines


def _number(value: float | None, unit: str = "") -> str:
    if value is None:
        return "n/a"
    return f"{value} {unit}".rstrip() if isinstance(value, int) else f"{value:.2f} {unit}".rstrip()


def _row(name: str, spread: Spread | None, scale: float) -> str:
    if spread is None:
        return f"{name:<26}" + f"{'n/a':>10}" * 4
    values = (spread.mean, spread.p50, spread.p99, spread.max)
    return f"{name:<26}" + "".join(f"{value * scale:>10.2f}" for value in values)
