"""Runs cases on several processes and scores them. A seed gives the same outcome with any number of processes."""

from __future__ import annotations

import gc
import multiprocessing
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor

import msgspec
import numpy as np

from benchmarks.paper.bounds import fluid_of_run
from benchmarks.paper.cases import Case, Experiment
from tfserve.arrays import Floats
from tfserve.config import config_from
from tfserve.engine.scheduling.qos import Served, buffer_sizes, effective_tokens, score
from tfserve.engine.simulation.engine import Moment, SimEngine, SimRequest, SimRun
from tfserve.engine.simulation.fitted import HostTime

_MAX_MOMENTS = 400
_NUM_TIMELINES = 12
_TIMELINE_POINTS = 120
_NUM_FANS = 80
_FAN_POINTS = 40
_DIGITS = 4
"""Decimals of seconds in the plotted data."""

DETAIL_SEED = 0
"""The seed whose runs are plotted."""


class ReaderClass(msgspec.Struct, frozen=True, kw_only=True):
    """Readers of one rate: `read_per_s` is their actual speed, stalls included."""

    rate: float
    num_requests: int
    read_per_s: float
    stall_share: float
    effective_share: float


class Detail(msgspec.Struct, frozen=True, kw_only=True):
    """The part of a run for the plots.

    `timelines` are some requests' token times and how many tokens each had by then, from their arrival; `fans` are
    (rate, seconds since the first token, tokens) of more of them.
    """

    ttft_s: list[float]
    moments: list[Moment]
    timelines: list[tuple[list[float], list[int]]]
    fans: list[tuple[float, list[float], list[int]]]


class Outcome(msgspec.Struct, frozen=True, kw_only=True):
    """One run in numbers; see engine.qos.QosReport. Tokens/s, seconds, GB.

    `fluid_own` is the effective throughput with its own tokens, perfectly shared (bounds.fluid_of_run).
    """

    experiment: str
    case: str
    seed: int
    num_requests: int
    duration_s: float
    raw: float
    effective: float
    on_time: float
    ttft_mean_s: float
    ttft_p50_s: float
    ttft_p99_s: float
    tbt_p99_s: float
    stall_s: float
    stall_share: float
    preemptions: float
    refused: int
    stored_gb: float
    loaded_gb: float
    steps: int
    fluid_own: float
    classes: list[ReaderClass] = []
    detail: Detail | None = None


class Task(msgspec.Struct, frozen=True):
    """One run to do."""

    experiment: str
    case: Case
    seed: int


def tasks_of(experiments: Sequence[Experiment], most_seeds: int) -> list[Task]:
    """All runs, seed by seed, so that the cases of an experiment alternate."""
    return [
        Task(experiment.key, case, seed)
        for seed in range(most_seeds)
        for experiment in experiments
        for case in experiment.cases
        if seed < min(experiment.seeds, case.seeds or experiment.seeds)
    ]


def run_all(tasks: Sequence[Task], workers: int, done: Callable[[], object]) -> tuple[list[Outcome], list[float]]:
    """Every task's outcome and the CPU seconds it took, in the order of the tasks; `done` is called after each."""
    if workers == 1:
        results = []
        for task in tasks:
            results.append(run_task(task))
            done()
    else:
        # Spawned, not forked: a run must not inherit the parent's state.
        with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
            futures = [pool.submit(run_task, task) for task in tasks]
            for future in futures:
                future.add_done_callback(lambda _: done())
            results = [future.result() for future in futures]
    return [outcome for outcome, _ in results], [cpu_s for _, cpu_s in results]


def run_task(task: Task) -> tuple[Outcome, float]:
    """One run, and the CPU seconds it took."""
    case = task.case
    cpu_s = time.process_time()
    requests = case.workload.requests(task.seed)
    host_s = HostTime(case.host_s, case.host_row_s) if case.host_s or case.host_row_s else None
    config = config_from({"model": "simulated", "scheduler": case.settings}).scheduler
    # A run makes no garbage before its end; collection would take 6 % of the time.
    gc.disable()
    try:
        run = SimEngine(case.profile.machine(host_s), config, requests).run()
    finally:
        gc.enable()
    cpu_s = time.process_time() - cpu_s
    return _outcome(task, requests, run), cpu_s


def _outcome(task: Task, requests: Sequence[SimRequest], run: SimRun) -> Outcome:
    report = score(run.served)
    return Outcome(
        experiment=task.experiment,
        case=task.case.name,
        seed=task.seed,
        num_requests=len(requests),
        duration_s=report.duration_s,
        raw=report.raw_throughput,
        effective=report.effective_throughput,
        on_time=report.on_time_goodput,
        ttft_mean_s=report.ttft_mean_s,
        ttft_p50_s=report.ttft_p50_s,
        ttft_p99_s=report.ttft_p99_s,
        tbt_p99_s=report.tbt_p99_s,
        stall_s=report.stall_s,
        stall_share=report.stall_share,
        preemptions=run.num_preemptions / len(requests),
        refused=run.num_refused,
        stored_gb=run.bytes_stored / 1e9,
        loaded_gb=run.bytes_loaded / 1e9,
        steps=run.num_steps,
        fluid_own=fluid_of_run(run.served),
        classes=_classes(run.served),
        detail=_detail(run) if task.seed == DETAIL_SEED else None,
    )


def _classes(served: Sequence[Served]) -> list[ReaderClass]:
    """Readers by rate; nothing where all have the same."""
    rates = sorted({request.rate for request in served})
    if len(rates) < 2:
        return []
    classes = []
    for rate in rates:
        group = [request for request in served if request.rate == rate and len(request.token_s)]
        tokens = sum(len(request.token_s) for request in group)
        stall_s = sum(buffer_sizes(request)[1] for request in group)
        classes.append(
            ReaderClass(
                rate=rate,
                num_requests=len(group),
                read_per_s=tokens / (tokens / rate + stall_s),
                stall_share=stall_s / (tokens / rate + stall_s),
                effective_share=sum(map(effective_tokens, group)) / tokens,
            )
        )
    return classes


def _detail(run: SimRun) -> Detail:
    answered = [request for request in run.served if len(request.token_s)]
    shown = answered[:: max(1, len(answered) // _NUM_TIMELINES)][:_NUM_TIMELINES]
    fans = []
    for request in answered[:: max(1, len(answered) // _NUM_FANS)][:_NUM_FANS]:
        times, counts = _curve(request.token_s - request.token_s[0], _FAN_POINTS)
        fans.append((request.rate, times, counts))
    step = -(-len(run.moments) // _MAX_MOMENTS)
    return Detail(
        ttft_s=sorted(round(float(request.token_s[0] - request.arrival_s), _DIGITS) for request in answered),
        moments=run.moments[:: max(1, step)],
        timelines=[_curve(request.token_s - request.arrival_s, _TIMELINE_POINTS) for request in shown],
        fans=fans,
    )


def _curve(times: Floats, points: int) -> tuple[list[float], list[int]]:
    """Some points of a request's cumulative tokens over time."""
    index = np.unique(np.linspace(0, len(times) - 1, min(points, len(times))).astype(int))
    return [round(float(value), _DIGITS) for value in times[index]], [int(value) for value in index + 1]
