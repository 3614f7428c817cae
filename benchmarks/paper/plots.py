"""Figures of one experiment as PNG. Needs matplotlib (extra `bench`)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from benchmarks.paper.cases import Experiment
from benchmarks.paper.runs import Outcome
from benchmarks.paper.summary import Line

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_SHOWN = ("fcfs", "fcfs-chunked", "andes", "round-robin", "tokenflow", "tokenflow (share)")
_PAIR = ("fcfs", "tokenflow")
_CAPTION = "simulated"


def draw(folder: Path, experiment: Experiment, outcomes: Sequence[Outcome], lines: Sequence[Line]) -> list[str]:
    """Write the figures that the experiment asks for; their file names. Needs matplotlib."""
    runs = {
        outcome.case: outcome
        for outcome in outcomes
        if outcome.experiment == experiment.key and outcome.detail is not None
    }
    mine = [line for line in lines if line.experiment == experiment.key]
    names = []
    for kind in experiment.plots:
        name = f"{experiment.key}-{kind}.png"
        _DRAWERS[kind](runs, mine).savefig(folder / name, dpi=90, metadata={"Software": None})
        names.append(name)
    if experiment.section in {"Sensitivity", "Ablation"} or experiment.key == "load":
        name = f"{experiment.key}.png"
        _bars(runs, mine).savefig(folder / name, dpi=90, metadata={"Software": None})
        names.append(name)
    return names


def _figure(columns: int) -> tuple[Figure, Sequence[Axes]]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.2 * columns, 3.4), layout="constrained")
    axes = figure.subplots(1, columns, squeeze=False)[0]
    return figure, axes


def _label(axes: Axes, title: str, x: str, y: str) -> None:
    axes.set(title=f"{title} ({_CAPTION})", xlabel=x, ylabel=y)
    axes.title.set_fontsize(9)
    axes.grid(alpha=0.3)


def _ttft(runs: Mapping[str, Outcome], _: Sequence[Line]) -> Figure:
    figure, (axes,) = _figure(1)
    for case in _SHOWN:
        detail = runs[case].detail if case in runs else None
        if detail is not None:
            share = np.arange(1, len(detail.ttft_s) + 1) / len(detail.ttft_s)
            axes.step(detail.ttft_s, share, where="post", label=case)
    _label(axes, "Time to first token", "s", "share of requests")
    axes.set_xscale("symlog", linthresh=0.1)
    axes.legend(fontsize=7)
    return figure


def _throughput(_: Mapping[str, Outcome], lines: Sequence[Line]) -> Figure:
    return _bars({}, lines)


def _bars(_: Mapping[str, Outcome], lines: Sequence[Line]) -> Figure:
    """Raw and effective throughput, P99 TTFT and stall share of every case."""
    figure, axes = _figure(3)
    cases = [line.case for line in lines]
    place = np.arange(len(cases))
    for offset, metric in ((-0.2, "raw"), (0.2, "effective")):
        estimates = [line.metrics[metric] for line in lines]
        halves = np.nan_to_num([estimate.half for estimate in estimates])
        axes[0].barh(place + offset, [estimate.mean for estimate in estimates], 0.38, xerr=halves, label=metric)
    axes[0].legend(fontsize=7)
    axes[1].barh(place, [line.mean("ttft_p99_s") for line in lines])
    axes[2].barh(place, [line.mean("stall_share") for line in lines])
    for index, (title, unit) in enumerate(
        (("Throughput", "tokens/s"), ("P99 time to first token", "s"), ("Stall share", "stall / (stall + playback)"))
    ):
        _label(axes[index], title, unit, "")
        axes[index].set_yticks(place, cases if index == 0 else [""] * len(cases), fontsize=7)
        axes[index].invert_yaxis()
    return figure


def _queue(runs: Mapping[str, Outcome], _: Sequence[Line]) -> Figure:
    """Requests queued, running and paused over time."""
    cases = [case for case in _PAIR if case in runs]
    figure, axes = _figure(len(cases))
    for axis, case in zip(axes, cases, strict=True):
        detail = runs[case].detail
        moments = detail.moments if detail is not None else []
        times = [moment.time_s for moment in moments]
        axis.plot(times, [moment.num_waiting for moment in moments], label="queued")
        axis.plot(times, [moment.num_running for moment in moments], label="running")
        axis.plot(times, [moment.num_paused for moment in moments], label="paused")
        _label(axis, case, "s", "requests")
        axis.legend(fontsize=7)
    return figure


def _timelines(runs: Mapping[str, Outcome], _: Sequence[Line]) -> Figure:
    """Tokens of some requests over the time since their arrival, as in the paper's Fig. 18."""
    cases = [case for case in _PAIR if case in runs]
    figure, axes = _figure(len(cases))
    for axis, case in zip(axes, cases, strict=True):
        detail = runs[case].detail
        for times, counts in detail.timelines if detail is not None else []:
            axis.step(times, counts, where="post", linewidth=0.9)
        _label(axis, case, "s since arrival", "tokens")
    return figure


def _fans(runs: Mapping[str, Outcome], _: Sequence[Line]) -> Figure:
    """Tokens of every request since its first one, coloured by its reader's rate, as in the paper's Fig. 19."""
    cases = [case for case in _PAIR if case in runs]
    figure, axes = _figure(len(cases))
    for axis, case in zip(axes, cases, strict=True):
        detail = runs[case].detail
        fans = detail.fans if detail is not None else []
        rates = sorted({rate for rate, _, _ in fans})
        longest = max((times[-1] for _, times, _ in fans), default=0.0)
        for index, rate in enumerate(rates):
            for own, times, counts in fans:
                if own == rate:
                    axis.plot(times, counts, color=f"C{index}", linewidth=0.6, alpha=0.6)
            axis.plot(
                [0.0, longest], [0.0, rate * longest], color=f"C{index}", linestyle="--", label=f"{rate:g} tokens/s"
            )
        axis.set_ylim(0, max((counts[-1] for _, _, counts in fans), default=1))
        _label(axis, case, "s since the first token", "tokens")
        axis.legend(fontsize=7)
    return figure


_DRAWERS: Mapping[str, Callable[[Mapping[str, Outcome], Sequence[Line]], Figure]] = {
    "ttft": _ttft,
    "throughput": _throughput,
    "queue": _queue,
    "timelines": _timelines,
    "fans": _fans,
}
