"""`tfserve bench compare A.json B.json`: two results of `bench serve` side by side."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import msgspec

from tfserve.errors import NOT_JSON, TfserveError
from tfserve.misfit import why_not_json

_ROWS: tuple[tuple[str, str], ...] = (
    ("completed", "num_completed"),
    ("output throughput, tok/s", "output_tokens_per_s"),
    ("request throughput, /s", "requests_per_s"),
    ("TTFT mean, s", "ttft.mean"),
    ("TTFT P50, s", "ttft.p50"),
    ("TTFT P99, s", "ttft.p99"),
    ("time between chunks P50, s", "tbt.p50"),
    ("time between chunks P99, s", "tbt.p99"),
    ("time per token mean, s", "tpot.mean"),
    ("end to end P50, s", "e2e.p50"),
    ("end to end P99, s", "e2e.p99"),
    ("effective, tok/s", "quality.report.effective_throughput"),
    ("on time, tok/s", "quality.report.on_time_goodput"),
    ("stalls, s", "quality.report.stall_s"),
    ("stall share", "quality.report.stall_share"),
    ("QoS", "quality.qos"),
    ("preemptions per request", "preemptions.mean"),
    ("client CPU, s", "client_cpu_s"),
)

_MAX = 1e300
"""A larger figure is not valid, nor are NaN and infinity."""

_WORKLOAD = (
    "endpoint",
    "temperature",
    "ignore_eos",
    "dataset",
    "num_prompts",
    "input_len",
    "max_tokens",
    "reference_len",
    "request_rate",
    "seed",
)
"""Settings that must be equal to compare two servers. Rates may differ: some servers do not get any."""


def bench_compare(args: argparse.Namespace) -> int:
    """Print B's numbers divided by A's. Raises TfserveError for a file that is not a result."""
    print(comparison(read_result(args.a), read_result(args.b)))
    return 0


class Result(msgspec.Struct, frozen=True, kw_only=True):
    """The part of a result file of `bench serve` that is compared."""

    config: dict[str, Any]
    summary: dict[str, Any]
    requests: list[dict[str, Any]] = []


def read_result(path: Path) -> Result:
    """Read a result file of `bench serve`. Raises TfserveError if it is not one."""
    try:
        data = path.read_bytes()
        return msgspec.json.decode(data, type=Result)
    except OSError as error:
        raise TfserveError(
            f"cannot read {path}: {error.strerror}; give a file written by bench serve --output"
        ) from None
    except NOT_JSON:
        reason = why_not_json(data, Result)
        raise TfserveError(f"{path} is no result of bench serve ({reason}); give a file of its --output") from None


def comparison(a: Result, b: Result) -> str:
    """A line per quantity: A, B and B/A; n/a where a side did not measure it or A is 0."""
    lines = [f"{'':<28}{'A':>12}{'B':>12}{'B / A':>10}"]
    for name, where in _ROWS:
        left, right = _find(a.summary, where), _find(b.summary, where)
        # A stall as short as a rounding error counts as 0.
        ratio = None if left is None or right is None or not round(left, 6) else right / left
        lines.append(f"{name:<28}{_show(left):>12}{_show(right):>12}{_show(ratio):>10}")
    differing = [key for key in _WORKLOAD if a.config.get(key) != b.config.get(key)]
    lines += [f"not the same workload: {key} {a.config.get(key)!r} and {b.config.get(key)!r}" for key in differing]
    rates = [{str(request.get("rate")) for request in result.requests} for result in (a, b)]
    if rates[0] != rates[1]:
        lines.append("not scored at the same reading rates")
    return "\n".join(lines)


def _find(tree: Any, where: str) -> float | None:
    for key in where.split("."):
        tree = tree.get(key) if isinstance(tree, dict) else None
    return tree if isinstance(tree, int | float) and abs(tree) < _MAX else None


def _show(value: float | None) -> str:
    return "n/a" if value is None else f"{value:.3f}"
