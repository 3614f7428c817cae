"""Log probabilities from logits: of chosen tokens, and of a prompt's own tokens as they are computed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from tfserve.plan import PromptLogprobs, Row, RowInit, SeqStep
from tfserve.types import TokenLogprob

_ROWS_AT_ONCE = 64
"""Prompt positions whose logits exist at the same time: a long prompt over a large vocabulary would fill gigabytes."""


def token_logprobs(logits: Tensor, tokens: Tensor, counts: Sequence[int]) -> list[TokenLogprob]:
    """For each row of `logits` fp32 [N, V]: its entry of `tokens` int64 [N] and the best `counts` of the row.

    `logits` are overwritten.
    """
    picked = logits.gather(1, tokens[:, None])
    best, best_tokens = logits.topk(min(max(*counts, 1), logits.shape[1]))
    peak = best[:, :1]
    norm = logits.sub_(peak).exp_().sum(-1, keepdim=True).log_() + peak  # [N, 1]
    columns = zip(
        counts,
        tokens.tolist(),
        (picked - norm)[:, 0].tolist(),
        best_tokens.tolist(),
        (best - norm).tolist(),
        strict=True,
    )
    return [
        TokenLogprob(token, value, tuple(zip(top_tokens[:count], top_values[:count], strict=True)))
        for count, token, value, top_tokens, top_values in columns
    ]


class PromptScorer:
    """Scores the prompts of those rows whose requests ask for it; costs nothing where none does.

    `logits` turns hidden states [N, H] into fp32 logits [N, V].
    """

    def __init__(self, logits: Callable[[Tensor], Tensor]) -> None:
        self._logits = logits
        self._prompts: dict[Row, tuple[tuple[int, ...], int]] = {}  # by row: the prompt and how many alternatives

    def enter(self, row: RowInit) -> None:
        """A request takes a row."""
        self.release(row.row)
        if row.params.prompt_logprobs is not None:
            self._prompts[row.row] = row.token_ids[: row.num_prompt_tokens], row.params.prompt_logprobs

    def release(self, row: Row) -> None:
        """Forget a row; one that is empty stays so."""
        self._prompts.pop(row, None)

    def score(self, seqs: Sequence[SeqStep], hidden: Tensor) -> tuple[PromptLogprobs, ...]:
        """Log probabilities of the prompt tokens that follow those of this step, whose states are `hidden` [T, H]."""
        if not self._prompts:
            return ()
        scored = []
        offset = 0
        for seq in seqs:
            prompt, count = self._prompts.get(seq.row, ((), 0))
            if targets := prompt[seq.start + 1 : seq.start + 1 + seq.n]:
                states = hidden[offset : offset + len(targets)]
                scored.append(PromptLogprobs(seq.req, seq.start + 1, self._entries(states, targets, count)))
            offset += seq.n
        return tuple(scored)

    def _entries(self, states: Tensor, targets: Sequence[int], count: int) -> tuple[TokenLogprob, ...]:
        entries: list[TokenLogprob] = []
        for begin, end in pairwise([*range(0, len(targets), _ROWS_AT_ONCE), len(targets)]):
            tokens = torch.tensor(targets[begin:end], device=states.device)
            entries += token_logprobs(self._logits(states[begin:end]), tokens, [count] * (end - begin))
        return tuple(entries)
