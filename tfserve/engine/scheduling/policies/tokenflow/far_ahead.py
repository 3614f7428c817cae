"""Readers so far ahead that their KV need not be kept where the host is short of memory. Torch-free."""

from __future__ import annotations

import numpy as np

from tfserve.arrays import Mask
from tfserve.engine.scheduling.policy import Snapshot
from tfserve.types import RequestId

_FAR_PER_RECOMPUTE = 100.0
"""A reader is far ahead with this many times as long to read as computing all its tokens anew takes."""


def is_far_ahead(snapshot: Snapshot) -> Mask:
    """Readers that lose nothing by giving their KV up: they need it long after it can be computed again."""
    c = snapshot.columns
    recompute_s = snapshot.cost.recompute_s(c.num_tokens)
    mask: Mask = c.has_reader & (c.time_to_empty_s > _FAR_PER_RECOMPUTE * recompute_s)
    return mask


def to_drop(snapshot: Snapshot) -> tuple[RequestId, ...]:
    """Paused requests whose KV is to be given up, those with most to read first.

    None unless the host lacks room for what readers on the device would have to leave there.
    """
    c, memory = snapshot.columns, snapshot.memory
    missing = int((c.device_blocks - snapshot.clean_blocks)[c.is_running].sum()) - memory.num_free_host_blocks
    if not memory.num_host_blocks or missing <= 0 or not c.is_paused.any():
        return ()
    rows = np.flatnonzero(c.is_paused & is_far_ahead(snapshot))
    rows = rows[np.argsort(-c.time_to_empty_s[rows], kind="stable")]
    freed = np.cumsum(snapshot.blocks_for(c.host_tokens[rows]))
    return c.ids_of(rows[: int(np.searchsorted(freed, missing)) + 1])
