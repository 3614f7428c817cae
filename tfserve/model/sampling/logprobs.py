"""Log probabilities from logits: of chosen tokens, and of a prompt's own tokens as they are computed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from torch import Tensor

from tfserve.model.runner.staging import Download, upload
from tfserve.plan import PromptLogprobs, SeqStep, SlotId, SlotInit
from tfserve.types import RequestId, TokenLogprob

_ROWS_AT_ONCE = 64
"""Prompt positions scored at a time: logits of a long prompt with a large vocabulary take gigabytes."""


class TokenScores:
    """Log probabilities of tokens, computed at once and read later.

    For each row of `logits` fp32 [N, V]: the token in `tokens` int64 [N] and the best `counts` tokens. Overwrites
    `logits`.
    """

    def __init__(self, logits: Tensor, tokens: Tensor, counts: Sequence[int]) -> None:
        picked = logits.gather(1, tokens[:, None])
        best, best_tokens = logits.topk(min(max(*counts, 1), logits.shape[1]))
        peak = best[:, :1]
        norm = logits.sub_(peak).exp_().sum(-1, keepdim=True).log_() + peak  # [N, 1]
        self._counts = counts
        self._arriving = Download(tokens, (picked - norm)[:, 0], best_tokens, best - norm)

    def read(self) -> list[TokenLogprob]:
        """An entry for each row; waits for the device."""
        columns = zip(self._counts, *self._arriving.lists(), strict=True)
        return [
            TokenLogprob(token, value, tuple(zip(top_tokens[:count], top_values[:count], strict=True)))
            for count, token, value, top_tokens, top_values in columns
        ]


@dataclass(frozen=True, slots=True)
class PromptScores:
    """Scores of a request's prompt tokens from `start` on, in parts."""

    req: RequestId
    start: int
    parts: tuple[TokenScores, ...]

    def read(self) -> PromptLogprobs:
        """The scores for the step's result; waits for the device."""
        return PromptLogprobs(self.req, self.start, tuple(entry for part in self.parts for entry in part.read()))


class PromptScorer:
    """Scores the prompts of requests that ask for it; costs nothing if none does.

    `logits` turns hidden states [N, H] into fp32 logits [N, V].
    """

    def __init__(self, logits: Callable[[Tensor], Tensor]) -> None:
        self._logits = logits
        self._prompts: dict[
            SlotId, tuple[tuple[int, ...], int]
        ] = {}  # by slot: the prompt and the number of alternatives

    def enter(self, init: SlotInit) -> None:
        """A request takes a slot."""
        self.release(init.slot)
        if init.params.prompt_logprobs is not None:
            self._prompts[init.slot] = init.token_ids[: init.num_prompt_tokens], init.params.prompt_logprobs

    def release(self, slot: SlotId) -> None:
        """Clear a slot; no effect on an empty one."""
        self._prompts.pop(slot, None)

    def score(self, seqs: Sequence[SeqStep], hidden: Tensor) -> tuple[PromptScores, ...]:
        """Log probabilities of the prompt tokens that follow this step's tokens, from their states `hidden` [T, H]."""
        if not self._prompts:
            return ()
        scored = []
        offset = 0
        for seq in seqs:
            prompt, count = self._prompts.get(seq.slot, ((), 0))
            if targets := prompt[seq.start + 1 : seq.start + 1 + seq.n]:
                states = hidden[offset : offset + len(targets)]
                scored.append(PromptScores(seq.req, seq.start + 1, self._parts(states, targets, count)))
            offset += seq.n
        return tuple(scored)

    def _parts(self, states: Tensor, targets: Sequence[int], count: int) -> tuple[TokenScores, ...]:
        (tokens,) = upload(states.device, np.array(targets, np.int64))
        return tuple(
            TokenScores(self._logits(states[begin:end]), tokens[begin:end], [count] * (end - begin))
            for begin, end in pairwise([*range(0, len(targets), _ROWS_AT_ONCE), len(targets)])
        )
