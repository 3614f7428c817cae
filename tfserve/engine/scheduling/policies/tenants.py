"""Tenants: what is short is shared between tenants by weight, whatever the policy. Torch-free.

The measure is max-min fairness of what a tenant holds on the device now: its share of the slots or of the blocks,
whichever is larger, by its weight (Ghodsi et al., Dominant Resource Fairness, NSDI 2011). Nothing is remembered of what
a tenant had before.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import msgspec
import numpy as np

from tfserve.arrays import Floats, Ints, RowIndex
from tfserve.config import SchedulerConfig
from tfserve.engine.scheduling.columns import Columns
from tfserve.engine.scheduling.policies.headroom import headroom_s
from tfserve.engine.scheduling.policies.registry import uses_host
from tfserve.engine.scheduling.policies.sharing import (
    resident_blocks,
    return_s,
    round_trip_s,
    swap_decision,
    usable_blocks,
)
from tfserve.engine.scheduling.policies.tenant_prompts import prompts_in_order, share_prompts
from tfserve.engine.scheduling.policy import Decision, Policy, Snapshot

_MAX_CREDIT_S = 1.0
"""How long tenants that hold little may run alone at a stretch."""

_MAX_WANTING = 64
"""Requests considered in one pass for what other tenants hold."""


class Tenants:
    """Decides for several tenants with a policy. While only one has requests, the decisions are the policy's own.

    With several, the policy sees waiting requests in fair order. What a tenant holds beyond others is taken back for
    their requests, whatever the policy says of these. Prompts of several tenants share each step.
    """

    def __init__(self, config: SchedulerConfig) -> None:
        self._config = config
        self._has_taken = False
        self._own_time = OwnTime()

    def decide(self, policy: Policy, snapshot: Snapshot) -> Decision:
        """The policy's decision, in turn with swaps between tenants."""
        if snapshot.columns.num_tenants < 2:
            self._own_time.skip(snapshot.now_s)
            return policy.decide(snapshot)
        holdings = Holdings.of(snapshot, self._config)
        turn = fair_turn(snapshot.columns, holdings)
        taken = take_back(snapshot, self._config, holdings, turn)
        # The policy is asked in every second step at least: it has more to look after.
        self._has_taken = taken is not None and not self._has_taken
        if taken is not None and self._has_taken:
            return self._own_time.give(snapshot, share_prompts(snapshot, taken), holdings, self._config)
        decision = policy.decide(replace(snapshot, columns=in_fair_order(snapshot.columns, turn)))
        if taken is not None and decision.reject:
            reject = tuple((req, wait_s) for req, wait_s in decision.reject if req not in taken.admit)
            decision = msgspec.structs.replace(decision, reject=reject)
        return self._own_time.give(snapshot, share_prompts(snapshot, decision), holdings, self._config)


class OwnTime:
    """Steps without the requests of tenants that hold much, for those of tenants that hold little.

    In a step all wait for the whole batch, and for its prompts. A reader that is about to run dry, or a first token, of
    a tenant that holds no more than half of what another does, gets steps without that other, as long as these take no
    more of the time than the weights of the tenants that run.
    """

    def __init__(self) -> None:
        self._credit_s = 0.0
        self._last_s: float | None = None
        self._share = 0.0
        self._was_own = False

    def give(self, snapshot: Snapshot, decision: Decision, holdings: Holdings, config: SchedulerConfig) -> Decision:
        """The decision for a step without some tenants if it is to be one, else the decision itself."""
        c = snapshot.columns
        self._account(snapshot.now_s)
        prompts = prompts_in_order(snapshot, decision)
        reads = snapshot.is_decoding & c.is_read & (c.time_to_empty_s < config.tokenflow.low_buffer_s)
        needy = np.unique(np.concatenate([c.tenant[reads], c.tenant[prompts[~c.has_started[prompts]]]]))
        levels = holdings.now
        rich = np.flatnonzero(levels > 2 * levels[needy].min()) if len(needy) else needy
        self._was_own = len(rich) > 0 and self._credit_s > 0
        weights = np.zeros(len(levels))
        weights[c.tenant] = c.weight
        self._share = 1 - float(weights[rich].sum() / weights.sum())
        if not self._was_own:
            return decision
        out = np.isin(c.tenant, rich)
        return msgspec.structs.replace(
            decision,
            order=c.ids_of(prompts),
            chunks=tuple(np.where(out[prompts], 0, snapshot.max_num_batched_tokens).tolist()),
            hold=frozenset(c.ids_of(np.flatnonzero(out & snapshot.is_decoding))),
            # The limit is for the readers of all.
            prefill_tokens=None,
        )

    def skip(self, now_s: float) -> None:
        """Count a step of one tenant alone: a second one that comes then may run without it for a while."""
        self._account(now_s)
        self._was_own, self._share = False, 1.0

    def _account(self, now_s: float) -> None:
        """Count the time since the step before, for or against such steps."""
        took_s = 0.0 if self._last_s is None else min(now_s - self._last_s, _MAX_CREDIT_S)
        self._last_s = now_s
        gained_s = -took_s * (1 - self._share) if self._was_own else took_s * self._share
        self._credit_s = min(self._credit_s + gained_s, _MAX_CREDIT_S)


@dataclass(frozen=True)
class Holdings:
    """What each tenant holds on the device, by its number. `need` is what each request needs there, in blocks.

    `spare` are blocks that residents will not need soon; `num_slots` and `num_blocks` are all there are.
    """

    need: Ints
    slots: Ints
    blocks: Ints
    weight: Floats
    spare: int
    num_slots: int
    num_blocks: int

    @classmethod
    def of(cls, snapshot: Snapshot, config: SchedulerConfig) -> Holdings:
        """The holdings at the moment of a snapshot."""
        c = snapshot.columns
        need, usable = _need(snapshot, config), usable_blocks(snapshot, config.watermark)
        resident = c.is_running | c.is_loading
        tenant, count = c.tenant[resident], int(c.tenant.max()) + 1
        weight = np.ones(count)
        weight[c.tenant] = c.weight
        blocks = np.bincount(tenant, weights=need[resident], minlength=count).astype(np.int64)
        return cls(
            need=need,
            slots=np.bincount(tenant, minlength=count),
            blocks=blocks,
            weight=weight,
            spare=usable - int(blocks.sum()),
            num_slots=snapshot.max_num_seqs,
            num_blocks=max(usable, 1),
        )

    def levels(self, tenant: Ints, slots: Ints, blocks: Ints) -> Floats:
        """How much each tenant would hold with so much more, by its weight: 1 is the whole device at weight 1."""
        share = np.maximum(
            (self.slots[tenant] + slots) / self.num_slots, (self.blocks[tenant] + blocks) / self.num_blocks
        )
        levels: Floats = share / self.weight[tenant]
        return levels

    @property
    def now(self) -> Floats:
        """What each tenant holds, by its number."""
        numbers = np.arange(len(self.slots))
        return self.levels(numbers, np.zeros_like(numbers), np.zeros_like(numbers))

    def worse_off(self, columns: Columns, rows: RowIndex) -> RowIndex:
        """Those of `rows` whose tenant would hold no more with them than another one holds now."""
        now = self.now
        richest = int(now.argmax())
        others = np.full(len(now), now[richest])
        others[richest] = np.delete(now, richest).max(initial=0.0)
        tenant = columns.tenant[rows]
        return rows[self.levels(tenant, np.ones_like(tenant), self.need[rows]) <= others[tenant]]


def fair_turn(columns: Columns, holdings: Holdings) -> RowIndex:
    """Waiting rows in the order in which tenants' levels rise least; within a tenant in order of arrival."""
    c = columns
    rows = np.flatnonzero(c.is_waiting)
    if not len(rows):
        return rows
    rows = rows[np.lexsort((c.seq[rows], c.tenant[rows]))]
    tenant, need = c.tenant[rows], holdings.need[rows]
    first = np.flatnonzero(np.diff(tenant, prepend=-1))
    sizes = np.diff(first, append=len(rows))
    slots = np.arange(len(rows)) - np.repeat(first, sizes) + 1
    blocks = np.cumsum(need)
    blocks = blocks - np.repeat(blocks[first] - need[first], sizes)
    return rows[np.lexsort((c.seq[rows], holdings.levels(tenant, slots, blocks)))]


def in_fair_order(columns: Columns, turn: RowIndex) -> Columns:
    """The columns with waiting requests as if they had come in the order of `turn`.

    None comes earlier than it did. Priorities count within a tenant only: the best one of each tenant is 0.
    """
    c = columns
    if not len(turn):
        return c
    seq, arrival_s, since_s, priority = c.seq.copy(), c.arrival_s.copy(), c.state_since_s.copy(), c.priority.copy()
    seq[turn] = np.sort(c.seq[turn])
    arrival_s[turn] = np.maximum.accumulate(c.arrival_s[turn])
    since_s[turn] = np.maximum.accumulate(c.state_since_s[turn])
    rows = turn[np.lexsort((c.priority[turn], c.tenant[turn]))]
    is_first = np.diff(c.tenant[rows], prepend=-1) != 0
    rank = np.cumsum(is_first | (np.append(False, c.priority[rows][1:] != c.priority[rows][:-1])))
    priority[rows] = rank - np.repeat(rank[is_first], np.diff(np.flatnonzero(is_first), append=len(rows)))
    return replace(c, seq=seq, arrival_s=arrival_s, state_since_s=since_s, priority=priority)


def take_back(snapshot: Snapshot, config: SchedulerConfig, holdings: Holdings, turn: RowIndex) -> Decision | None:
    """Swaps that make the holdings of tenants more even; None if there are none to make.

    A request that waits, or whose reader is about to run dry, comes in the place of requests of a tenant that still
    holds no less than its own without them. It comes into free memory, too, where another tenant could be reduced for
    it: the policy may hold it up for what the other tenant was promised.
    """
    c = snapshot.columns
    rows = holdings.worse_off(c, np.concatenate([np.flatnonzero(c.is_paused), turn]))
    if not len(rows):
        return None
    headroom = headroom_s(c, snapshot.now_s, config.tokenflow.background_slack_s)
    seconds, loads = return_s(snapshot)
    is_due = headroom <= seconds + config.tokenflow.low_buffer_s
    rows = rows[c.is_waiting[rows] | is_due[rows]]
    waits = c.is_waiting[rows]
    # The poorest tenant first; of a tenant, readers about to run dry, then waiting requests in their turn.
    urgency = np.where(waits, np.arange(len(rows)), headroom[rows])
    wanting = rows[np.lexsort((urgency, waits, holdings.now[c.tenant[rows]]))]
    swaps = _Swaps(snapshot, holdings, may_crowd=config.overload == "shed")
    for row in wanting[:_MAX_WANTING].tolist():
        swaps.consider(row, from_readers=bool(is_due[row]))
    if not swaps.coming:
        return None
    _, by_host = round_trip_s(snapshot, offload=uses_host(config))
    decision = swap_decision(
        snapshot, swaps.leaving, swaps.coming, by_host=by_host, loads=loads, made_for=swaps.made_for
    )
    return msgspec.structs.replace(decision, wake_s=snapshot.now_s)


class _Swaps:
    """Plans swaps one by one, and follows what tenants hold after each."""

    def __init__(self, snapshot: Snapshot, holdings: Holdings, *, may_crowd: bool) -> None:
        c = snapshot.columns
        self._may_crowd = may_crowd
        """Whether a prompt may come though its turn is not in the next step."""
        self.leaving: list[int] = []
        self.coming: list[int] = []
        self.made_for: dict[int, int] = {}
        self._snapshot = snapshot
        # Lists: what follows looks at them one by one.
        self._slots, self._blocks = holdings.slots.tolist(), holdings.blocks.tolist()
        self._weight, self._need = holdings.weight.tolist(), holdings.need
        self._num_slots, self._num_blocks = holdings.num_slots, holdings.num_blocks
        self._spare = holdings.spare
        self._free_slots = snapshot.num_free_slots
        running = np.flatnonzero(c.is_running)
        # The next to leave is the last: it has most to read; of requests without a token, least is computed of it.
        order = np.lexsort((c.seq[running], -c.num_computed[running], c.time_to_empty_s[running]))
        self._residents: dict[int, list[int]] = {}
        for row, tenant in zip(running[order].tolist(), c.tenant[running[order]].tolist(), strict=True):
            self._residents.setdefault(tenant, []).append(row)
        pending = np.where(snapshot.is_decoding, 0, c.num_uncomputed)[running]
        self._pending = np.bincount(c.tenant[running], weights=pending, minlength=len(holdings.slots))

    def consider(self, row: int, *, from_readers: bool) -> None:
        """Let a request come if it may, in exchange for as few as make room for it."""
        tenant, need = int(self._snapshot.columns.tenant[row]), int(self._need[row])
        if self._pending[tenant] >= self._snapshot.max_num_batched_tokens and not self._may_crowd:
            return
        level = self._level(tenant, 1, need)
        victims: list[int] = []
        for victim in self._victims(tenant, level, from_readers=from_readers):
            if self._has_room(need, victims):
                # The first one beyond shows that there is a tenant to be reduced for this request.
                self._put_on(row, victims)
                return
            victims.append(victim)
        if victims and self._has_room(need, victims):
            self._put_on(row, victims)

    def _victims(self, tenant: int, level: float, *, from_readers: bool) -> Iterator[int]:
        """Residents that may leave for one that raises `tenant` to `level`, of the fullest tenant first."""
        is_read = self._snapshot.columns.is_read
        left = {other: len(rows) for other, rows in self._residents.items() if other != tenant}
        gone = dict.fromkeys(left, (0, 0))
        while left:
            other = max(left, key=lambda each: self._level(each, *gone[each]))
            if not left[other]:
                del left[other]
                continue
            left[other] -= 1
            row = self._residents[other][left[other]]
            if not from_readers and is_read[row]:
                continue
            slots, blocks = gone[other]
            gone[other] = slots - 1, blocks - int(self._need[row])
            if self._level(other, *gone[other]) < level - 1e-9:
                return
            yield row

    def _level(self, tenant: int, slots: int, blocks: int) -> float:
        """What a tenant would hold with so much more, by its weight."""
        slots, blocks = self._slots[tenant] + slots, self._blocks[tenant] + blocks
        level: float = max(slots / self._num_slots, blocks / self._num_blocks) / self._weight[tenant]
        return level

    def _has_room(self, need: int, victims: list[int]) -> bool:
        freed = sum(int(self._need[victim]) for victim in victims)
        return need <= self._spare + freed and self._free_slots + len(victims) > 0

    def _put_on(self, row: int, victims: list[int]) -> None:
        for victim in victims:
            self.leaving.append(victim)
            self.made_for[victim] = row
            self._residents[int(self._snapshot.columns.tenant[victim])].remove(victim)
            self._count(victim, -1)
        self.coming.append(row)
        self._count(row, 1)
        c = self._snapshot.columns
        self._pending[c.tenant[row]] += 0 if c.is_paused[row] else c.num_tokens[row]

    def _count(self, row: int, slots: int) -> None:
        tenant, blocks = int(self._snapshot.columns.tenant[row]), slots * int(self._need[row])
        self._slots[tenant] += slots
        self._blocks[tenant] += blocks
        self._spare -= blocks
        self._free_slots -= slots


def _need(snapshot: Snapshot, config: SchedulerConfig) -> Ints:
    """Device blocks that each request needs: now, where requests are paused; else with what a policy reserves."""
    if not config.policy.startswith("fcfs"):
        return resident_blocks(snapshot)
    c = snapshot.columns
    ratio = {"fcfs-reserve": 1.0, "fcfs-greedy": 0.0}.get(config.policy, config.fcfs.reserve_min_ratio)
    clip = {"fcfs-reserve": None, "fcfs-greedy": 0}.get(config.policy, config.fcfs.reserve_clip_tokens)
    remaining = c.num_remaining if clip is None else np.minimum(c.num_remaining, clip)
    growth = np.where(c.is_waiting, remaining, np.ceil(ratio * remaining).astype(np.int64))
    return np.maximum(snapshot.blocks_for(c.num_tokens + np.maximum(growth, 1)), c.device_blocks)
