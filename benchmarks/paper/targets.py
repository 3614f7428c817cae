"""Targets of tokenflow in the eight set-ups, and where it misses them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import msgspec

from benchmarks.paper.summary import Line

_SETUPS = tuple(f"{device}-{row}" for device in ("4090", "h200") for row in "abcd")
_BURSTS = tuple(key for key in _SETUPS if key[-1] in "ab")


class Target(msgspec.Struct, frozen=True):
    """A target, the number of set-ups that reach it, and the ones that miss it."""

    text: str
    kept: int
    of: int
    misses: list[str]

    @property
    def verdict(self) -> str:
        """For the page."""
        return f"{self.kept} of {self.of}"


def targets(lines: Sequence[Line]) -> list[Target]:
    """Every target, over the set-ups that have run."""
    found = {(line.experiment, line.case): line for line in lines if line.experiment in _SETUPS}
    flow = [line for (_, case), line in found.items() if case == "tokenflow"]
    plain = {experiment: line for (experiment, case), line in found.items() if case == "fcfs"}
    capped = [line for (_, case), line in found.items() if case == "tokenflow, capped"]
    fits = [line for line in flow if line.is_feasible]
    relaxed = [line for line in flow if line.bounds["demand"] <= 0.9 * line.bounds["capacity"]]
    return [
        _every("effective >= 90 % of the fluid bound (constant capacity)", flow, _of_fluid, plain, least=0.9),
        _every("the same with generate_ahead_s", capped, _of_fluid, least=0.9),
        _every("effective >= 90 % of its own tokens perfectly shared", flow, _of_own, plain, least=0.9),
        _every("P99 TTFT <= 1.3x the prefill bound, demand within capacity", fits, _of_prefill, plain, most=1.3),
        _every("raw >= 0.98x fcfs", flow, lambda line: line.ratio("raw") or 0.0, least=0.98),
        _every("stall share <= 1 %, demand <= 0.9 capacity", relaxed, _stalls, plain, most=0.01),
        _every("preemptions per request <= 10", flow, lambda line: line.mean("preemptions"), most=10),
        _every(
            "effective / raw >= 0.9 with generate_ahead_s",
            capped,
            lambda line: line.mean("effective") / line.mean("raw"),
            least=0.9,
        ),
        _best("best row: effective at least 1.825x fcfs", flow, "effective", least=1.825),
        _best(
            "best burst: P99 TTFT at most 0.198x fcfs",
            [line for line in flow if line.experiment in _BURSTS],
            "ttft_p99_s",
            most=0.198,
        ),
    ]


def _of_fluid(line: Line) -> float:
    return line.mean("effective") / line.bounds["fluid"]


def _of_own(line: Line) -> float:
    return line.mean("effective") / line.mean("fluid_own")


def _of_prefill(line: Line) -> float:
    return line.mean("ttft_p99_s") / line.bounds["ttft_p99_s"]


def _stalls(line: Line) -> float:
    return line.mean("stall_share")


def _every(
    text: str,
    lines: Sequence[Line],
    value: Callable[[Line], float],
    plain: Mapping[str, Line] | None = None,
    *,
    least: float = float("-inf"),
    most: float = float("inf"),
) -> Target:
    """A line that misses it is named, with the value of fcfs if `plain` gives one."""
    misses = []
    for line in lines:
        if not least <= value(line) <= most:
            fcfs = plain.get(line.experiment) if plain else None
            beside = f" (fcfs {value(fcfs):.3g})" if fcfs else ""
            misses.append(f"{line.experiment} {value(line):.3g}{beside}")
    return Target(text, len(lines) - len(misses), len(lines), misses)


def _best(
    text: str, lines: Sequence[Line], metric: str, *, least: float = float("-inf"), most: float = float("inf")
) -> Target:
    """One line that reaches it is enough."""
    ratios = {line.experiment: ratio for line in lines if (ratio := line.ratio(metric)) is not None}
    kept = any(least <= ratio <= most for ratio in ratios.values())
    said = [f"{key} {ratio:.3g}" for key, ratio in ratios.items()]
    return Target(text, int(kept), int(bool(ratios)), [] if kept else said)
