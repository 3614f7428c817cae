"""Repetition, frequency and presence penalties, and the token counts they need."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from tfserve.model.runner.staging import upload
from tfserve.plan import SlotInit

IntArray = npt.NDArray[np.int64]


class Penalties:
    """Penalties of slots. Only slots with penalties get a line: the list of tokens seen and the output counts.

    Work per step is proportional to the tokens seen, not to the vocabulary. The list may contain a token twice and is
    padded with the slot's first token: duplicates compute and write the same value.
    """

    def __init__(self, vocab_size: int, max_num_seqs: int, device: torch.device) -> None:
        self._device = device
        self._line = np.full(max_num_seqs, -1, np.int64)
        self._length = np.zeros(max_num_seqs, np.int64)  # length of each line's list
        self._strength = np.zeros((max_num_seqs, 3), np.float32)  # of each line: repetition, frequency, presence
        self._free: list[int] = list(range(max_num_seqs))[::-1]
        self._seen = torch.zeros((0, 0), dtype=torch.int64, device=device)  # [lines, tokens]
        self._counts = torch.zeros((0, vocab_size), dtype=torch.int32, device=device)  # [lines, V], output tokens only

    def enter(self, init: SlotInit) -> None:
        """Count the tokens of a slot that asks for penalties."""
        params = init.params
        strength = (params.repetition_penalty, params.frequency_penalty, params.presence_penalty)
        if strength == (1.0, 0.0, 0.0):
            return
        prompt, output = init.token_ids[: init.num_prompt_tokens], init.token_ids[init.num_prompt_tokens :]
        made = np.array(output, np.int64)
        seen, tokens = upload(self._device, np.concatenate([np.unique(prompt), made]).astype(np.int64), made)
        line = self._line[init.slot] = self._free.pop()
        self._length[line] = len(seen)
        self._strength[line] = strength
        self._reserve(line + 1, len(seen))
        self._seen[line] = seen[0]
        self._seen[line, : len(seen)] = seen
        ones = torch.ones(len(made), dtype=torch.int32, device=self._device)
        self._counts[line].zero_().index_add_(0, tokens, ones)  # bincount waits for the device

    def has(self, slot: int) -> bool:
        """True if the slot's logits are penalised."""
        return bool(self._line[slot] >= 0)

    def release(self, slot: int) -> None:
        """Clear a slot."""
        if self._line[slot] >= 0:
            self._free.append(int(self._line[slot]))
            self._line[slot] = -1

    def apply(self, logits: Tensor, slots: IntArray) -> None:
        """Penalise `logits` fp32 [N, V] of `slots` [N] in place.

        Repetition, over prompt and output, as HF's RepetitionPenaltyLogitsProcessor: positive logits are divided,
        others multiplied. Frequency (per occurrence) and presence (once) are subtracted for output tokens only, as in
        OpenAI's API and vLLM.
        """
        places, lines = self._penalised(slots)
        if not lines.size:
            return
        line, place, strength = upload(self._device, lines, places, self._strength[lines])
        place = place[:, None]
        repetition, frequency, presence = strength[:, :, None].unbind(1)  # [n, 1] each
        seen = self._seen[line, : int(self._length[lines].max())]  # [n, tokens]
        counts = self._counts[line[:, None], seen]
        values = logits[place, seen]
        values = torch.where(values > 0, values / repetition, values * repetition)
        logits[place, seen] = values - frequency * counts - presence * (counts > 0)

    def append(self, slots: IntArray, token_ids: Tensor) -> None:
        """Count one more output token int64 [N] for each of `slots` [N]."""
        places, lines = self._penalised(slots)
        if not lines.size:
            return
        self._reserve(0, int(self._length[lines].max()) + 1)
        line, place, end = upload(self._device, lines, places, self._length[lines])
        tokens = token_ids[place]
        self._seen[line, end] = tokens
        self._counts[line, tokens] += 1
        self._length[lines] += 1

    def _penalised(self, slots: IntArray) -> tuple[IntArray, IntArray]:
        """Indices in `slots` that have penalties, and their lines."""
        lines = self._line[slots]
        places = np.flatnonzero(lines >= 0)
        return places, lines[places]

    def _reserve(self, num_lines: int, num_tokens: int) -> None:
        """Grow to so many lines and to lists of that length, at least twofold each time."""
        lines, width = self._seen.shape
        if num_tokens > width:
            wider = self._seen.new_zeros((lines, max(num_tokens, 2 * width)))
            if width:
                wider[:] = self._seen[:, :1]
            wider[:, :width] = self._seen
            self._seen = wider
        if num_lines > lines:
            more = max(num_lines, min(2 * lines, len(self._line))) - lines
            self._seen = torch.cat([self._seen, self._seen.new_zeros((more, self._seen.shape[1]))])
            self._counts = torch.cat([self._counts, self._counts.new_zeros((more, self._counts.shape[1]))])
