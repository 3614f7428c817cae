"""ModelRunner: a step's plan in, tokens out. It owns the rows; requests and blocks belong to others."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch

from tfserve.model.attention.base import AttentionBackend, PagedKV
from tfserve.model.decoder import Decoder
from tfserve.model.forward_batch import BlockTables, build_batch
from tfserve.model.logprobs import PromptScorer
from tfserve.model.sampler import Sampler
from tfserve.model.token_masks import TokenMasks
from tfserve.plan import Fence, InFlight, StepPlan, StepResult


class ModelRunner:
    """Runs plans on one device, one at a time: `launch` computes the step, and `result` hands it over.

    A row is a request's seat: its line of the block table, its last sampled token and its sampling state. A step that
    fails raises from `result`; every row keeps its seat, and plans without the failed step's requests are
    unaffected.
    """

    def __init__(
        self,
        model: Decoder,
        kv: PagedKV,
        backend: AttentionBackend,
        *,
        max_num_seqs: int,
        max_model_len: int,
        masks: TokenMasks | None = None,
    ) -> None:
        self._model = model
        self._kv = kv
        self._backend = backend
        self._sampler = Sampler(model.config.vocab_size, max_num_seqs, str(kv.device), masks)
        self._prompts = PromptScorer(model.logits)
        self._tables = BlockTables(max_num_seqs, -(-max_model_len // kv.block_size))
        self._last_tokens = torch.zeros(max_num_seqs, dtype=torch.int64, device=kv.device)

    @torch.inference_mode()
    def launch(self, plan: StepPlan) -> InFlight:
        """Run a plan. Raises nothing: what goes wrong comes out of `result`."""
        began_s = time.perf_counter()
        try:
            self._seat(plan)
            # A result is read on the host, so the device has finished by then and wall time is the device's time.
            result = self._step(plan, began_s)
        except Exception as error:
            self._scrub(plan)
            return FailedStep(plan.step, error)
        return FinishedStep(result)

    def _seat(self, plan: StepPlan) -> None:
        """Let rows go, let others in, and extend the block tables."""
        for row in plan.released_rows:
            self._tables.clear(row)
            self._sampler.release(row)
            self._prompts.release(row)
        for entry in plan.entered:
            self._tables.clear(entry.row)
            self._tables.extend(entry.row, entry.blocks)
            self._sampler.enter(entry)
            self._prompts.enter(entry)
        for seq in plan.seqs:
            self._tables.extend(seq.row, seq.new_blocks)

    def _scrub(self, plan: StepPlan) -> None:
        """Zero the KV of a failed step: a NaN in it would reach the next owner of its blocks."""
        for seq in plan.seqs:
            blocks = torch.from_numpy(self._tables.blocks(seq.row).astype("int64")).to(self._kv.device)
            for keys, values in self._kv.layers:
                keys[blocks] = 0
                values[blocks] = 0

    def _step(self, plan: StepPlan, began_s: float) -> StepResult:
        if not plan.seqs:
            return StepResult(plan.step, (), (), 0.0)
        batch = build_batch(plan, self._tables, self._last_tokens, self._kv.block_size)
        hidden = self._model(batch.input_ids, batch.positions, self._backend.build(batch, self._kv))
        scored = self._prompts.score(plan.seqs, hidden)
        if not len(batch.logits_indices):
            return StepResult(plan.step, (), (), time.perf_counter() - began_s, scored)
        logits = self._model.logits(hidden[batch.logits_indices])
        sampling = [seq for seq in plan.seqs if seq.sample]
        rows = [int(seq.row) for seq in sampling]
        sampled = self._sampler.sample(logits, rows, [seq.start + seq.n for seq in sampling])
        self._last_tokens[torch.tensor(rows)] = sampled.token_ids
        tokens = tuple(sampled.token_ids.tolist())
        return StepResult(plan.step, tokens, tuple(sampled.logprobs), time.perf_counter() - began_s, scored)


@dataclass(frozen=True, slots=True)
class FinishedStep:
    """A step that has run."""

    outcome: StepResult

    @property
    def fence(self) -> Fence:
        """The step's number."""
        return self.outcome.step

    def ready(self) -> bool:
        """True: the step has run."""
        return True

    def result(self) -> StepResult:
        """What the step produced."""
        return self.outcome


@dataclass(frozen=True, slots=True)
class FailedStep:
    """A step that raised."""

    fence: Fence
    error: Exception

    def ready(self) -> bool:
        """True: the step is over."""
        return True

    def result(self) -> StepResult:
        """Raise what the step raised."""
        raise self.error
