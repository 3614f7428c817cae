"""First come, first served, with conservative admission (SGLang's scheduler; tokenflow.md section 7)."""

from __future__ import annotations

import math

from tfserve.config import SchedulerConfig
from tfserve.engine.policy import Candidate, Decision, Snapshot
from tfserve.types import RequestId

_RETRACT_AHEAD_STEPS = 20
"""After a wrong guess the ratio assumes that every running request decodes this many tokens more (SGLang's default)."""


class Fcfs:
    """Prefill first: while somebody has a prompt to compute, decoding waits.

    A candidate is charged its whole prompt and max_tokens, a running request `ratio` of what it may still generate. The
    ratio decays with every decode step; when memory runs out all the same, the requests with the fewest output tokens
    are preempted and the ratio rises.
    """

    decodes_beside_prefill = False

    def __init__(self, config: SchedulerConfig) -> None:
        self._config = config
        self._decay = (config.reserve_ratio - config.reserve_min_ratio) / config.reserve_decay_steps
        self.ratio = config.reserve_ratio

    def decide(self, snapshot: Snapshot) -> Decision:
        """Preempt what the next decode step has no blocks for, else admit what fits."""
        if not snapshot.running:
            self.ratio = self._config.reserve_ratio
        preempt = self._overflow(snapshot)
        admit = () if preempt else self._admissible(snapshot)
        prefill = bool(admit) or any(r.num_uncomputed > 1 for r in snapshot.running)
        decode = self.decodes_beside_prefill or not prefill
        if decode and not preempt:
            self.ratio = max(self.ratio - self._decay, self._config.reserve_min_ratio)
        return Decision(admit=admit, preempt=preempt, decode=decode)

    def _admissible(self, snapshot: Snapshot) -> tuple[RequestId, ...]:
        """Waiting requests, in order, whose charge fits into what running ones leave, in blocks."""
        free = snapshot.num_free_blocks - sum(self._reserve(r, snapshot) for r in snapshot.running)
        admit: list[RequestId] = []
        for candidate in snapshot.waiting[: snapshot.num_free_rows]:
            charge = snapshot.blocks_for(candidate.num_uncomputed + self._clip(candidate.num_remaining))
            # An empty engine takes anything: what was validated fits alone.
            alone = not snapshot.running and not admit
            if charge > free and not alone:
                break
            free -= charge
            admit.append(candidate.id)
        return tuple(admit)

    def _overflow(self, snapshot: Snapshot) -> tuple[RequestId, ...]:
        """Running requests to preempt so that the others' next tokens have blocks; one always stays."""
        keep = sorted(snapshot.running, key=lambda r: (-r.num_output, r.num_prompt))
        free = snapshot.num_free_blocks
        victims: list[Candidate] = []
        while len(keep) > 1 and sum(map(snapshot.next_token_blocks, keep)) > free:
            victim = keep.pop()
            victims.append(victim)
            free += snapshot.blocks_for(victim.num_computed)
        if victims:
            self._raise_ratio(keep)
        return tuple(v.id for v in victims)

    def _raise_ratio(self, kept: list[Candidate]) -> None:
        generated = sum(r.num_output for r in kept) + _RETRACT_AHEAD_STEPS * len(kept)
        allowed = sum(r.num_output + r.num_remaining for r in kept)
        self.ratio = min(1.0, generated / max(1, allowed))

    def _reserve(self, running: Candidate, snapshot: Snapshot) -> int:
        """Free blocks that a running request is expected to take: its uncomputed tokens and a share of its output."""
        output = self.ratio * self._clip(running.num_remaining)
        expected = running.num_computed + running.num_uncomputed + math.ceil(output)
        return snapshot.blocks_for(expected) - snapshot.blocks_for(running.num_computed)

    def _clip(self, tokens: int) -> int:
        return min(tokens, self._config.reserve_clip_tokens)


class FcfsChunked(Fcfs):
    """Prefill chunks fill up the steps of those that decode (Sarathi; SGLang's mixed chunked prefill)."""

    decodes_beside_prefill = True
