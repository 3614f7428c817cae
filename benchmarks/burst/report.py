"""The table of a burst: every policy's medians and ranges over the repeats, the bounds, and ratios to fcfs."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from tfserve.engine.scheduling.qos import Served, fluid_effective_throughput, prefill_bound_s

Cell = dict[str, Any]
Pick = Callable[[Cell], float]

BASELINE = "fcfs"
SPECIAL = ("calibration", "prefill")
"""Cells that are no policy: fcfs before the rate is known, and the burst's prompts without answers."""


def _quality(name: str) -> Pick:
    return lambda cell: float(cell["summary"]["quality"]["report"][name])


def stall_share(cell: Cell) -> float:
    """In per cent of reading time."""
    return 100 * _quality("stall_share")(cell)


def preemptions(cell: Cell) -> float:
    """Per request, on average."""
    return float(cell["engine"]["num_preemptions"] / cell["summary"]["num_requests"])


def worst_preempted(cell: Cell) -> float:
    """Preemptions of the request that had most."""
    return float(cell["summary"]["preemptions"]["max"])


def mib(name: str) -> Pick:
    """Bytes moved one way, in MiB."""
    return lambda cell: float(cell["engine"][name] / 2**20)


COLUMNS: tuple[tuple[str, Pick], ...] = (
    ("TTFT mean, s", _quality("ttft_mean_s")),
    ("TTFT P50, s", _quality("ttft_p50_s")),
    ("TTFT P99, s", _quality("ttft_p99_s")),
    ("TBT P99, s", _quality("tbt_p99_s")),
    ("raw, tok/s", _quality("raw_throughput")),
    ("effective, tok/s", _quality("effective_throughput")),
    ("on time, tok/s", _quality("on_time_goodput")),
    ("stalls, s", _quality("stall_s")),
    ("stall share, %", stall_share),
    ("preemptions", preemptions),
    ("most preempted", worst_preempted),
    ("stored, MiB", mib("bytes_stored")),
    ("loaded, MiB", mib("bytes_loaded")),
    ("client CPU, s", lambda cell: float(cell["summary"]["client_cpu_s"])),
    ("failed", lambda cell: float(sum(cell["summary"]["failures"].values()))),
)
RATIOS = ("TTFT mean, s", "TTFT P99, s", "raw, tok/s", "effective, tok/s", "on time, tok/s")


def served(cell: Cell) -> list[Served]:
    """The cell's requests as the bounds need them: all at once, their lengths and rates; no token times."""
    return [Served(0.0, rate, np.zeros(output)) for _, output, rate in cell["lengths"]]


def fluid_bound(cell: Cell) -> float:
    """Effective tokens/s if the cell's own raw throughput were shared perfectly among its readers."""
    return fluid_effective_throughput(served(cell), _quality("raw_throughput")(cell))


def prefill_bound(prefill: Cell) -> float:
    """P99 TTFT of a server that did nothing but the prompts, from the run that did nothing else."""
    prompts = [prompt for prompt, _, _ in prefill["lengths"]]
    return prefill_bound_s([0.0] * len(prompts), prompts, sum(prompts) / prefill["summary"]["duration_s"])


def report(cells: Sequence[Cell]) -> str:
    """The tables, as text. Policies in order of first appearance; a ratio is formed within its repeat."""
    measured = [cell for cell in cells if cell["policy"] not in SPECIAL]
    policies = list(dict.fromkeys(cell["policy"] for cell in measured))
    prefills = {cell["repeat"]: cell for cell in cells if cell["policy"] == "prefill"}
    base = {cell["repeat"]: cell for cell in measured if cell["policy"] == BASELINE}
    speeds = [cell["summary"]["output_tokens_per_s"] for cell in cells if cell["policy"] == "calibration"]
    lines = [_line("fcfs that sets the rate, tok/s", speeds)]
    if prefills:
        lines.append(_line("bound of TTFT P99: prefill alone, s", [prefill_bound(cell) for cell in prefills.values()]))
    for policy in policies:
        own = [cell for cell in measured if cell["policy"] == policy]
        lines += ["", f"{policy}   ({len(own)} repeats, tokens/s a reader: " + _range(own) + ")"]
        lines += [_line(f"  {name}", [pick(cell) for cell in own]) for name, pick in COLUMNS]
        lines.append(_line("  effective / raw", [effective(cell) / raw(cell) for cell in own]))
        lines.append(_line("  effective / fluid bound", [effective(cell) / fluid_bound(cell) for cell in own]))
        near = [p99(cell) / prefill_bound(prefills[cell["repeat"]]) for cell in own if cell["repeat"] in prefills]
        lines.append(_line("  TTFT P99 / prefill bound", near))
        pairs = [(cell, base[cell["repeat"]]) for cell in own if cell["repeat"] in base]
        if policy != BASELINE and pairs:
            picks = dict(COLUMNS)
            for name in RATIOS:
                lines.append(
                    _line(f"  {name.split(',')[0]} / fcfs", [picks[name](a) / picks[name](b) for a, b in pairs])
                )
            lines.append(_line("  bound of effective / fcfs", [raw(a) / effective(b) for a, b in pairs]))
        lines += _classes(own)
    return "\n".join(lines)


raw = _quality("raw_throughput")
effective = _quality("effective_throughput")
p99 = _quality("ttft_p99_s")


def _classes(cells: Sequence[Cell]) -> list[str]:
    """Lines for each class of readers, the slowest first: its waits and stalls, and the speed that it read at.

    Each repeat sets its own rates, so it is a class's place in their order that is the same in all of them. A repeat
    in which a class failed whole is left out.
    """
    lines = []
    classes = [list(cell["summary"]["quality_by_rate"].items()) for cell in cells]
    most = max(map(len, classes))
    for place, own in enumerate(zip(*(each for each in classes if len(each) == most), strict=True)):
        rates = [float(rate) for rate, _ in own]
        reports = [quality["report"] for _, quality in own]
        shares = [report["stall_share"] for report in reports]
        lines += [
            _line(f"  readers {place + 1}: asked, tok/s", rates),
            _line("    read, tok/s", [rate * (1 - share) for rate, share in zip(rates, shares, strict=True)]),
            _line("    stall share, %", [100 * share for share in shares]),
            _line("    TTFT P99, s", [report["ttft_p99_s"] for report in reports]),
        ]
    return lines


def _range(cells: Sequence[Cell]) -> str:
    return ", ".join(f"{cell['rate']:.2f}" for cell in cells)


def _line(name: str, values: Sequence[float]) -> str:
    """Median and range; n/a where nothing was measured."""
    if not values:
        return f"{name:<42}{'n/a':>10}"
    return f"{name:<42}{statistics.median(values):>10.3f}  [{min(values):.3f} .. {max(values):.3f}]"
