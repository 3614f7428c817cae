"""Prompts of several tenants in one step. Torch-free."""

from __future__ import annotations

import msgspec
import numpy as np

from tfserve.arrays import Floats, Ints, RowIndex
from tfserve.engine.scheduling.policy import Decision, ResumeBy, Snapshot

_MIN_CHUNK = 64
"""Prompt tokens of each tenant in a step of several tenants' prompts, at least: a shorter step saves little."""

_SHARED_STEP_S = 0.1
"""Seconds of prompts in a step of several tenants, at most: one that comes, or runs dry, waits for the step to end."""


def share_prompts(snapshot: Snapshot, decision: Decision) -> Decision:
    """The decision with the prompt tokens of the coming step shared between tenants by weight.

    The step takes no more of any tenant than finishes the prompts of another: it is as long for these as if both had
    run in turn, token by token. It has prompts for _SHARED_STEP_S at most. Prompts of one tenant do not keep the others
    from decoding.
    """
    c = snapshot.columns
    rows = prompts_in_order(snapshot, decision)
    if not len(rows):
        return decision
    tenant = c.tenant[rows]
    if not decision.decode:
        waits = snapshot.is_decoding & ~np.isin(c.tenant, tenant)
        decision = msgspec.structs.replace(decision, decode=bool(waits.any()))
    most = _short_step(snapshot, rows, decision.prefill_tokens)
    decision = msgspec.structs.replace(decision, prefill_tokens=most)
    if (tenant == tenant[0]).all():
        return decision
    pending = np.where(c.is_running[rows], c.num_uncomputed[rows], c.num_tokens[rows])
    num_decodes = int(np.count_nonzero(snapshot.is_decoding)) if decision.decode else 0
    budget = min(snapshot.max_num_batched_tokens - num_decodes, most)
    left = _quotas(pending, tenant, c.weight[rows], budget)
    chunks: list[int] = []
    for each, tokens in zip(tenant.tolist(), pending.tolist(), strict=True):
        chunks.append(min(tokens, left[each]))
        left[each] -= chunks[-1]
    return msgspec.structs.replace(decision, order=c.ids_of(rows), chunks=tuple(chunks))


def _short_step(snapshot: Snapshot, rows: RowIndex, limit: int | None) -> int:
    """Prompt tokens of a step that is not long, at most `limit`: all tenants wait for its end.

    A token of a long prompt attends to what is computed of it, and takes longer.
    """
    c, n = snapshot.columns, _MIN_CHUNK
    start = int(np.where(c.is_running[rows], c.num_computed[rows], 0).max())
    cost = snapshot.cost
    took_s = cost.step_s(0, 0, n, n * (start + n / 2)) - cost.step_s(0, 0)
    seconds = max(_SHARED_STEP_S - cost.prompts_s, 0.0)
    most = max(int(n * seconds / max(took_s - cost.prompts_s, 1e-9)), n // 4)
    return min(most, snapshot.max_num_batched_tokens if limit is None else limit)


def prompts_in_order(snapshot: Snapshot, decision: Decision) -> RowIndex:
    """Requests that have prompt tokens to compute once the decision is carried out, in its order, then by arrival."""
    c = snapshot.columns
    leaving = {req for req, _ in decision.preempt}
    rows = [row for row in np.flatnonzero(c.is_running & ~snapshot.is_decoding).tolist() if c.ids[row] not in leaving]
    coming = {*decision.admit, *(req for req, by in decision.resume if by is ResumeBy.RECOMPUTE)}
    if coming:
        rows += [row for row in np.flatnonzero(c.is_waiting | c.is_paused).tolist() if c.ids[row] in coming]
    place = {req: index for index, req in enumerate(decision.order)}
    rows.sort(key=lambda row: (place.get(c.ids[row], len(place)), c.seq[row]))
    return np.array(rows, np.intp)


def _quotas(pending: Ints, tenant: Ints, weight: Floats, budget: int) -> dict[int, int]:
    """Prompt tokens for each tenant in the coming step, out of `budget`."""
    totals: dict[int, int] = {}
    weights: dict[int, float] = {}
    for each, tokens, of in zip(tenant.tolist(), pending.tolist(), weight.tolist(), strict=True):
        totals[each] = totals.get(each, 0) + tokens
        weights[each] = of
    least = min(max(total, _MIN_CHUNK) / weights[each] for each, total in totals.items())
    per_weight = min(least, max(budget, 0) / sum(weights.values()))
    return {each: min(total, int(np.ceil(per_weight * weights[each]))) for each, total in totals.items()}
