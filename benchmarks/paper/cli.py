"""`python -m benchmarks.paper`: run the paper's experiments in virtual time and write tables, figures and a page."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from benchmarks.paper.cases import Experiment
from benchmarks.paper.experiments import experiments
from benchmarks.paper.files import timing_of, write_results
from benchmarks.paper.page import page
from benchmarks.paper.plots import draw
from benchmarks.paper.runs import run_all, tasks_of
from benchmarks.paper.summary import summarize
from tfserve.bench.plots import require_matplotlib
from tfserve.errors import TfserveError

_MAX_WORKERS = 2
_LOG_EVERY_S = 30.0


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.paper",
        description="Run this engine's scheduler in virtual time on simulated GPUs through the experiments of the "
        "TokenFlow paper. Writes README.md, CSV, JSON and PNG: the same bytes for the same seeds, but for timing.json.",
    )
    add = parser.add_argument
    add("--out", type=Path, required=True, help="folder for the results; made if it does not exist")
    add("--quick", action="store_true", help="a few experiments, one seed: under two minutes")
    add("--only", action="append", metavar="ROW", help="only this experiment, as 4090-a or load; may be repeated")
    add("--seeds", type=int, help="at most this many seeds of each experiment")
    add("--workers", type=int, default=min(_MAX_WORKERS, os.cpu_count() or 1), help="processes (default: %(default)s)")
    add("--long-answers", action="store_true", help="read the paper's short on the RTX 4090 as 512 in, 2048 out")
    add("--no-plots", action="store_true", help="write no PNG (matplotlib is then not needed)")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line. Returns 1 after an error, which is printed in one line."""
    args = arguments(argv)
    try:
        return bench_paper(args)
    except TfserveError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


def bench_paper(args: argparse.Namespace) -> int:
    """Run the chosen experiments. Raises TfserveError for an unknown row or a folder that cannot be written."""
    chosen = _chosen(experiments(long_answers=args.long_answers), args.only, is_quick=args.quick)
    most_seeds = args.seeds if args.seeds is not None else 1 if args.quick else max(row.seeds for row in chosen)
    if most_seeds < 1 or args.workers < 1:
        raise TfserveError("--seeds and --workers must be at least 1")
    # Check now what would otherwise fail after half an hour.
    if not args.no_plots:
        require_matplotlib("pass --no-plots")
    try:
        args.out.mkdir(parents=True, exist_ok=True)
        (args.out / "README.md").touch()
    except OSError as error:
        raise TfserveError(f"--out: cannot write to {args.out}: {error.strerror}") from None
    tasks = tasks_of(chosen, most_seeds)
    started_s = time.perf_counter()
    # Into a log a line now and then: it takes half an hour.
    with tqdm(total=len(tasks), unit="run", mininterval=0.1 if sys.stderr.isatty() else _LOG_EVERY_S) as bar:
        outcomes, cpu_s = run_all(tasks, args.workers, bar.update)
    lines = summarize(chosen, outcomes)
    timing = timing_of(tasks, cpu_s, time.perf_counter() - started_s, args.workers)
    write_results(args.out, chosen, outcomes, lines, timing)
    plots = {} if args.no_plots else {row.key: draw(args.out, row, outcomes, lines) for row in chosen}
    (args.out / "README.md").write_text(page(chosen, lines, plots, is_quick=args.quick))
    print(f"{len(tasks)} runs in {timing['wall_s']:.0f} s ({timing['cpu_s']:.0f} s of CPU): {args.out / 'README.md'}")
    return 0


def _chosen(rows: Sequence[Experiment], only: Sequence[str] | None, *, is_quick: bool) -> list[Experiment]:
    if only:
        unknown = sorted(set(only) - {row.key for row in rows})
        if unknown:
            known = ", ".join(row.key for row in rows)
            raise TfserveError(f"--only {', '.join(unknown)}: no such experiment; there are {known}")
        return [row for row in rows if row.key in only]
    return [row for row in rows if row.in_quick or not is_quick]
