"""A simulated machine fitted to the step trace of a real one: its step times, loop times and copies."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import msgspec
import numpy as np

from tfserve.arrays import Floats
from tfserve.engine.core.step_trace import Trace, TraceStep
from tfserve.engine.scheduling.cost_model import StepCoefficients, StepSample
from tfserve.engine.scheduling.step_fit import fit_step_time
from tfserve.engine.simulation.engine import SimMachine
from tfserve.engine.simulation.runner import StepCost
from tfserve.engine.simulation.transfers import SimLinks
from tfserve.errors import TfserveError
from tfserve.plan import StepPlan

_MIN_STEPS = 50

_IDLE = 10.0
"""A gap between steps this many times the median is not work: the loop was asleep."""

_UNKNOWN_BYTES_PER_S = 5e9
"""Speed of a link on which nothing was copied."""

_MIN_SCALE = np.array([5e-3, 5e-4, 1e-6, 5e-4, 1e-6, 1e-2])
"""Coefficients of a CPU, whose steps take a thousand times as long as those of a GPU."""

_PRIOR_STRENGTH = 1e-6
"""So weak that it only decides coefficients that the steps leave undetermined."""

_MIN_ALIKE = 4
"""Steps of about one size that are needed to correct the model at that size."""


class FitError(msgspec.Struct, frozen=True, kw_only=True):
    """Error of the step time model on steps it was not fitted to: relative errors of single steps, and of their sum."""

    num_steps: int
    median: float
    p90: float
    total: float


class SizeFactor(msgspec.Struct, frozen=True):
    """Steps of about `num_tokens` take `factor` times the linear model: a matrix product is not linear in its rows."""

    num_tokens: float
    factor: float


class FittedProfile(msgspec.Struct, frozen=True, kw_only=True):
    """A measured machine, as `tfserve bench fit` writes it. Seconds, bytes/s, blocks with the reserved one.

    A step takes the time of the linear model `step` times the factor of its size (`sizes`, ascending). Between the end
    of a step and the start of the next pass `host_s`, and `host_row_s` more for each decode in it.
    """

    source: str
    step: StepCoefficients
    sizes: list[SizeFactor] = []
    error: FitError
    host_s: float
    host_row_s: float
    store_bytes_per_s: float
    load_bytes_per_s: float
    kv_bytes_per_token: int
    block_size: int
    num_blocks: int
    num_host_blocks: int
    max_num_seqs: int
    max_num_batched_tokens: int

    def machine(self) -> SimMachine:
        """The machine to simulate."""
        return SimMachine(
            step_s=MeasuredCost(self.step, self.sizes),
            links=SimLinks(store_bytes_per_s=self.store_bytes_per_s, load_bytes_per_s=self.load_bytes_per_s),
            kv_bytes_per_token=self.kv_bytes_per_token,
            kv_tokens=(self.num_blocks - 1) * self.block_size,
            host_kv_tokens=max(self.num_host_blocks - 1, 0) * self.block_size,
            max_num_seqs=self.max_num_seqs,
            max_num_batched_tokens=self.max_num_batched_tokens,
            block_size=self.block_size,
            host_s=HostTime(self.host_s, self.host_row_s),
        )


class MeasuredCost:
    """A StepCost: the engine's CostModel, linear in the step's work, times a factor for the step's size.

    Between two sizes the factor is interpolated over the logarithm of tokens; beyond them it is constant.
    """

    def __init__(self, coefficients: StepCoefficients, sizes: Sequence[SizeFactor] = ()) -> None:
        self._per = msgspec.structs.astuple(coefficients)
        self._log_tokens = [math.log(size.num_tokens) for size in sizes]
        self._factors = [size.factor for size in sizes]

    def __call__(self, n_decode: int, decode_ctx: float, n_prefill: int, prefill_ctx: float) -> float:
        """Seconds of a step; arguments as StepCost's."""
        features = StepSample(n_decode, decode_ctx, n_prefill, prefill_ctx, 0.0).features()
        linear_s = math.fsum(per * feature for per, feature in zip(self._per, features, strict=True))
        if not self._factors:
            return linear_s
        size = math.log(max(n_decode + n_prefill, 1))
        return linear_s * float(np.interp(size, self._log_tokens, self._factors))


class HostTime:
    """CPU seconds of a launch: `step_s`, and `row_s` for each request in the step."""

    def __init__(self, step_s: float, row_s: float) -> None:
        self._step_s, self._row_s = step_s, row_s

    def __call__(self, plan: StepPlan) -> float:
        """Seconds to charge before the launch of this plan."""
        return self._step_s + self._row_s * len(plan.seqs)


def fit(trace: Trace) -> FittedProfile:
    """Fit a profile to every other step, test it on the rest. Raises TfserveError for a trace that is too short."""
    steps = trace.timed_steps
    if len(steps) < _MIN_STEPS:
        raise TfserveError(f"a trace of {len(steps)} steps is too short to fit; {_MIN_STEPS} are needed")
    head = trace.head
    taught = [step.sample() for step in steps[::2]]
    coefficients = fit_steps(taught)
    sizes = fit_sizes(coefficients, taught)
    host_s, host_row_s = _host_time(steps)
    stored, loaded = steps[-1].stored, steps[-1].loaded
    return FittedProfile(
        source=f"{head.model} on {head.device}, {len(steps)} steps",
        step=coefficients,
        sizes=sizes,
        error=fit_error(MeasuredCost(coefficients, sizes), [step.sample() for step in steps[1::2]]),
        host_s=host_s,
        host_row_s=host_row_s,
        store_bytes_per_s=stored.nbytes / stored.busy_s if stored.busy_s else _UNKNOWN_BYTES_PER_S,
        load_bytes_per_s=loaded.nbytes / loaded.busy_s if loaded.busy_s else _UNKNOWN_BYTES_PER_S,
        kv_bytes_per_token=head.kv_bytes_per_token,
        block_size=head.block_size,
        num_blocks=head.num_blocks,
        num_host_blocks=head.num_host_blocks,
        max_num_seqs=head.max_num_seqs,
        max_num_batched_tokens=head.max_num_batched_tokens,
    )


def fit_steps(samples: Sequence[StepSample]) -> StepCoefficients:
    """Fit the linear model. There are many steps, so unlike in the engine's cost model the prior is weak."""
    work = np.array([sample.features() for sample in samples])
    seconds = np.array([sample.seconds for sample in samples])
    usual = np.array(msgspec.structs.astuple(StepCoefficients()))
    return StepCoefficients(*fit_step_time(work, seconds, usual, _MIN_SCALE, prior_strength=_PRIOR_STRENGTH).tolist())


def fit_sizes(coefficients: StepCoefficients, samples: Sequence[StepSample]) -> list[SizeFactor]:
    """Correction by size: a factor for every power of two of tokens with enough steps."""
    cost = MeasuredCost(coefficients)
    alike: dict[int, list[StepSample]] = {}
    for sample in samples:
        alike.setdefault((sample.n_decode + sample.n_prefill - 1).bit_length(), []).append(sample)
    found = []
    for _, group in sorted(alike.items()):
        if len(group) >= _MIN_ALIKE:
            num_tokens = math.exp(sum(math.log(s.n_decode + s.n_prefill) for s in group) / len(group))
            factor = sum(sample.seconds for sample in group) / float(_predicted(cost, group).sum())
            found.append(SizeFactor(num_tokens, factor))
    return found


def fit_error(cost: StepCost, samples: Sequence[StepSample]) -> FitError:
    """Error of the model on these steps."""
    measured = np.array([sample.seconds for sample in samples])
    predicted = _predicted(cost, samples)
    relative = np.abs(predicted - measured) / measured
    return FitError(
        num_steps=len(samples),
        median=float(np.median(relative)),
        p90=float(np.percentile(relative, 90)),
        total=float(predicted.sum() / measured.sum() - 1),
    )


def _predicted(cost: StepCost, samples: Sequence[StepSample]) -> Floats:
    return np.array([cost(s.n_decode, s.decode_ctx, s.n_prefill, s.prefill_ctx) for s in samples])


def _host_time(steps: Sequence[TraceStep]) -> tuple[float, float]:
    """Seconds between steps, and seconds per decode, where the loop did not sleep."""
    gaps = np.array([after.end_s - after.seconds - before.end_s for before, after in pairwise(steps)])
    rows = np.array([after.n_decode for _, after in pairwise(steps)], np.float64)
    gaps = np.maximum(gaps, 0.0)
    busy = gaps <= _IDLE * float(np.median(gaps))
    gaps, rows = gaps[busy], rows[busy]
    spread = float(np.var(rows))
    slope = max(float(np.cov(rows, gaps, ddof=0)[0, 1]) / spread, 0.0) if spread else 0.0
    return max(float(gaps.mean() - slope * rows.mean()), 0.0), slope
