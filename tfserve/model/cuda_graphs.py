"""DecodeGraphs: decode steps captured once and replayed, so that a step costs one launch, not a thousand."""

from __future__ import annotations

import logging
import time
from bisect import bisect_left
from dataclasses import dataclass
from itertools import chain

import numpy as np
import torch
from torch import Tensor

from tfserve.model.attention.base import PagedKV
from tfserve.model.attention.paged_backend import PagedBackend
from tfserve.model.attention.paged_kernels import DecodeWork
from tfserve.model.decoder import Decoder
from tfserve.model.forward_batch import ForwardBatch
from tfserve.model.staging import upload

logger = logging.getLogger(__name__)

_SMALL = (1, 2, 4, 8, 16)
_STEP, _LARGE_STEP, _LARGE = 16, 32, 128
_FILLS_CHIP = 0.8
"""flash-attn splits a context over the chip only while tiles would fill less than this share of two per processor."""


def ladder(max_num_seqs: int) -> list[int]:
    """Batch sizes to capture, ascending: what lies between is padded, by a third at most beyond 16."""
    sizes = chain(_SMALL, range(32, _LARGE, _STEP), range(_LARGE, max_num_seqs, _LARGE_STEP))
    return [*(size for size in sizes if size < max_num_seqs), max_num_seqs]


def widths(batch: int, num_kv_heads: int, num_processors: int, max_blocks: int) -> list[int]:
    """Widths of the block table to capture a batch size with, ascending, the last one `max_blocks`.

    The kernel chooses its splits by the width, not by the lengths: a batch too small to fill the chip needs a graph
    for every power of two, or short contexts would be split as long ones are. Larger batches are not split at all.
    """
    if batch * num_kv_heads >= _FILLS_CHIP * 2 * num_processors:
        return [max_blocks]
    powers = (1 << exponent for exponent in range(max_blocks.bit_length()))
    return [*(width for width in powers if width < max_blocks), max_blocks]


@dataclass(frozen=True, slots=True)
class DecodeInputs:
    """Where a captured step reads its inputs; padding rows have context 0 and write to the null block."""

    tokens: Tensor  # int64 [3, B]: input ids, positions, slots
    lens_and_tables: Tensor  # int32 [B + B * W]

    @classmethod
    def zeros(cls, batch: int, width: int, device: torch.device) -> DecodeInputs:
        """Inputs of padding rows only."""
        return cls(
            torch.zeros(3, batch, dtype=torch.int64, device=device),
            torch.zeros(batch * (1 + width), dtype=torch.int32, device=device),
        )

    def work(self) -> DecodeWork:
        """The attention's share, as views."""
        batch = self.tokens.shape[1]
        return DecodeWork(self.lens_and_tables[:batch], self.lens_and_tables[batch:].view(batch, -1))

    def fill(self, batch: ForwardBatch) -> None:
        """Take over a batch of decodes no larger than this; what is left over becomes padding."""
        n, size = len(batch.query_lens), self.tokens.shape[1]
        used = batch.block_tables.shape[1]
        packed = np.zeros(self.lens_and_tables.shape, np.int32)
        packed[:n] = batch.context_lens
        packed[size:].reshape(size, -1)[:n, :used] = batch.block_tables
        self.lens_and_tables.copy_(upload(self.tokens.device, packed)[0])
        for row, source in zip(self.tokens, (batch.input_ids, batch.positions, batch.slots), strict=True):
            row[:n].copy_(source)
        if n < size:
            self.tokens[:, n:].zero_()


class DecodeGraphs:
    """One CUDA graph per rung of the ladder and width, for steps that are all decodes.

    All graphs share one memory pool and are captured largest first, so that the smaller ones fit into what the first
    took. A result is valid until the next `replay`.
    """

    def __init__(
        self, model: Decoder, kv: PagedKV, backend: PagedBackend, *, max_num_seqs: int, max_blocks: int
    ) -> None:
        self._model, self._kv, self._backend = model, kv, backend
        self._max_blocks = max_blocks
        self._sizes = ladder(max_num_seqs)
        self._widths: dict[int, list[int]] = {}
        self._graphs: dict[tuple[int, int], tuple[torch.cuda.CUDAGraph, DecodeInputs, Tensor]] = {}

    @torch.inference_mode()
    def capture(self, stream: torch.cuda.Stream) -> None:
        """Capture every graph on `stream`, where they will be replayed; logs the time and the memory it took."""
        began_s, free_before = time.monotonic(), torch.cuda.mem_get_info()[0]
        processors = torch.cuda.get_device_properties(self._kv.device).multi_processor_count
        pool = torch.cuda.graph_pool_handle()
        for size in reversed(self._sizes):
            self._widths[size] = widths(size, self._kv.num_kv_heads, processors, self._max_blocks)
            for width in reversed(self._widths[size]):
                inputs = DecodeInputs.zeros(size, width, self._kv.device)
                with torch.cuda.stream(stream):
                    self._forward(inputs)  # libraries allocate their workspaces in the first call
                stream.synchronize()
                graph = torch.cuda.CUDAGraph()
                # Other threads (transfers, a step's waiters) may call CUDA meanwhile; only ours must not misbehave.
                with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
                    hidden = self._forward(inputs)
                self._graphs[size, width] = graph, inputs, hidden
        taken = free_before - torch.cuda.mem_get_info()[0]
        seconds = time.monotonic() - began_s
        logger.info("captured %d decode graphs in %.1f s, %.0f MiB", len(self._graphs), seconds, taken / 2**20)

    def replay(self, batch: ForwardBatch) -> Tensor | None:
        """Hidden states `[T, H]` of a step that is all decodes, before the final norm; None if no graph fits it."""
        n = batch.num_decodes
        if n != len(batch.query_lens) or n > self._sizes[-1]:
            return None
        size = self._sizes[bisect_left(self._sizes, n)]
        choices = self._widths[size]
        width = choices[bisect_left(choices, batch.block_tables.shape[1])]
        graph, inputs, hidden = self._graphs[size, width]
        inputs.fill(batch)
        graph.replay()
        return hidden[:n]

    def _forward(self, inputs: DecodeInputs) -> Tensor:
        ids, positions, slots = inputs.tokens
        hidden: Tensor = self._model(ids, positions, self._backend.build_decode(slots, inputs.work(), self._kv))
        return hidden
