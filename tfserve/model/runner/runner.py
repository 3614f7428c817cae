"""ModelRunner: executes a step's plan and returns tokens. It owns the slots, but no request and no block."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import chain, compress

import numpy as np
import torch
from torch import Tensor

from tfserve.errors import failures
from tfserve.model.attention.base import AttentionBackend, PagedKV
from tfserve.model.decoder import Decoder
from tfserve.model.runner.cuda_graphs import DecodeGraphs
from tfserve.model.runner.forward_batch import BlockTables, ForwardBatch, build_batch
from tfserve.model.runner.staging import upload
from tfserve.model.sampling.logprobs import PromptScorer, PromptScores
from tfserve.model.sampling.sampler import Choices, Sampled, Sampler
from tfserve.model.sampling.token_masks import TokenMasks
from tfserve.plan import InFlight, SeqStep, StepId, StepPlan, StepResult
from tfserve.types import RequestId


class ModelRunner:
    """Runs plans on one device: `launch` starts a step, `result` waits for it.

    A slot holds a request's block table, its last sampled token and its sampling state. A step that fails raises from
    `result`; all slots stay, and plans without the failed step's requests are unaffected. If only some slots have no
    token (their logits are not finite, or their grammar allows none), only their requests fail: see
    `StepResult.failed`.

    On a GPU `launch` waits for the device in two cases only: for a grammar (TokenMasks), and with an attention backend
    that reads stale KV.
    """

    def __init__(
        self,
        model: Decoder,
        kv: PagedKV,
        backend: AttentionBackend,
        *,
        max_num_seqs: int,
        max_model_len: int,
        graphs: DecodeGraphs | None = None,
        masks: TokenMasks | None = None,
    ) -> None:
        self._model = model
        self._graphs = graphs
        self._kv = kv
        self._backend = backend
        self._sampler = Sampler(model.config.vocab_size, max_num_seqs, str(kv.device), masks)
        self._prompts = PromptScorer(model.logits)
        self._tables = BlockTables(max_num_seqs, -(-max_model_len // kv.block_size))
        self._last_tokens = torch.zeros(max_num_seqs, dtype=torch.int64, device=kv.device)
        self._ended_s: float | None = None

    @torch.inference_mode()
    def launch(self, plan: StepPlan) -> InFlight:
        """Start a step. Does not raise: errors come from `result`."""
        began_s, before_s = time.perf_counter(), self._ended_s
        try:
            self._assign(plan)
            if not plan.seqs:
                return LaunchedStep(plan.step)
            sampled, prompts = self._step(plan)
        except failures() as error:
            self._scrub(plan.seqs)
            self._ended_s = time.perf_counter()
            return FailedStep(error)
        # On a CPU the step has run by now, so wall time is its device time; CudaStreamRunner measures a GPU's.
        self._ended_s = time.perf_counter()
        return LaunchedStep(
            plan.step,
            tuple(seq.req for seq in plan.seqs if seq.sample),
            sampled,
            prompts,
            device_s=self._ended_s - began_s,
            idle_s=0.0 if before_s is None else began_s - before_s,
        )

    def close(self) -> None:
        """See plan.Runner; there are no threads here, and CudaStreamRunner waits for its stream."""

    def _assign(self, plan: StepPlan) -> None:
        """Release slots, fill others, and extend the block tables."""
        for slot in plan.released_slots:
            self._tables.clear(slot)
            self._sampler.release(slot)
            self._prompts.release(slot)
        for entry in plan.entered:
            self._tables.clear(entry.slot)
            self._tables.extend(entry.slot, entry.blocks)
            self._sampler.enter(entry)
            self._prompts.enter(entry)
        for seq in plan.seqs:
            self._tables.extend(seq.slot, seq.new_blocks)

    def _scrub(self, seqs: Iterable[SeqStep]) -> None:
        """Zero the KV of failed sequences: a NaN in it would reach the next request with these blocks."""
        for seq in seqs:
            (blocks,) = upload(self._kv.device, self._tables.blocks(seq.slot).astype("int64"))
            for pages in chain.from_iterable(self._kv.layers):
                pages.index_fill_(0, blocks, 0)

    def _step(self, plan: StepPlan) -> tuple[Sampled | None, tuple[PromptScores, ...]]:
        """Run layers, scorer and sampler; None instead of a sample if no sequence needs one."""
        batch = build_batch(plan, self._tables, self._last_tokens, self._kv.block_size)
        hidden = self._hidden(batch)
        scored = self._prompts.score(plan.seqs, hidden)
        sampling = [seq for seq in plan.seqs if seq.sample]
        if not sampling:
            return None, scored
        logits = self._model.logits(hidden[batch.logits_indices])
        slots = np.array([seq.slot for seq in sampling], np.int64)
        sampled = self._sampler.sample(logits, slots, [seq.start + seq.n for seq in sampling])
        (index,) = upload(self._kv.device, slots)
        self._last_tokens.index_copy_(0, index, sampled.token_ids)
        if self._backend.reads_stale_kv and not bool(sampled.usable.all()):
            self._scrub(compress(sampling, (~sampled.usable).tolist()))
        return sampled, scored

    def _hidden(self, batch: ForwardBatch) -> Tensor:
        """Run the layers. Returns hidden states `[T, H]` of the batch's tokens; a graph may append padding rows."""
        hidden = None if self._graphs is None else self._graphs.replay(batch)
        if hidden is None:
            hidden = self._model(batch.input_ids, batch.positions, self._backend.build(batch, self._kv))
        return hidden


@dataclass(frozen=True, slots=True)
class LaunchedStep:
    """A launched step; `sampling` are the requests that `sampled` has tokens for."""

    step: StepId
    sampling: tuple[RequestId, ...] = ()
    sampled: Sampled | None = None
    prompts: tuple[PromptScores, ...] = ()
    device_s: float = 0.0
    idle_s: float = 0.0

    def result(self) -> StepResult:
        """The step's result; waits for the device."""
        chosen = Choices((), (), ()) if self.sampled is None else self.sampled.read()
        return StepResult(
            self.step,
            chosen.tokens,
            chosen.logprobs,
            self.device_s,
            self.idle_s,
            tuple((self.sampling[place], reason) for place, reason in chosen.failed),
            tuple(scores.read() for scores in self.prompts),
        )


@dataclass(frozen=True, slots=True)
class FailedStep:
    """A step that raised."""

    error: BaseException

    def result(self) -> StepResult:
        """Raise the step's exception."""
        raise self.error
