"""Counted rates: no reader counts for more than what one stream gets of a full device (docs/scheduling.md). Torch-free.

Whoever reads faster than that cannot be promised its rate beside others; taken at its word it would seem to be in want
for ever, and keep others off the device. It is treated as a reader of the most that counts.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from tfserve.engine.policy import Snapshot


def most_counted(snapshot: Snapshot, default_rate: float) -> float:
    """Tokens/s of one stream when the device is full of requests of the present ones' average length.

    At least `default_rate`: the rate that answers are taken to be read at is taken at its word on any device.
    """
    c, memory = snapshot.columns, snapshot.memory
    mean_ctx = max(float((c.num_prompt + c.expected_output / 2).sum()) / len(c), 1.0)
    batch = max(1.0, min(snapshot.max_num_seqs, memory.num_blocks * memory.block_size / mean_ctx))
    return max(default_rate, 1.0 / snapshot.cost.step_s(batch, batch * mean_ctx))


def as_counted(snapshot: Snapshot, most: float) -> Snapshot:
    """The snapshot as if no rate were above `most`: such a reader has read at that rate since its first token.

    What it lacked while it was on the device is forgiven: only time off the device leaves it in want. Its reports do
    not count. The result depends on no rate above `most`.
    """
    c = snapshot.columns
    with np.errstate(invalid="ignore"):
        is_over = c.rate > most
    if not is_over.any():
        return snapshot
    reading, first_s = c.reading, c.first_token_s
    away_s = np.where(c.is_running, 0.0, c.now_s - c.phase_since_s)
    lacked_s = c.now_s - first_s - reading.generated / most
    since_s = first_s + np.maximum(lacked_s - away_s, 0.0)
    # Before the first token nothing is read.
    since_s = np.where(np.isnan(first_s), np.inf, since_s)
    counted = reading._replace(
        consumed=np.where(is_over, 0.0, reading.consumed),
        since_s=np.where(is_over, since_s, reading.since_s),
        stall_s=np.where(is_over, 0.0, reading.stall_s),
        read_area=np.where(is_over, 0.0, reading.read_area),
    )
    return replace(snapshot, columns=replace(c, rate=np.where(is_over, most, c.rate), reading=counted))
