"""Pictures of a run. matplotlib is an extra (`bench`), imported only when something is drawn."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from tfserve.bench.client import RequestRecord
from tfserve.bench.scoring import token_times
from tfserve.errors import TfserveError
from tfserve.install_hint import install_command

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def ttft_cdf(records: Sequence[RequestRecord], path: Path) -> None:
    """The share of requests with a first token over time. Raises TfserveError."""
    waits = sorted(record.ttft_s for record in records if record.error is None and record.ttft_s is not None)

    def draw(axes: Axes) -> None:
        axes.step([0.0, *waits], np.linspace(0.0, 1.0, len(waits) + 1), where="post")
        axes.set(xlabel="time to first token, s", ylabel="share of requests", ylim=(0, 1.02), xlim=(0, None))

    _save(draw, path, f"Time to first token of {len(waits)} requests")


def timelines(records: Sequence[RequestRecord], path: Path, title: str = "Tokens over time") -> None:
    """A line per request: tokens received over time, coloured by reading rate; dashed, reading that never waits.

    Raises TfserveError.
    """
    answered = [record for record in records if record.chunks]
    rates = sorted({record.rate for record in answered}, key=lambda rate: rate or 0.0)

    def draw(axes: Axes) -> None:
        for record in answered:
            times = token_times(record)
            label = None if record.rate is None else f"reads {record.rate:.3g} tokens/s"
            colour = f"C{rates.index(record.rate)}"
            axes.plot(times, np.arange(1, len(times) + 1), color=colour, alpha=0.5, linewidth=0.8, label=label)
        for index, rate in enumerate(rates):
            if rate is not None:
                longest = max(record.num_tokens for record in answered if record.rate == rate)
                begin = min(record.chunks[0][0] for record in answered if record.rate == rate)
                axes.plot([begin, begin + longest / rate], [0, longest], color=f"C{index}", linestyle="--")
        lines, labels = axes.get_legend_handles_labels()
        by_label = dict(zip(labels, lines, strict=True))
        if by_label:
            axes.legend(by_label.values(), by_label.keys())
        axes.set(xlabel="time, s", ylabel="tokens received", xlim=(0, None), ylim=(0, None))

    _save(draw, path, title)


def require_matplotlib(instead: str) -> None:
    """Raises TfserveError if matplotlib is missing; `instead` says how to do without it."""
    if importlib.util.find_spec("matplotlib") is None:
        raise TfserveError(f"plots need matplotlib: {install_command('bench')}, or {instead}")


def save_figure(draw: Callable[[Figure], None], path: Path, size: tuple[float, float] = (8, 5)) -> None:
    """Make a picture of `size` inches, have `draw` fill it, write it as PNG. Raises TfserveError."""
    require_matplotlib("leave --plots out")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    # Not pyplot: it keeps every figure in a global, and needs a display.
    figure = Figure(figsize=size, dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    draw(figure)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path)
    except OSError as error:
        raise TfserveError(f"--plots: cannot write {path}: {error.strerror}; name a writable directory") from None


def _save(draw: Callable[[Axes], None], path: Path, title: str) -> None:
    def fill(figure: Figure) -> None:
        axes = figure.add_subplot()
        draw(axes)
        axes.set_title(title)
        axes.grid(alpha=0.3)

    save_figure(fill, path)
