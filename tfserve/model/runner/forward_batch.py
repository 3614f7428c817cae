"""ForwardBatch: one step's tokens as arrays, and the block tables of the batch slots."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from tfserve.model.runner.staging import upload
from tfserve.plan import BlockId, SlotId, StepPlan


class BlockTables:
    """Each slot's KV blocks, in order: `ids [slots, max_blocks]` int32; entries past a slot's length are stale."""

    def __init__(self, num_rows: int, max_blocks: int) -> None:
        self.ids: NDArray[np.int32] = np.zeros((num_rows, max_blocks), np.int32)
        self._lengths = [0] * num_rows

    def clear(self, slot: SlotId) -> None:
        """Clear a slot's block table."""
        self._lengths[slot] = 0

    def extend(self, slot: SlotId, blocks: Sequence[BlockId]) -> None:
        """Append blocks to a slot. Raises ValueError beyond the longest context that the tables were made for."""
        end = self._lengths[slot] + len(blocks)
        if end > self.ids.shape[1]:
            raise ValueError(f"slot {slot} would hold {end} blocks; max_model_len allows {self.ids.shape[1]}")
        self.ids[slot, self._lengths[slot] : end] = blocks
        self._lengths[slot] = end

    def blocks(self, slot: SlotId) -> NDArray[np.int32]:
        """A slot's block ids, in order."""
        return self.ids[slot, : self._lengths[slot]]

    def length(self, slot: SlotId) -> int:
        """Number of blocks of a slot."""
        return self._lengths[slot]


@dataclass(frozen=True, slots=True)
class ForwardBatch:
    """The inputs of the model and its attention for a step. T tokens of S sequences, decodes first.

    Tensors are int64 on the model's device; arrays are int64 on the host, because they shape the work.
    """

    input_ids: Tensor  # [T]
    positions: Tensor  # [T]
    slots: Tensor  # [T], block * block_size + offset: the slot of each token's K and V, in every layer
    logits_indices: Tensor  # [N], indices of the tokens that need logits
    num_decodes: int  # the first `num_decodes` sequences have one token each
    query_lens: NDArray[np.int64]  # [S], tokens of this step
    context_lens: NDArray[np.int64]  # [S], tokens of the sequence including this step's
    block_tables: NDArray[np.int32]  # [S, W]; entries past a sequence's last block are the null block


def build_batch(plan: StepPlan, tables: BlockTables, last_tokens: Tensor, block_size: int) -> ForwardBatch:
    """Lay out a plan that has sequences. `last_tokens [rows]` int64 has the sampled tokens that only the device knows.

    Raises ValueError if a sequence has too few blocks for its tokens: writing would corrupt another request's KV.
    """
    seqs = plan.seqs
    rows = np.array([seq.slot for seq in seqs])
    starts = np.array([seq.start for seq in seqs])
    query_lens = np.array([seq.n for seq in seqs])
    context_lens = starts + query_lens
    num_blocks = -(-context_lens // block_size)
    for seq, needed in zip(seqs, num_blocks, strict=True):
        if tables.length(seq.slot) < needed:
            raise ValueError(f"{seq.req}: {tables.length(seq.slot)} blocks for {seq.start + seq.n} tokens")
    block_tables = tables.ids[rows, : num_blocks.max()]
    block_tables[np.arange(block_tables.shape[1]) >= num_blocks[:, None]] = 0

    ends = query_lens.cumsum()
    positions = np.arange(ends[-1]) + np.repeat(context_lens - ends, query_lens)
    blocks = block_tables[np.repeat(np.arange(len(seqs)), query_lens), positions // block_size]
    slots = blocks.astype(np.int64) * block_size + positions % block_size
    wanted = ends[np.array([seq.sample for seq in seqs])] - 1

    positions_on_device, slots_on_device, wanted_on_device = upload(last_tokens.device, positions, slots, wanted)
    return ForwardBatch(
        input_ids=_input_ids(plan, ends - query_lens, int(ends[-1]), last_tokens),
        positions=positions_on_device,
        slots=slots_on_device,
        logits_indices=wanted_on_device,
        num_decodes=plan.n_decode,
        query_lens=query_lens,
        context_lens=context_lens,
        block_tables=block_tables,
    )


def _input_ids(plan: StepPlan, offsets: NDArray[np.int64], num_tokens: int, last_tokens: Tensor) -> Tensor:
    """Tokens `[T]`: the plan's own, and from `last_tokens` where the plan leaves them to the device."""
    ids = np.zeros(num_tokens, np.int64)
    rows, holes = [], []
    for seq, offset in zip(plan.seqs, offsets, strict=True):
        if seq.token_ids is None:
            rows.append(int(seq.slot))
            holes.append(offset)
        else:
            ids[offset : offset + seq.n] = seq.token_ids
    input_ids, where, row = upload(last_tokens.device, ids, np.array(holes, np.int64), np.array(rows, np.int64))
    if rows:
        input_ids[where] = last_tokens[row]
    return input_ids
