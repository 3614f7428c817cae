"""Samples tokens for a whole batch at once, each row with its own request's parameters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from tfserve.model.runner.staging import Download, upload
from tfserve.model.sampling.logprobs import TokenScores
from tfserve.model.sampling.penalties import Penalties
from tfserve.model.sampling.token_draw import draw, highest, keep_thresholds, uniform
from tfserve.model.sampling.token_masks import TokenMasks
from tfserve.plan import SlotId, SlotInit
from tfserve.types import TokenLogprob

IntArray = npt.NDArray[np.int64]

_NOT_FINITE = (
    "the model's logits for this request are not finite, so no token can be chosen; other requests are not affected."
    " If it happens again with the same prompt, the checkpoint or its dtype is at fault: try dtype float32"
)

_GREEDY_BELOW = 1e-5
"""Temperatures below this are greedy: dividing by them would overflow fp32."""


@dataclass(frozen=True, slots=True)
class Sampled:
    """One step's samples on the device; `read` waits for them.

    `token_ids` int64 [N] and `usable` bool [N] are on the sampler's device. `usable` is false where no token could be
    chosen (the logits were NaN, +inf, or all -inf); the token is then 0. `lost` maps places whose grammar allows no
    token to the reason; their tokens are meaningless. `asking` are the rows of `scores`.
    """

    token_ids: Tensor
    usable: Tensor
    chosen: Download  # tokens and `usable`
    lost: Mapping[int, str]
    asking: list[int]
    scores: TokenScores | None

    def read(self) -> Choices:
        """The samples on the host."""
        tokens, usable = self.chosen.lists()
        logprobs: list[TokenLogprob | None] = [None] * len(tokens)
        if self.scores is not None:
            for place, entry in zip(self.asking, self.scores.read(), strict=True):
                logprobs[place] = entry if usable[place] else None
        failed = {place: _NOT_FINITE for place, good in enumerate(usable) if not good} | dict(self.lost)
        return Choices(tuple(tokens), tuple(logprobs), tuple(failed.items()))


class Choices(NamedTuple):
    """The samples of N rows: tokens, log probabilities if asked for, and the reasons of places without a token."""

    tokens: tuple[int, ...]
    logprobs: tuple[TokenLogprob | None, ...]
    failed: tuple[tuple[int, str], ...]


class Sampler:
    """Chooses tokens. Holds each slot's parameters and the token counts for its penalties.

    The order of processing is vLLM's: log probabilities from the logits as they come, masks of requests with a grammar,
    min_tokens, logit_bias, penalties, greedy choice, temperature, then top-k, top-p, min-p and the draw. A row's token
    depends on its own logits, parameters, seed and position only, never on the rows beside it. Parameters live on the
    host, so that branches on them do not wait for the device. Only rows with a grammar wait (see TokenMasks).
    """

    def __init__(self, vocab_size: int, max_num_seqs: int, device: str, masks: TokenMasks | None = None) -> None:
        self._device = torch.device(device)
        self._vocab_size = vocab_size
        self._scratch: dict[str, Tensor] = {}  # by purpose: fp32 [largest batch so far, V]
        self._masks = masks
        self._penalties = Penalties(vocab_size, max_num_seqs, self._device)
        self._temperature = np.ones(max_num_seqs, np.float32)
        self._top_k = np.zeros(max_num_seqs, np.int64)
        self._top_p = np.ones(max_num_seqs, np.float64)
        self._min_p = np.zeros(max_num_seqs, np.float64)
        self._seed = np.zeros(max_num_seqs, np.uint64)
        self._logprobs = np.full(max_num_seqs, -1, np.int64)  # number of alternatives; -1: no log probabilities
        self._edited = np.zeros(max_num_seqs, np.bool_)  # has a mask, min_tokens, logit_bias or a penalty
        self._first_free_end = np.zeros(max_num_seqs, np.int64)  # first position where min_tokens allows the end
        self._ends: dict[int, IntArray] = {}  # by slot with min_tokens: its end-of-sequence and stop tokens
        self._bias: dict[int, tuple[IntArray, npt.NDArray[np.float32]]] = {}  # by slot: tokens, and the biases to add

    def enter(self, init: SlotInit) -> None:
        """Set a slot to a request's parameters and count its tokens; after a preemption this restores the state."""
        self.release(init.slot)
        params, slot = init.params, init.slot
        self._temperature[slot] = params.temperature
        self._top_k[slot] = max(params.top_k, 0)
        self._top_p[slot] = params.top_p
        self._min_p[slot] = params.min_p
        self._seed[slot] = init.seed % 2**64
        self._logprobs[slot] = -1 if params.logprobs is None else params.logprobs
        self._first_free_end[slot] = init.num_prompt_tokens + params.min_tokens
        ends = {*init.eos_token_ids, *params.stop_token_ids}
        if params.min_tokens and ends:
            self._ends[slot] = np.array(sorted(ends), np.int64)
        if params.logit_bias:
            tokens = np.array(list(params.logit_bias), np.int64)
            self._bias[slot] = tokens, np.array(list(params.logit_bias.values()), np.float32)
        self._penalties.enter(init)
        self._edited[slot] = slot in self._ends or slot in self._bias or self._penalties.has(slot)
        if self._masks is not None:
            self._masks.enter(init)
            self._edited[slot] |= self._masks.has(slot)

    def release(self, slot: SlotId) -> None:
        """Clear a slot; no effect on an empty one."""
        self._penalties.release(slot)
        if self._masks is not None:
            self._masks.release(slot)
        self._ends.pop(slot, None)
        self._bias.pop(slot, None)
        self._edited[slot] = False

    def sample(self, logits: Tensor, slots: Sequence[int] | IntArray, positions: Sequence[int]) -> Sampled:
        """Choose a token for each of `slots` [N] from `logits` fp32 [N, V]; does not change `logits`.

        `positions` are the new tokens' positions in their sequences, prompt included. A row whose logits are not
        finite, or whose grammar allows no token, gets none; the others are not affected.
        """
        slots, places = np.asarray(slots, np.int64), np.asarray(positions, np.int64)
        tokens, usable = self._choose(self._edit(logits, slots, places), slots, places)
        chosen = Download(tokens, usable)
        self._penalties.append(slots, tokens)
        lost: Mapping[int, str] = {}
        if self._masks is not None:
            lost = self._masks.lost(slots.tolist())
            self._masks.append(slots.tolist(), chosen)
        asking = np.flatnonzero(self._logprobs[slots] >= 0)
        return Sampled(tokens, usable, chosen, lost, asking.tolist(), self._scores(logits, tokens, slots, asking))

    def _edit(self, logits: Tensor, slots: IntArray, places: IntArray) -> Tensor:
        """The logits after masks, min_tokens, logit_bias and penalties: a copy if any row has them, else `logits`."""
        if not self._edited[slots].any():
            return logits
        edited = self._memory("edited", len(logits)).copy_(logits)
        if self._masks is not None:
            self._masks.apply(edited, slots.tolist())
        early = [i for i in np.flatnonzero(places < self._first_free_end[slots]).tolist() if slots[i] in self._ends]
        if early:
            ends = [self._ends[slots[i]] for i in early]
            line, token = upload(self._device, _repeat(early, ends), np.concatenate(ends))
            edited[line, token] = edited.new_full((), -torch.inf)  # copying a Python number would wait for the device
        biased = [i for i, slot in enumerate(slots) if slot in self._bias]
        if biased:
            tokens, values = zip(*(self._bias[slots[i]] for i in biased), strict=True)
            arrays = _repeat(biased, tokens), np.concatenate(tokens), np.concatenate(values)
            line, token, value = upload(self._device, *arrays)
            edited[line, token] += value  # no request names a token twice; accumulate=True would sort on a GPU
        self._penalties.apply(edited, slots)
        return edited

    def _choose(self, logits: Tensor, slots: IntArray, places: IntArray) -> tuple[Tensor, Tensor]:
        """Tokens int64 [N], and bool [N]: false where the logits are not finite and the token is meaningless."""
        peak, tokens = highest(logits)
        drawing = np.flatnonzero(self._temperature[slots] >= _GREEDY_BELOW)
        if drawing.size:
            (index,) = upload(self._device, drawing)
            weights = torch.index_select(logits, 0, index, out=self._memory("weights", len(drawing)))
            weights -= peak[index][:, None]
            tokens[index] = self._draw(weights, slots[drawing], places[drawing])
        usable = torch.isfinite(peak)
        return tokens.masked_fill_(~usable, 0), usable

    def _draw(self, logits: Tensor, slots: IntArray, places: IntArray) -> Tensor:
        """Tokens int64 [N] drawn from `logits` [N, V], with a highest logit of 0 in each row. Overwrites `logits`."""
        temperature = self._temperature[slots]
        if (temperature != 1).any():
            logits /= upload(self._device, temperature)[0][:, None]
        weights = logits.exp_()
        filters = self._top_k[slots], self._top_p[slots], self._min_p[slots]
        scratch = self._memory("filters", len(weights))
        threshold = keep_thresholds(weights, *filters, scratch)
        if threshold is not None:
            weights *= torch.ge(weights, threshold[:, None], out=scratch)
        return draw(weights, uniform(self._seed[slots], places))

    def _memory(self, purpose: str, rows: int) -> Tensor:
        """Reused memory fp32 [rows, V]: on a CPU, the first write to new pages takes longer than the computation."""
        held = self._scratch.get(purpose)
        if held is None or len(held) < rows:
            held = self._scratch[purpose] = torch.empty(rows, self._vocab_size, device=self._device)
        return held[:rows]

    def _scores(self, logits: Tensor, tokens: Tensor, slots: IntArray, asking: IntArray) -> TokenScores | None:
        """Log probabilities of the places `asking` of `slots`."""
        if not asking.size:
            return None
        (index,) = upload(self._device, asking)
        raw = torch.index_select(logits, 0, index, out=self._memory("weights", len(asking)))
        return TokenScores(raw, tokens[index], self._logprobs[slots[asking]].tolist())


def _repeat(places: Sequence[int], lists: Sequence[IntArray]) -> IntArray:
    """Each place, repeated by the length of its list."""
    return np.repeat(np.asarray(places, np.int64), [len(each) for each in lists])
