"""Admission control: how many requests can be served at their rates, and what happens beyond (docs/scheduling.md)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from tfserve.arrays import RowIndex
from tfserve.config import SchedulerConfig
from tfserve.engine.scheduling.policies.tokenflow.far_ahead import is_far_ahead
from tfserve.engine.scheduling.policy import Snapshot
from tfserve.plan import Direction

_LEAVE_FALLBACK = 0.9
"""Share of the capacity at which first come first served ends again."""


@dataclass(frozen=True, slots=True)
class Capacity:
    """What the device can make, and what is asked of it. `demand` in tokens/s, `bound` in requests."""

    tokens_per_s: float
    demand: float
    bound: float
    num_members: int


def estimate_capacity(snapshot: Snapshot, config: SchedulerConfig) -> Capacity:
    """Capacity, demand and the most requests that both rates and memory allow.

    Memory bounds only who keeps KV while off the device; without a host tier that is recomputed instead, and so are
    readers far ahead where the host is full.
    The capacity is that of batches of requests of average length at half of their output, less the share of their
    prompts, and of recomputing what is preempted where nothing is offloaded.
    """
    c, memory = snapshot.columns, snapshot.memory
    member = snapshot.is_member
    output = max(float(c.expected_output.sum()) / len(c), 1.0)
    prompt = float(c.num_prompt.sum()) / len(c)
    prefill = prompt / output
    if not config.ablation.offload:
        prefill += c.total_preemptions / max(c.num_added, 1) * (prompt + output / 2) / output
    tokens_per_s = snapshot.cost.capacity_tokens_per_s(
        prompt + output / 2, memory.num_blocks * memory.block_size, prefill
    )
    reads = c.has_reader
    demand = float(c.rate[reads & member].sum())
    bound = float("inf")
    if config.ablation.offload and memory.num_host_blocks:
        bound = (memory.num_blocks + memory.num_host_blocks) * memory.block_size / (prompt + output / 2)
        # Their KV can be given up: they take no memory from others.
        bound += int(np.count_nonzero(member & is_far_ahead(snapshot)))
    if reads.any() and config.overload != "share":
        bound = min(bound, tokens_per_s / float(c.rate[reads].mean()))
    return Capacity(tokens_per_s, demand, bound, int(np.count_nonzero(member)))


@dataclass(slots=True)
class AdmissionLimit:
    """How large the working set may be now, and whether admission has fallen back to first come first served."""

    size: float | None = None
    is_fallback: bool = False
    shrunk_s: float = -np.inf

    def update(self, capacity: Capacity, snapshot: Snapshot, config: SchedulerConfig) -> None:
        """One pass: towards the bound, or while copies queue down, once an interval; never below what is resident.

        It starts at the bound, so that a first burst is let in at once.
        """
        step = config.tokenflow.working_set_step
        bound = min(capacity.bound, float(len(snapshot.columns) + snapshot.max_num_seqs))
        if self.size is None:
            self.size = bound
        queue_s = max(snapshot.cost.queue_s(direction) for direction in Direction)
        if queue_s > config.schedule_interval_s:
            # Passes may follow one another faster than copies can.
            if snapshot.now_s - self.shrunk_s >= config.schedule_interval_s - 1e-9:
                self.size *= 1 - step
                self.shrunk_s = snapshot.now_s
        else:
            most = step * max(bound, self.size)
            self.size += min(max(bound - self.size, -most), most)
        c = snapshot.columns
        self.size = max(self.size, float(np.count_nonzero(c.is_running | c.is_loading)))

    def num_admissible(
        self, newcomers: RowIndex, capacity: Capacity, snapshot: Snapshot, config: SchedulerConfig
    ) -> int:
        """How many of `newcomers`, in this order, may join: the set has room and all rates together can be met.

        When they cannot, admission falls back until they can be met with a tenth to spare. An empty node lets the first
        in whatever it asks for.
        """
        if config.overload == "share":
            return self._room(capacity, len(newcomers))
        rates = np.where(snapshot.columns.has_reader, snapshot.columns.rate, 0.0)[newcomers]
        demand = capacity.demand + np.cumsum(rates)
        if (
            self.is_fallback
            and len(newcomers)
            and demand[0] > _LEAVE_FALLBACK * capacity.tokens_per_s
            and capacity.num_members
        ):
            return 0
        feasible = int(np.count_nonzero(demand <= capacity.tokens_per_s + 1e-9))
        if capacity.num_members == 0 and len(newcomers):
            feasible = max(feasible, 1)
        self.is_fallback = feasible < len(newcomers)
        return self._room(capacity, feasible)

    def _room(self, capacity: Capacity, wanted: int) -> int:
        size = capacity.bound if self.size is None else self.size
        return max(min(int(size + 1e-6) - capacity.num_members, wanted), int(capacity.num_members == 0 and wanted > 0))


def predicted_wait_s(
    snapshot: Snapshot, config: SchedulerConfig, num_ahead: int | None = None, joining: RowIndex | None = None
) -> float:
    """Seconds until the node could promise to feed one more reader, behind `num_ahead` waiting ones (None: all).

    Members, and who is `joining` them, are taken to share the capacity in proportion to their rates until each has its
    expected length. Who has no reader neither takes of it nor leaves any.
    """
    c = snapshot.columns
    if not len(c):
        return 0.0
    capacity, reading = estimate_capacity(snapshot, config).tokens_per_s, snapshot.is_member & c.has_reader
    if joining is not None:
        reading[joining] = c.has_reader[joining]
    demand = float(c.rate[reading].sum())
    newcomers = int(np.count_nonzero(~reading & c.has_reader)) if num_ahead is None else num_ahead
    mean = float(c.rate[c.has_reader].mean()) if c.has_reader.any() else config.default_rate
    missing = demand + mean * (newcomers + 1) - capacity
    prefill_s = float(snapshot.cost.recompute_s(c.num_uncomputed[c.num_output == 0]).sum())
    if missing <= 0 or not reading.any():
        return prefill_s
    speed = c.rate[reading] * capacity / demand
    ends = np.maximum(c.expected_output[reading] - c.num_output[reading], 1.0) / speed
    order = np.argsort(ends)
    freed = np.cumsum(c.rate[reading][order])
    # Once all present members have gone, those ahead in the queue take their turns: whole generations of them.
    generations = missing // freed[-1]
    index = min(int(np.searchsorted(freed, missing - generations * freed[-1])), len(freed) - 1)
    return float(prefill_s + generations * ends[order][-1] + ends[order][index])
