"""The pictures of docs/scheduling.md, from a real burst's result files.

    python -m benchmarks.burst.run --policies fcfs,tokenflow --timelines benchmarks/results/burst_timelines.json
    python -m benchmarks.burst.plots

`burst-buffers.png`: every reader's unread text over time, a panel per policy; `burst-ttft.png`: the times to first
token; both of one repeat. `burst-summary.png`: medians and ranges over all repeats. Needs the extra bench.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from benchmarks.burst.kept_timelines import KeptCell, TimelineFile
from benchmarks.burst.report import COLUMNS, SPECIAL, Cell
from tfserve.arrays import Floats
from tfserve.bench.plots import save_figure
from tfserve.engine.scheduling.qos import Served, reading_starts

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.image import AxesImage

RESULTS = Path(__file__).parents[1] / "results"
IMAGES = Path(__file__).parents[2] / "docs" / "images"

SHOWN = ("TTFT P99, s", "effective, tok/s", "raw, tok/s", "stall share, %")
FULL_S = 20.0
"""Buffers of more seconds have the same colour."""

FRAMES = 600
_ROUNDING = 1e-6
WAITS, STALLS = "lightgrey", "red"


def unread_s(request: Served, at_s: Floats) -> Floats:
    """Seconds of unread text at each moment; NaN before the first token and once everything has been read.

    0 is a stall.
    """
    if not len(request.token_s):
        return np.full(len(at_s), np.nan)
    token_s = 1 / request.rate
    starts = reading_starts(request)
    # A token is read at a constant speed; between two tokens the reader waits.
    moments = np.stack([starts, starts + token_s], axis=1).ravel()
    counts = np.stack([np.arange(len(starts)), np.arange(1, len(starts) + 1)], axis=1).ravel()
    unread = np.searchsorted(request.token_s, at_s, side="right") - np.interp(at_s, moments, counts)
    reads = (at_s >= starts[0]) & (at_s < moments[-1])
    return np.where(reads, np.where(unread < _ROUNDING, 0.0, unread) * token_s, np.nan)


def waits(request: Served, at_s: Floats) -> npt.NDArray[np.bool_]:
    """True at each moment before the first token."""
    first_s = request.token_s[0] if len(request.token_s) else np.inf
    return at_s < first_s


def draw_buffers(figure: Figure, cells: Sequence[KeptCell]) -> None:
    """A panel for each policy, a line for each reader in order of arrival, colour for unread text."""
    from matplotlib.colors import ListedColormap
    from matplotlib.patches import Patch

    runs = [[stream.served() for stream in cell.streams] for cell in cells]
    begin_s = [min(request.arrival_s for request in run) for run in runs]
    end_s = max(_read_by(request) - begin for run, begin in zip(runs, begin_s, strict=True) for request in run)
    panels = figure.subplots(1, len(cells), sharey=True, squeeze=False)[0]
    images: list[AxesImage] = []
    for axes, cell, run, begin in zip(panels, cells, runs, begin_s, strict=True):
        at_s = begin + np.linspace(0, end_s, FRAMES)
        grid = np.array([unread_s(request, at_s) for request in run])
        place: dict[str, Any] = {
            "extent": (0, end_s, len(run), 0),
            "aspect": "auto",
            "interpolation": "nearest",
        }
        waiting = np.array([waits(request, at_s) for request in run])
        stalled = grid == 0
        images.append(axes.imshow(grid, vmin=0, vmax=FULL_S, cmap="viridis", **place))
        for where, colour in ((waiting, WAITS), (stalled, STALLS)):
            axes.imshow(np.where(where, 0.0, np.nan), cmap=ListedColormap([colour]), **place)
        axes.set(title=f"{cell.policy}, repeat {cell.repeat}", xlabel="time, s")
    panels[0].set_ylabel("reader")
    names = ((WAITS, "waits for the first token"), (STALLS, "nothing to read"))
    handles = [Patch(color=colour, label=name) for colour, name in names]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles))
    figure.colorbar(images[0], ax=list(panels), label="unread, seconds at the reader's rate", extend="max")


def _read_by(request: Served) -> float:
    """The time at which all text has been read."""
    return float(reading_starts(request)[-1] + 1 / request.rate) if len(request.token_s) else request.arrival_s


def draw_ttft(figure: Figure, cells: Sequence[KeptCell]) -> None:
    """Which share of the readers had something to read after how many seconds, a line for each policy."""
    axes = figure.add_subplot()
    for cell in cells:
        requests = [stream.served() for stream in cell.streams]
        first_s = sorted(float(r.token_s[0]) - r.arrival_s for r in requests if len(r.token_s))
        shares = np.arange(len(first_s) + 1) / len(requests)
        axes.step([0.0, *first_s], shares, where="post", label=cell.policy)
    axes.set(xlabel="time to first token, s", ylabel="share of readers", ylim=(0, 1.02), xlim=(0, None))
    axes.grid(alpha=0.3)
    axes.legend()


def draw_summary(figure: Figure, cells: Sequence[Cell]) -> None:
    """A panel for each of SHOWN, a bar for each policy: the median over the repeats, with their range."""
    picks = dict(COLUMNS)
    measured: dict[str, list[Cell]] = {}
    for cell in cells:
        if cell["policy"] not in SPECIAL:
            measured.setdefault(cell["policy"], []).append(cell)
    panels = figure.subplots(1, len(SHOWN), sharey=True)
    for axes, name in zip(panels, SHOWN, strict=True):
        _bars(axes, {policy: [picks[name](cell) for cell in own] for policy, own in measured.items()}, name)
    panels[0].invert_yaxis()


def _bars(axes: Axes, values: Mapping[str, Sequence[float]], name: str) -> None:
    medians = [statistics.median(each) for each in values.values()]
    below = [median - min(each) for median, each in zip(medians, values.values(), strict=True)]
    above = [max(each) - median for median, each in zip(medians, values.values(), strict=True)]
    labels = [f"{policy} ({len(each)})" for policy, each in values.items()]
    colours = [f"C{index % 10}" for index in range(len(labels))]
    axes.barh(labels, medians, xerr=[below, above], color=colours, capsize=3)
    axes.set(title=name)
    axes.grid(alpha=0.3, axis="x")


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--results", type=Path, default=RESULTS / "burst.json", help="written by benchmarks.burst.run")
    add("--timelines", type=Path, default=RESULTS / "burst_timelines.json", help="written by its --timelines")
    add("--beside", type=lambda text: text.split(","), default=["fcfs", "tokenflow"], help="policies of burst-buffers")
    add("--out", type=Path, default=IMAGES)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    cells = json.loads(args.results.read_text())["cells"]
    save_figure(lambda figure: draw_summary(figure, cells), args.out / "burst-summary.png", (13, 3.5))
    kept = {cell.policy: cell for cell in TimelineFile(args.timelines).read()}
    missing = [policy for policy in args.beside if policy not in kept]
    if missing:
        raise SystemExit(
            f"{args.timelines} has no {', '.join(missing)}: run benchmarks.burst.run with --timelines, or see --beside"
        )
    beside = [kept[policy] for policy in args.beside]
    save_figure(lambda figure: draw_buffers(figure, beside), args.out / "burst-buffers.png", (13, 5))
    save_figure(lambda figure: draw_ttft(figure, list(kept.values())), args.out / "burst-ttft.png", (8, 3.5))


if __name__ == "__main__":
    main()
