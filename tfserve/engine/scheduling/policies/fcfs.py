"""First come, first served: conservative, reserving and greedy admission: the baselines."""

from __future__ import annotations

import numpy as np

from tfserve.arrays import Ints, RowIndex
from tfserve.config import SchedulerConfig
from tfserve.engine.scheduling.policies.registry import register
from tfserve.engine.scheduling.policy import Decision, ResumeBy, Snapshot
from tfserve.engine.scheduling.state import RequestState
from tfserve.types import RequestId

_RETRACT_AHEAD_STEPS = 20
"""After a wrong guess the ratio assumes that every running request decodes this many tokens more (SGLang's default)."""


@register("fcfs")
class Fcfs:
    """Prefill first: while a request has a prompt to compute, decoding waits (SGLang's scheduler).

    A candidate is charged its whole prompt and max_tokens, a running request `ratio` of what it may still generate. The
    ratio decays with every decode step; when memory runs out all the same, the requests with the fewest output tokens
    are preempted and the ratio rises.
    """

    decodes_beside_prefill = False

    def __init__(self, config: SchedulerConfig) -> None:
        self._config = config
        self._decay = (config.fcfs.reserve_ratio - config.fcfs.reserve_min_ratio) / config.fcfs.reserve_decay_steps
        self.ratio = config.fcfs.reserve_ratio

    def decide(self, snapshot: Snapshot) -> Decision:
        """Preempt what the next decode step has no blocks for, else admit what fits."""
        c = snapshot.columns
        running = c.in_state(RequestState.RUNNING)
        if not len(running):
            self.ratio = self._config.fcfs.reserve_ratio
        victims = self._overflow(snapshot, running)
        admit = () if victims else admissible(snapshot, self.ratio, self._config.fcfs.reserve_clip_tokens)
        prefill = bool(admit) or bool((~snapshot.is_decoding[running]).any())
        decode = self.decodes_beside_prefill or not prefill
        if decode and not victims:
            self.ratio = max(self.ratio - self._decay, self._config.fcfs.reserve_min_ratio)
        return Decision(
            admit=admit, preempt=tuple((req, ResumeBy.RECOMPUTE) for req in c.ids_of(victims)), decode=decode
        )

    def _overflow(self, snapshot: Snapshot, running: RowIndex) -> list[int]:
        """Running requests to preempt so that the others' next tokens have blocks; one always stays."""
        c = snapshot.columns
        missing = int(snapshot.next_step_blocks[running].sum()) - snapshot.memory.num_free_blocks
        if missing <= 0:
            return []
        keep = running[self._keep_order(snapshot, running)].tolist()
        victims: list[int] = []
        while len(keep) > 1 and missing > 0:
            victim = keep.pop()
            victims.append(victim)
            missing -= int(snapshot.next_step_blocks[victim] + snapshot.blocks_for(c.num_computed[victim]))
        if victims:
            self._on_overflow(c.num_output[keep], c.num_remaining[keep])
        return victims

    def _keep_order(self, snapshot: Snapshot, running: RowIndex) -> RowIndex:
        """Positions in `running`, those to preempt first at the end."""
        c = snapshot.columns
        return np.lexsort((c.num_prompt[running], -c.num_output[running]))

    def _on_overflow(self, num_output: Ints, num_remaining: Ints) -> None:
        """Raise the ratio to what the remaining requests may still need."""
        generated = int(num_output.sum()) + _RETRACT_AHEAD_STEPS * len(num_output)
        allowed = int((num_output + num_remaining).sum())
        self.ratio = min(1.0, generated / max(1, allowed))


@register("fcfs-chunked")
class FcfsChunked(Fcfs):
    """Prefill chunks fill up the steps of decoding requests (Sarathi; SGLang's mixed chunked prefill)."""

    decodes_beside_prefill = True


@register("fcfs-reserve")
class FcfsReserve(Fcfs):
    """Everything a request may generate is reserved at its admission: no request is ever preempted."""

    def decide(self, snapshot: Snapshot) -> Decision:
        """Admit what fits with its whole output, prefill first."""
        admit = admissible(snapshot, 1.0, None)
        running = snapshot.columns.is_running
        prefill = bool(admit) or bool((running & ~snapshot.is_decoding).any())
        return Decision(admit=admit, decode=not prefill)


@register("fcfs-greedy")
class FcfsGreedy(Fcfs):
    """Nothing is reserved: admit while blocks are free, preempt the youngest when they run out (vLLM's scheduler)."""

    decodes_beside_prefill = True

    def decide(self, snapshot: Snapshot) -> Decision:
        """Preempt what the next decode step has no blocks for, else admit whose prompt fits."""
        self.ratio = 0.0
        c = snapshot.columns
        victims = self._overflow(snapshot, c.in_state(RequestState.RUNNING))
        admit = () if victims else admissible(snapshot, 0.0, 0)
        return Decision(admit=admit, preempt=tuple((req, ResumeBy.RECOMPUTE) for req in c.ids_of(victims)))

    def _keep_order(self, snapshot: Snapshot, running: RowIndex) -> RowIndex:
        return np.argsort(snapshot.columns.seq[running])

    def _on_overflow(self, num_output: Ints, num_remaining: Ints) -> None:
        """Guess nothing: there is no ratio to raise."""


def admissible(snapshot: Snapshot, ratio: float, clip: int | None) -> tuple[RequestId, ...]:
    """Waiting requests, in order of arrival, whose charge fits into what admitted ones leave.

    A waiting request is charged its tokens and all it may generate, an admitted one `ratio` of that; `clip` bounds what
    one may generate. Paused requests count with all their KV: they were promised it.
    """
    c, free_slots = snapshot.columns, snapshot.num_free_slots
    waiting = c.in_state(RequestState.WAITING)[: max(free_slots, 0)]
    if not len(waiting):
        return ()
    remaining = c.num_remaining if clip is None else np.minimum(c.num_remaining, clip)
    admitted = ~c.is_waiting
    expected = snapshot.blocks_for(c.num_tokens + np.ceil(ratio * remaining).astype(np.int64)) - c.device_blocks
    free = snapshot.memory.num_free_blocks - int(expected[admitted].sum())
    charge = np.cumsum(snapshot.blocks_for(c.num_tokens[waiting] + remaining[waiting]))
    fits = int(np.searchsorted(charge, free, side="right"))
    if fits == 0 and not admitted.any():
        # An empty engine takes anything: what was validated fits alone.
        fits = 1
    return c.ids_of(waiting[:fits])
