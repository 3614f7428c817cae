"""For benchmarks/exactness/run.py: a policy that preempts all the time, and a runner that checks the KV."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from tfserve.engine.scheduling.policies.sharing import out_of_blocks, resident_blocks, swap_decision
from tfserve.engine.scheduling.policy import Decision, Snapshot
from tfserve.engine.scheduling.state import RequestState
from tfserve.memory.transfers.worker_transfers import TierArrays
from tfserve.plan import InFlight, Runner, SlotId, StepPlan


class Carousel:
    """After `every` steps of decoding all running requests are preempted and the next in the queue are admitted.

    It counts steps, not seconds, so that the number of preemptions does not depend on the machine. Steps with prompts
    or running loads do not count: every request decodes between two preemptions.
    """

    def __init__(self, every: int, *, load: bool) -> None:
        self._every = every
        self._load = load
        self._decoded = 0

    def decide(self, snapshot: Snapshot) -> Decision:
        """Fill an empty device; empty a device if its requests have decoded long enough, or have no free block."""
        c = snapshot.columns
        running = c.in_state(RequestState.RUNNING)
        if snapshot.is_decoding[running].all() and not c.is_loading.any():
            self._decoded += 1
        outside = np.flatnonzero(c.is_waiting | c.is_paused)
        due = (self._decoded >= self._every and len(outside) > 0) or out_of_blocks(snapshot)
        if not due and (len(running) or c.is_loading.any()):
            return Decision()
        self._decoded = 0
        need = resident_blocks(snapshot, self._every + 2)
        free = snapshot.memory.num_blocks - int(need[c.is_loading].sum())
        come: list[int] = []
        for row in outside[np.lexsort((c.seq[outside], c.state_since_s[outside]))].tolist():
            if need[row] > free:
                break
            come.append(row)
            free -= int(need[row])
        all_rows = np.full(len(c), self._load)
        return swap_decision(snapshot, running.tolist(), come, by_host=all_rows, loads=c.is_paused)


@dataclass
class KVWitness:
    """A runner around another one that keeps a copy of every KV entry when it is first computed, per request.

    When a request resumes with KV, all of it is compared with that copy, bit by bit, before the step runs. `kv` are
    the device's blocks. Counts: `checked` returns, `tokens` compared in them, and `wrong` requests found with other
    bits.
    """

    inner: Runner
    kv: TierArrays
    max_model_len: int
    checked: int = 0
    tokens: int = 0
    wrong: list[str] = field(default_factory=list)
    _tables: dict[SlotId, list[int]] = field(default_factory=dict)
    _entering: set[SlotId] = field(default_factory=set)
    _copies: dict[str, npt.NDArray[np.generic]] = field(default_factory=dict)

    def launch(self, plan: StepPlan) -> InFlight:
        """Compare the KV of resumed requests, run the step, copy the KV that it wrote."""
        for entry in plan.entered:
            self._tables[entry.slot] = [int(block) for block in entry.blocks]
            self._entering.add(entry.slot)
        for seq in plan.seqs:
            self._tables[seq.slot] += seq.new_blocks
            if seq.slot in self._entering:
                self._entering.remove(seq.slot)
                self._compare(seq.req, seq.slot, seq.start)
        flight = self.inner.launch(plan)
        flight.result()  # the step has run, and no KV was moved since
        for seq in plan.seqs:
            written = self._read(seq.slot, seq.start, seq.start + seq.n)
            copy = self._copies.get(seq.req)
            if copy is None:
                copy = self._copies[seq.req] = np.empty((self.max_model_len, *written.shape[1:]), written.dtype)
            copy[seq.start : seq.start + seq.n] = written
        return flight

    def close(self) -> None:
        """Close the runner inside."""
        self.inner.close()

    def _compare(self, req: str, slot: SlotId, num_tokens: int) -> None:
        if num_tokens == 0:
            return
        self.checked += 1
        self.tokens += num_tokens
        if self._copies[req][:num_tokens].tobytes() != self._read(slot, 0, num_tokens).tobytes():
            self.wrong.append(req)

    def _read(self, slot: SlotId, start: int, end: int) -> npt.NDArray[np.generic]:
        """K and V of tokens [start, end) of a slot, `[tokens, 2, ...]`, copied."""
        position = np.arange(start, end)
        size = self.kv.keys.shape[1]
        place = np.array(self._tables[slot])[position // size], position % size
        return np.stack([self.kv.keys[place], self.kv.values[place]], axis=1)
