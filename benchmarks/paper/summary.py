"""Runs of several seeds condensed: means, intervals, ratios over the baseline, and the bounds beside them."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
import numpy as np

from benchmarks.paper.bounds import RowBounds, row_bounds
from benchmarks.paper.cases import Case, Experiment
from benchmarks.paper.runs import Outcome, ReaderClass

_T_95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
"""Student's t for 95 %, two-sided, by degrees of freedom from 1."""

METRICS = (
    "raw",
    "effective",
    "on_time",
    "ttft_mean_s",
    "ttft_p50_s",
    "ttft_p99_s",
    "tbt_p99_s",
    "stall_s",
    "stall_share",
    "preemptions",
    "refused",
    "stored_gb",
    "loaded_gb",
    "duration_s",
    "fluid_own",
)
"""Fields of Outcome that are averaged."""

RATIOS = ("raw", "effective", "on_time", "ttft_mean_s", "ttft_p99_s")
"""Metrics that are also divided by the baseline's of the same seed."""


class Estimate(msgspec.Struct, frozen=True):
    """A mean over seeds and the half-width of its 95 % interval; NaN of one seed alone."""

    mean: float
    half: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Estimate:
        """Over the seeds' values."""
        n = len(values)
        if n < 2:
            return cls(float(values[0]), float("nan"))
        half = _T_95[min(n - 2, len(_T_95) - 1)] * float(np.std(values, ddof=1)) / n**0.5
        return cls(float(np.mean(values)), half)


class Line(msgspec.Struct, frozen=True, kw_only=True):
    """One case over its seeds. `effective_bound` is the most that its effective ratio could be."""

    experiment: str
    case: str
    seeds: int
    metrics: dict[str, Estimate]
    ratios: dict[str, Estimate]
    bounds: dict[str, float]
    effective_bound: float | None
    classes: list[ReaderClass]

    def mean(self, metric: str) -> float:
        """The mean of one of METRICS."""
        return self.metrics[metric].mean

    def ratio(self, metric: str) -> float | None:
        """The mean ratio over the baseline of one of RATIOS; None for the baseline itself."""
        estimate = self.ratios.get(metric)
        return None if estimate is None else estimate.mean

    @property
    def is_feasible(self) -> bool:
        """True where the readers' demand is within the capacity, on average over seeds."""
        return self.bounds["demand"] <= self.bounds["capacity"]


def summarize(experiments: Sequence[Experiment], outcomes: Sequence[Outcome]) -> list[Line]:
    """A line for each case that has run, in the order of the experiments."""
    lines = []
    for experiment in experiments:
        by_case: dict[str, list[Outcome]] = {}
        for outcome in outcomes:
            if outcome.experiment == experiment.key:
                by_case.setdefault(outcome.case, []).append(outcome)
        known: dict[bytes, dict[str, float]] = {}
        for case in experiment.cases:
            if case.name in by_case:
                runs = by_case[case.name]
                lines.append(_line(case, runs, by_case.get(case.baseline or "", []), _bounds(case, runs, known)))
    return lines


def _line(case: Case, runs: list[Outcome], baseline: list[Outcome], bounds: dict[str, float]) -> Line:
    base = {run.seed: run for run in baseline}
    pairs = [(run, base[run.seed]) for run in runs if run.seed in base]
    ratios: dict[str, Estimate] = {}
    effective_bound = None
    if pairs and case.name != case.baseline:
        for name in RATIOS:
            ratios[name] = Estimate.of([_ratio(getattr(run, name), getattr(other, name)) for run, other in pairs])
        effective_bound = float(np.mean([_ratio(run.raw, other.effective) for run, other in pairs]))
    return Line(
        experiment=runs[0].experiment,
        case=case.name,
        seeds=len(runs),
        metrics={name: Estimate.of([float(getattr(run, name)) for run in runs]) for name in METRICS},
        ratios=ratios,
        bounds=bounds,
        effective_bound=effective_bound,
        classes=runs[0].classes,
    )


def _ratio(value: float, base: float) -> float:
    return value / base if base else float("nan")


def _bounds(case: Case, runs: Sequence[Outcome], known: dict[bytes, dict[str, float]]) -> dict[str, float]:
    """Means over the seeds of a case's bounds; cases of one workload and profile share them."""
    seeds = [run.seed for run in runs]
    key = msgspec.json.encode((case.profile, case.workload, seeds))
    if key not in known:
        rows = [row_bounds(case, case.workload.requests(seed)) for seed in seeds]
        known[key] = {
            field: float(np.mean([getattr(row, field) for row in rows])) for field in RowBounds.__struct_fields__
        }
    return known[key]
