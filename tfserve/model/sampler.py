"""Logits to tokens for a whole batch at once, each row by its own request's parameters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from tfserve.model.logprobs import TokenScores
from tfserve.model.penalties import Penalties
from tfserve.model.staging import Download, upload
from tfserve.model.token_draw import draw, highest, keep_thresholds, uniform
from tfserve.model.token_masks import TokenMasks
from tfserve.plan import Row, RowInit
from tfserve.types import TokenLogprob

IntArray = npt.NDArray[np.int64]

_NOT_FINITE = (
    "the model's logits for this request are not finite, so no token can be chosen; other requests are not affected."
    " If it happens again with the same prompt, the checkpoint or its dtype is at fault: try dtype float32"
)

_GREEDY_BELOW = 1e-5
"""Temperatures below this are greedy: dividing by them would leave fp32's range."""


@dataclass(frozen=True, slots=True)
class Sampled:
    """One step's choice. The device has it at once; `read` waits for it.

    `token_ids` int64 [N] are on the sampler's device, as is `usable` bool [N]: false where there is no token to choose
    (the logits were NaN, +inf, or everything -inf) and the token is 0. `lost` says why some places cannot go on by
    their grammar: what was chosen there means nothing. `asking` are the rows of `scores`.
    """

    token_ids: Tensor
    usable: Tensor
    chosen: Download  # both of them
    lost: Mapping[int, str]
    asking: list[int]
    scores: TokenScores | None

    def read(self) -> Choices:
        """The same on the host."""
        tokens, usable = self.chosen.lists()
        logprobs: list[TokenLogprob | None] = [None] * len(tokens)
        if self.scores is not None:
            for place, entry in zip(self.asking, self.scores.read(), strict=True):
                logprobs[place] = entry if usable[place] else None
        failed = {place: _NOT_FINITE for place, good in enumerate(usable) if not good} | dict(self.lost)
        return Choices(tuple(tokens), tuple(logprobs), tuple(failed.items()))


class Choices(NamedTuple):
    """What was chosen for N rows: tokens, log probabilities where asked for, and why some places have no token."""

    tokens: tuple[int, ...]
    logprobs: tuple[TokenLogprob | None, ...]
    failed: tuple[tuple[int, str], ...]


class Sampler:
    """Chooses tokens; holds, for each row, its request's parameters and the token counts its penalties need.

    The order of processing is vLLM's: log probabilities from the logits as they come, what `masks` allow where a
    request has a grammar, min_tokens, logit_bias, penalties, greedy choice, temperature, then top-k, top-p, min-p and
    the draw. A row's token depends on its own logits, parameters, seed and position only, never on the rows beside it.
    Parameters live on the host, so that choosing a path never waits for the device; nothing else here does either, but
    for rows with a grammar (see TokenMasks).
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
        self._logprobs = np.full(max_num_seqs, -1, np.int64)  # how many alternatives; -1: none wanted
        self._edited = np.zeros(max_num_seqs, np.bool_)  # has a mask, min_tokens, logit_bias or a penalty
        self._first_free_end = np.zeros(max_num_seqs, np.int64)  # first position where min_tokens lets the text end
        self._ends: dict[int, IntArray] = {}  # by row with min_tokens: its end-of-sequence and stop tokens
        self._bias: dict[int, tuple[IntArray, npt.NDArray[np.float32]]] = {}  # by row: tokens, what to add

    def enter(self, row: RowInit) -> None:
        """Take a request's parameters and count its tokens; a request that comes back is as if it had never left."""
        self.release(row.row)
        params, seat = row.params, row.row
        self._temperature[seat] = params.temperature
        self._top_k[seat] = max(params.top_k, 0)
        self._top_p[seat] = params.top_p
        self._min_p[seat] = params.min_p
        self._seed[seat] = row.seed % 2**64
        self._logprobs[seat] = -1 if params.logprobs is None else params.logprobs
        self._first_free_end[seat] = row.num_prompt_tokens + params.min_tokens
        ends = {*row.eos_token_ids, *params.stop_token_ids}
        if params.min_tokens and ends:
            self._ends[seat] = np.array(sorted(ends), np.int64)
        if params.logit_bias:
            tokens = np.array(list(params.logit_bias), np.int64)
            self._bias[seat] = tokens, np.array(list(params.logit_bias.values()), np.float32)
        self._penalties.enter(row)
        self._edited[seat] = seat in self._ends or seat in self._bias or self._penalties.has(seat)
        if self._masks is not None:
            self._masks.enter(row)
            self._edited[seat] |= self._masks.has(seat)

    def release(self, row: Row) -> None:
        """Forget a row; one that is empty stays so."""
        self._penalties.release(row)
        if self._masks is not None:
            self._masks.release(row)
        self._ends.pop(row, None)
        self._bias.pop(row, None)
        self._edited[row] = False

    def sample(self, logits: Tensor, rows: Sequence[int] | IntArray, positions: Sequence[int]) -> Sampled:
        """Choose a token for each of `rows` [N] from `logits` fp32 [N, V], which are left as they are.

        `positions` are the places the new tokens take in their sequences, prompt included. A row whose logits are not
        finite, or whose grammar allows nothing any more, gets none, and the others get theirs all the same.
        """
        seats, places = np.asarray(rows, np.int64), np.asarray(positions, np.int64)
        tokens, usable = self._choose(self._edit(logits, seats, places), seats, places)
        chosen = Download(tokens, usable)
        self._penalties.append(seats, tokens)
        lost: Mapping[int, str] = {}
        if self._masks is not None:
            lost = self._masks.lost(seats.tolist())
            self._masks.append(seats.tolist(), chosen)
        asking = np.flatnonzero(self._logprobs[seats] >= 0)
        return Sampled(tokens, usable, chosen, lost, asking.tolist(), self._scores(logits, tokens, seats, asking))

    def _edit(self, logits: Tensor, seats: IntArray, places: IntArray) -> Tensor:
        """The logits after masks, min_tokens, logit_bias and penalties: a copy if any row has them, else `logits`."""
        if not self._edited[seats].any():
            return logits
        edited = self._memory("edited", len(logits)).copy_(logits)
        if self._masks is not None:
            self._masks.apply(edited, seats.tolist())
        early = [i for i in np.flatnonzero(places < self._first_free_end[seats]).tolist() if seats[i] in self._ends]
        if early:
            ends = [self._ends[seats[i]] for i in early]
            line, token = upload(self._device, _repeat(early, ends), np.concatenate(ends))
            edited[line, token] = edited.new_full((), -torch.inf)  # a Python number would be copied over, with a wait
        biased = [i for i, seat in enumerate(seats) if seat in self._bias]
        if biased:
            tokens, values = zip(*(self._bias[seats[i]] for i in biased), strict=True)
            arrays = _repeat(biased, tokens), np.concatenate(tokens), np.concatenate(values)
            line, token, value = upload(self._device, *arrays)
            edited[line, token] += value  # no request names a token twice; accumulating would sort on a GPU
        self._penalties.apply(edited, seats)
        return edited

    def _choose(self, logits: Tensor, seats: IntArray, places: IntArray) -> tuple[Tensor, Tensor]:
        """Tokens int64 [N], and bool [N]: false where the logits are not finite and the token means nothing."""
        peak, tokens = highest(logits)
        drawing = np.flatnonzero(self._temperature[seats] >= _GREEDY_BELOW)
        if drawing.size:
            (index,) = upload(self._device, drawing)
            weights = torch.index_select(logits, 0, index, out=self._memory("weights", len(drawing)))
            weights -= peak[index][:, None]
            tokens[index] = self._draw(weights, seats[drawing], places[drawing])
        usable = torch.isfinite(peak)
        return tokens.masked_fill_(~usable, 0), usable

    def _draw(self, logits: Tensor, seats: IntArray, places: IntArray) -> Tensor:
        """Tokens int64 [N] drawn from `logits` [N, V] whose highest is 0 in each row; they are overwritten."""
        temperature = self._temperature[seats]
        if (temperature != 1).any():
            logits /= upload(self._device, temperature)[0][:, None]
        weights = logits.exp_()
        filters = self._top_k[seats], self._top_p[seats], self._min_p[seats]
        scratch = self._memory("filters", len(weights))
        threshold = keep_thresholds(weights, *filters, scratch)
        if threshold is not None:
            weights *= torch.ge(weights, threshold[:, None], out=scratch)
        return draw(weights, uniform(self._seed[seats], places))

    def _memory(self, purpose: str, rows: int) -> Tensor:
        """Memory fp32 [rows, V] that stays: on a CPU, touching fresh pages takes longer than computing on them."""
        held = self._scratch.get(purpose)
        if held is None or len(held) < rows:
            held = self._scratch[purpose] = torch.empty(rows, self._vocab_size, device=self._device)
        return held[:rows]

    def _scores(self, logits: Tensor, tokens: Tensor, seats: IntArray, asking: IntArray) -> TokenScores | None:
        """Log probabilities of the rows `asking` among those of `seats`."""
        if not asking.size:
            return None
        (index,) = upload(self._device, asking)
        raw = torch.index_select(logits, 0, index, out=self._memory("weights", len(asking)))
        return TokenScores(raw, tokens[index], self._logprobs[seats[asking]].tolist())


def _repeat(places: Sequence[int], lists: Sequence[IntArray]) -> IntArray:
    """Each place as many times as its list is long."""
    return np.repeat(np.asarray(places, np.int64), [len(each) for each in lists])
