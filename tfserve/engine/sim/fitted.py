"""A simulated machine fitted to what a real one did: its step times, loop times and copies, from a step trace."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import msgspec
import numpy as np

from tfserve.engine.cost_model import CostModel, StepCoefficients, StepSample
from tfserve.engine.sim.engine import SimMachine
from tfserve.engine.sim.transfers import SimLinks
from tfserve.engine.step_trace import Trace, TraceStep
from tfserve.errors import TfserveError
from tfserve.plan import StepPlan

_LEAST_STEPS = 50

_IDLE = 10.0
"""A pause between steps this many times the usual one was not work: the loop slept."""

_UNKNOWN_BYTES_PER_S = 5e9
"""Of a link on which nothing was copied."""


class FitError(msgspec.Struct, frozen=True, kw_only=True):
    """How far off the law is on steps that it was not fitted to: relative errors of single steps, and of their sum."""

    num_steps: int
    median: float
    p90: float
    total: float


class FittedProfile(msgspec.Struct, frozen=True, kw_only=True):
    """A machine as measured; what `tfserve bench fit` writes. Seconds, bytes/s, blocks with the reserved one.

    `host_s` passes between the end of a step and the start of the next, and `host_row_s` more for each decode in it.
    """

    source: str
    step: StepCoefficients
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
            step_s=LinearCost(self.step),
            links=SimLinks(store_bytes_per_s=self.store_bytes_per_s, load_bytes_per_s=self.load_bytes_per_s),
            kv_bytes_per_token=self.kv_bytes_per_token,
            kv_tokens=(self.num_blocks - 1) * self.block_size,
            host_kv_tokens=max(self.num_host_blocks - 1, 0) * self.block_size,
            max_num_seqs=self.max_num_seqs,
            max_num_batched_tokens=self.max_num_batched_tokens,
            block_size=self.block_size,
            host_s=HostTime(self.host_s, self.host_row_s),
        )


class LinearCost:
    """sim.runner.StepCost: a step is linear in its work, as the CostModel takes it to be."""

    def __init__(self, coefficients: StepCoefficients) -> None:
        self._per = msgspec.structs.astuple(coefficients)

    def __call__(self, n_decode: int, decode_ctx: float, n_prefill: int, prefill_ctx: float) -> float:
        """Seconds of a step; arguments as StepCost's."""
        features = StepSample(n_decode, decode_ctx, n_prefill, prefill_ctx, 0.0).features()
        return math.fsum(per * feature for per, feature in zip(self._per, features, strict=True))


class HostTime:
    """CPU seconds of a launch: `step_s`, and `row_s` for each request in the step."""

    def __init__(self, step_s: float, row_s: float) -> None:
        self._step_s, self._row_s = step_s, row_s

    def __call__(self, plan: StepPlan) -> float:
        """Seconds to charge before the launch of this plan."""
        return self._step_s + self._row_s * len(plan.seqs)


def fit(trace: Trace) -> FittedProfile:
    """Fit a profile: every other step teaches, the rest tests. Raises TfserveError for a trace that is too short."""
    steps = [step for step in trace.steps if step.seconds > 0]
    if len(steps) < _LEAST_STEPS:
        raise TfserveError(f"a trace of {len(steps)} steps is too short to fit; {_LEAST_STEPS} are needed")
    head = trace.head
    coefficients = fit_steps([step.sample() for step in steps[::2]])
    host_s, host_row_s = _host_time(steps)
    stored, loaded = steps[-1].stored, steps[-1].loaded
    return FittedProfile(
        source=f"{head.model} on {head.device}, {len(steps)} steps",
        step=coefficients,
        error=fit_error(coefficients, [step.sample() for step in steps[1::2]]),
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
    """The law that the engine's own cost model finds in these steps, all of them weighed alike."""
    model = CostModel(kv_bytes_per_token=1, max_num_seqs=1)
    model.calibrate(samples)
    return model.coefficients


def fit_error(coefficients: StepCoefficients, samples: Sequence[StepSample]) -> FitError:
    """How far off the law is on these steps."""
    law = LinearCost(coefficients)
    measured = np.array([sample.seconds for sample in samples])
    predicted = np.array([law(s.n_decode, s.decode_ctx, s.n_prefill, s.prefill_ctx) for s in samples])
    relative = np.abs(predicted - measured) / measured
    return FitError(
        num_steps=len(samples),
        median=float(np.median(relative)),
        p90=float(np.percentile(relative, 90)),
        total=float(predicted.sum() / measured.sum() - 1),
    )


def _host_time(steps: Sequence[TraceStep]) -> tuple[float, float]:
    """Seconds between steps, and more per decode, where the loop went straight on."""
    gaps = np.array([after.end_s - after.seconds - before.end_s for before, after in pairwise(steps)])
    rows = np.array([after.n_decode for _, after in pairwise(steps)], np.float64)
    gaps = np.maximum(gaps, 0.0)
    busy = gaps <= _IDLE * float(np.median(gaps))
    gaps, rows = gaps[busy], rows[busy]
    spread = float(np.var(rows))
    slope = max(float(np.cov(rows, gaps, ddof=0)[0, 1]) / spread, 0.0) if spread else 0.0
    return max(float(gaps.mean() - slope * rows.mean()), 0.0), slope
