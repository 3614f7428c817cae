"""SimRunner: the time of a step comes from a cost function, tokens from a formula."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping
from typing import Protocol

from tfserve.engine.simulation.clock import SimClock
from tfserve.plan import StepPlan, StepResult
from tfserve.types import RequestId


class StepCost(Protocol):
    """Step time: CostModel.step_s, or the model of a simulated device."""

    def __call__(self, n_decode: int, decode_ctx: float, n_prefill: int, prefill_ctx: float) -> float:
        """Seconds of a step.

        `n_decode` decodes attend to `decode_ctx` tokens in all; `n_prefill` prompt tokens attend to `prefill_ctx`
        pairs, the sum over chunks of n * (start + n / 2).
        """
        ...


def sim_token(req: RequestId, position: int, vocab_size: int) -> int:
    """The token that the simulated model puts at `position` of a request; never 0."""
    return 1 + zlib.crc32(req.encode(), position) % (vocab_size - 1)


class SimInFlight:
    """A step that ends at a known moment."""

    def __init__(self, result: StepResult, end_s: float, clock: SimClock) -> None:
        self._result = result
        self._end_s = end_s
        self._clock = clock

    def result(self) -> StepResult:
        """Let time pass to the step's end."""
        self._clock.advance_to(self._end_s)
        return self._result


class SimRunner:
    """plan.Runner in virtual time. Steps follow each other on the device: one starts when the one before has ended.

    Tokens are `sim_token` of request and position, so that a lost or repeated position shows. At the position that
    `ends` gives for a request the token is 0, the end of the answer. `host_s` is the CPU time charged before each
    launch: the device starts after it, and is idle meanwhile if no other step is running.
    """

    def __init__(
        self,
        clock: SimClock,
        step_s: StepCost,
        vocab_size: int,
        *,
        ends: Mapping[RequestId, int] | None = None,
        host_s: Callable[[StepPlan], float] | None = None,
    ) -> None:
        self._clock = clock
        self._step_s = step_s
        self._vocab_size = vocab_size
        self._ends = ends or {}
        self._host_s = host_s
        self._busy_until_s: float | None = None

    def launch(self, plan: StepPlan) -> SimInFlight:
        """Start a step; its end becomes an event of the clock."""
        if self._host_s is not None:
            self._clock.advance_to(self._clock.now() + self._host_s(plan))
        decodes, prefills = plan.seqs[: plan.n_decode], plan.seqs[plan.n_decode :]
        device_s = self._step_s(
            len(decodes),
            sum(seq.start + 1 for seq in decodes),
            sum(seq.n for seq in prefills),
            sum(seq.n * (seq.start + seq.n / 2) for seq in prefills),
        )
        free_s = self._clock.now() if self._busy_until_s is None else self._busy_until_s
        start_s = max(free_s, self._clock.now())
        self._busy_until_s = start_s + device_s
        self._clock.call_at(self._busy_until_s, self._clock.notify)
        tokens = tuple(self._token(seq.req, seq.start + seq.n) for seq in plan.seqs if seq.sample)
        result = StepResult(plan.step, tokens, (None,) * len(tokens), device_s, start_s - free_s)
        return SimInFlight(result, self._busy_until_s, self._clock)

    def close(self) -> None:
        """See plan.Runner; there is nothing to release."""

    def _token(self, req: RequestId, position: int) -> int:
        return 0 if self._ends.get(req) == position else sim_token(req, position, self._vocab_size)
