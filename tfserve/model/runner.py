"""ModelRunner: a step's plan in, tokens out. It owns the rows; requests and blocks belong to others."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tfserve.model.attention.base import AttentionBackend, PagedKV
from tfserve.model.cuda_graphs import DecodeGraphs
from tfserve.model.decoder import Decoder
from tfserve.model.forward_batch import BlockTables, ForwardBatch, build_batch
from tfserve.model.logprobs import PromptScorer
from tfserve.model.sampler import NonFiniteLogitsError, Sampled, Sampler
from tfserve.model.token_masks import TokenMasks
from tfserve.plan import Fence, InFlight, PromptLogprobs, SeqStep, StepPlan, StepResult
from tfserve.types import RequestId, TokenLogprob

Failures = tuple[tuple[RequestId, str], ...]

_NOT_FINITE = (
    "the model's logits for this request are not finite, so no token can be chosen; other requests are not affected."
    " If it happens again with the same prompt, the checkpoint or its dtype is at fault: try dtype float32"
)


class ModelRunner:
    """Runs plans on one device, one at a time: `launch` computes the step, and `result` hands it over.

    A row is a request's seat: its line of the block table, its last sampled token and its sampling state. A step that
    fails raises from `result`; every row keeps its seat, and plans without the failed step's requests are
    unaffected. Where only some rows' logits are not finite, only their requests fail: `StepResult.failed` names them.
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
        """Run a plan. Raises nothing: what goes wrong comes out of `result`."""
        began_s = time.perf_counter()
        try:
            self._seat(plan)
            # A result is read on the host, so the device has finished by then and wall time is the device's time.
            result = self._step(plan, began_s)
        except Exception as error:
            self._scrub(plan.seqs)
            self._ended_s = time.perf_counter()
            return FailedStep(plan.step, error)
        return FinishedStep(result)

    def close(self) -> None:
        """See plan.Runner; nothing is under way once `launch` has returned."""

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

    def _scrub(self, seqs: Iterable[SeqStep]) -> None:
        """Zero the KV of what failed: a NaN in it would reach the next owner of its blocks."""
        for seq in seqs:
            blocks = torch.from_numpy(self._tables.blocks(seq.row).astype("int64")).to(self._kv.device)
            for keys, values in self._kv.layers:
                keys[blocks] = 0
                values[blocks] = 0

    def _step(self, plan: StepPlan, began_s: float) -> StepResult:
        if not plan.seqs:
            return StepResult(plan.step, (), (), 0.0)
        batch = build_batch(plan, self._tables, self._last_tokens, self._kv.block_size)
        hidden = self._hidden(batch)
        scored = self._prompts.score(plan.seqs, hidden)
        if not len(batch.logits_indices):
            return self._outcome(plan, began_s, scored=scored)
        logits = self._model.logits(hidden[batch.logits_indices])
        sampling = [seq for seq in plan.seqs if seq.sample]
        sampled, failed = self._sample(logits, sampling)
        self._last_tokens[torch.tensor([int(seq.row) for seq in sampling])] = sampled.token_ids
        tokens, logprobs = tuple(sampled.token_ids.tolist()), tuple(sampled.logprobs)
        return self._outcome(plan, began_s, tokens, logprobs, failed=failed, scored=scored)

    def _outcome(
        self,
        plan: StepPlan,
        began_s: float,
        tokens: tuple[int, ...] = (),
        logprobs: tuple[TokenLogprob | None, ...] = (),
        *,
        failed: Failures = (),
        scored: tuple[PromptLogprobs, ...] = (),
    ) -> StepResult:
        before_s, self._ended_s = self._ended_s, time.perf_counter()
        idle_s = 0.0 if before_s is None else began_s - before_s
        return StepResult(plan.step, tokens, logprobs, self._ended_s - began_s, idle_s, failed, scored)

    def _sample(self, logits: Tensor, seqs: Sequence[SeqStep]) -> tuple[Sampled, Failures]:
        """A token for each of `seqs` [N] from `logits` [N, vocab]; who gets none (there the token is 0), and why."""
        rows, positions = [int(seq.row) for seq in seqs], [seq.start + seq.n for seq in seqs]
        try:
            return self._sampler.sample(logits, rows, positions), ()
        except NonFiniteLogitsError as error:
            good = [i for i, row in enumerate(rows) if row not in error.rows]
            bad = [seq for seq in seqs if seq.row in error.rows]
        self._scrub(bad)
        tokens = torch.zeros(len(seqs), dtype=torch.int64, device=logits.device)
        logprobs: list[TokenLogprob | None] = [None] * len(seqs)
        if good:
            index = torch.tensor(good, device=logits.device)
            part = self._sampler.sample(logits[index], [rows[i] for i in good], [positions[i] for i in good])
            tokens[index] = part.token_ids
            for i, logprob in zip(good, part.logprobs, strict=True):
                logprobs[i] = logprob
        return Sampled(tokens, logprobs), tuple((seq.req, _NOT_FINITE) for seq in bad)

    def _hidden(self, batch: ForwardBatch) -> Tensor:
        """Run the layers; hidden states `[T, H]` of the batch's tokens (of a graph perhaps more rows, at the end)."""
        hidden = None if self._graphs is None else self._graphs.replay(batch)
        if hidden is None:
            hidden = self._model(batch.input_ids, batch.positions, self._backend.build(batch, self._kv))
        return hidden


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
