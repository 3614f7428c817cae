"""DecodeGraphs: decode steps captured as CUDA graphs, so that a step is one launch instead of a thousand."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass
from itertools import chain
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from tfserve.model.attention.base import PagedKV
from tfserve.model.attention.paged_backend import PagedBackend
from tfserve.model.attention.paged_kernels import DecodeWork
from tfserve.model.decoder import Decoder
from tfserve.model.runner.forward_batch import ForwardBatch
from tfserve.model.runner.staging import upload

_SMALL = (1, 2, 4, 8, 16)
_STEP, _LARGE_STEP, _LARGE = 16, 32, 128
_FILLS_CHIP = 0.8
"""flash-attn splits a context over the chip only while the tiles fill less than this share of two per processor."""


def ladder(max_num_seqs: int) -> list[int]:
    """Batch sizes to capture, ascending. Other sizes are padded, by at most a third beyond 16."""
    sizes = chain(_SMALL, range(32, _LARGE, _STEP), range(_LARGE, max_num_seqs, _LARGE_STEP))
    return [*(size for size in sizes if size < max_num_seqs), max_num_seqs]


def widths(batch: int, num_kv_heads: int, num_processors: int, max_blocks: int) -> list[int]:
    """Widths of the block table to capture for a batch size, ascending; the last one is `max_blocks`.

    The kernel chooses its splits by the width, not by the lengths. A batch too small to fill the chip needs a graph for
    every power of two; otherwise short contexts would be split like long ones. Larger batches are never split.
    """
    if batch * num_kv_heads >= _FILLS_CHIP * 2 * num_processors:
        return [max_blocks]
    powers = (1 << exponent for exponent in range(max_blocks.bit_length()))
    return [*(width for width in powers if width < max_blocks), max_blocks]


@dataclass(frozen=True, slots=True)
class DecodeInputs:
    """The inputs of a captured step; padding rows have context 0 and write to the null block."""

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
        """The attention's inputs, as views."""
        batch = self.tokens.shape[1]
        return DecodeWork(self.lens_and_tables[:batch], self.lens_and_tables[batch:].view(batch, -1))

    def fill(self, batch: ForwardBatch) -> None:
        """Copy a batch of decodes that is not larger than this one; the remaining rows become padding."""
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


class Recorder(Protocol):
    """Records GPU work to repeat it later."""

    def record(self, work: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        """A function that repeats `work`, and the tensor that each repetition writes its result to."""
        ...


class CudaRecorder:
    """Captures CUDA graphs, all in one memory pool, on `stream`, where they are also replayed."""

    def __init__(self, stream: torch.cuda.Stream) -> None:
        self._stream = stream
        self._pool = torch.cuda.graph_pool_handle()

    def record(self, work: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        """See Recorder; runs `work` twice."""
        self._stream.wait_stream(torch.cuda.current_stream())  # the inputs were made on the default stream
        with torch.cuda.stream(self._stream):
            work()  # libraries allocate their workspaces in the first call
        self._stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        # Other threads, for example the ones that wait for copies, may call CUDA during the capture.
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
            result = work()
        return graph.replay, result


class DecodeGraphs:
    """One recorded step per batch size and width, for steps of decodes only.

    They are recorded largest first, so that the smaller ones reuse the memory of the first. A result is valid until the
    next `replay`.
    """

    @torch.inference_mode()
    def __init__(
        self,
        model: Decoder,
        kv: PagedKV,
        backend: PagedBackend,
        recorder: Recorder,
        *,
        max_num_seqs: int,
        max_blocks: int,
        num_processors: int,
    ) -> None:
        self._sizes = ladder(max_num_seqs)
        self._widths: dict[int, list[int]] = {}
        self._graphs: dict[tuple[int, int], tuple[Callable[[], None], DecodeInputs, Tensor]] = {}
        for size in reversed(self._sizes):
            self._widths[size] = widths(size, kv.num_kv_heads, num_processors, max_blocks)
            for width in reversed(self._widths[size]):
                inputs = DecodeInputs.zeros(size, width, kv.device)

                def forward(inputs: DecodeInputs = inputs) -> Tensor:
                    ids, positions, slots = inputs.tokens
                    hidden: Tensor = model(ids, positions, backend.build_decode(slots, inputs.work(), kv))
                    return hidden

                replay, hidden = recorder.record(forward)
                self._graphs[size, width] = replay, inputs, hidden

    def __len__(self) -> int:
        return len(self._graphs)

    def replay(self, batch: ForwardBatch) -> Tensor | None:
        """Hidden states `[T, H]` of a step of decodes only, before the final norm; None if no graph fits."""
        n = batch.num_decodes
        if n != len(batch.query_lens) or n > self._sizes[-1]:
            return None
        size = self._sizes[bisect_left(self._sizes, n)]
        choices = self._widths[size]
        width = choices[bisect_left(choices, batch.block_tables.shape[1])]
        replay, inputs, hidden = self._graphs[size, width]
        inputs.fill(batch)
        replay()
        return hidden[:n]
