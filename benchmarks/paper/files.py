"""The result files of a run of the experiments: tables as CSV and JSON, and the wall-clock times in a separate file."""

from __future__ import annotations

import csv
import io
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from benchmarks.paper.cases import Experiment
from benchmarks.paper.hardware import Profile
from benchmarks.paper.runs import Outcome, Task
from benchmarks.paper.summary import METRICS, RATIOS, Line

_LONGEST = 30
"""Cases that timing.json names."""

_RUN_FIELDS = tuple(field for field in Outcome.__struct_fields__ if field not in {"classes", "detail"})


def write_results(
    folder: Path,
    experiments: Sequence[Experiment],
    outcomes: Sequence[Outcome],
    lines: Sequence[Line],
    timing: Mapping[str, Any],
) -> None:
    """runs.csv, table.csv, results.json (profiles, cases, lines), series.json (what is plotted), timing.json.

    All but timing.json are a function of the seeds.
    """
    folder.mkdir(parents=True, exist_ok=True)
    runs = [[_plain(getattr(outcome, field)) for field in _RUN_FIELDS] for outcome in outcomes]
    _write_csv(folder / "runs.csv", _RUN_FIELDS, runs)
    _write_csv(folder / "table.csv", _table_head(), [_table_row(line) for line in lines])
    profiles = {case.profile.name: case.profile for experiment in experiments for case in experiment.cases}
    results = {
        "simulated": True,
        "profiles": [describe(profile) for profile in profiles.values()],
        "experiments": [_described(experiment) for experiment in experiments],
        "lines": lines,
    }
    _write_json(folder / "results.json", results)
    series = {f"{o.experiment}/{o.case}": o.detail for o in outcomes if o.detail is not None}
    (folder / "series.json").write_bytes(msgspec.json.encode(series) + b"\n")
    _write_json(folder / "timing.json", timing)


def describe(profile: Profile) -> dict[str, Any]:
    """A profile and its derived numbers."""
    return {
        **msgspec.to_builtins(profile),
        "kv_tokens": profile.kv_tokens,
        "host_kv_tokens": int(profile.host_kv_bytes / profile.model.kv_bytes_per_token),
        "weight_bytes": profile.model.weight_bytes,
    }


def timing_of(tasks: Sequence[Task], cpu_s: Sequence[float], wall_s: float, workers: int) -> dict[str, Any]:
    """How long it took: the one file that differs from run to run."""
    by_experiment: defaultdict[str, float] = defaultdict(float)
    by_case: defaultdict[str, float] = defaultdict(float)
    for task, seconds in zip(tasks, cpu_s, strict=True):
        by_experiment[task.experiment] += seconds
        by_case[f"{task.experiment}: {task.case.name}"] += seconds
    return {
        "wall_s": wall_s,
        "cpu_s": sum(cpu_s),
        "workers": workers,
        "runs": len(tasks),
        "by_experiment": by_experiment,
        "longest_cases": dict(sorted(by_case.items(), key=lambda item: -item[1])[:_LONGEST]),
    }


def _described(experiment: Experiment) -> dict[str, Any]:
    cases = [
        {**msgspec.to_builtins(case), "profile": case.profile.name, "settings": dict(case.settings)}
        for case in experiment.cases
    ]
    fields = ("key", "section", "title", "claim", "seeds")
    return {**{field: getattr(experiment, field) for field in fields}, "cases": cases}


def _table_head() -> list[str]:
    spread = [f"{name}{suffix}" for name in METRICS for suffix in ("", "_ci95")]
    ratios = [f"{name}_ratio{suffix}" for name in RATIOS for suffix in ("", "_ci95")]
    bounds = ["capacity", "demand", "ttft_p99_bound_s", "fluid", "effective_ratio_bound"]
    return ["experiment", "case", "seeds", *spread, *ratios, *bounds]


def _table_row(line: Line) -> list[object]:
    row: list[object] = [line.experiment, line.case, line.seeds]
    for name in METRICS:
        row += [_plain(line.metrics[name].mean), _plain(line.metrics[name].half)]
    for name in RATIOS:
        ratio = line.ratios.get(name)
        row += [_plain(ratio.mean), _plain(ratio.half)] if ratio else ["", ""]
    row += [_plain(line.bounds[name]) for name in ("capacity", "demand", "ttft_p99_s", "fluid")]
    return [*row, _plain(line.effective_bound)]


def _plain(value: object) -> object:
    """Six significant digits; empty if not measured."""
    if value is None or value != value:  # noqa: PLR0124 - NaN
        return ""
    return f"{value:.6g}" if isinstance(value, float) else value


def _write_csv(path: Path, head: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(head)
    writer.writerows(rows)
    path.write_text(text.getvalue())


def _write_json(path: Path, value: object) -> None:
    path.write_bytes(msgspec.json.format(msgspec.json.encode(value), indent=1) + b"\n")
