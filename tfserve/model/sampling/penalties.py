"""Repetition, frequency and presence penalties, and the token counts they need."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from tfserve.model.runner.staging import upload
from tfserve.plan import RowInit

IntArray = npt.NDArray[np.int64]


class Penalties:
    """Penalties of rows. Only rows with penalties get a slot: the list of tokens seen and the output counts.

    Work per step is proportional to the tokens seen, not to the vocabulary. The list may contain a token twice and is
    padded with the row's first token: duplicates compute and write the same value.
    """

    def __init__(self, vocab_size: int, max_num_seqs: int, device: torch.device) -> None:
        self._device = device
        self._slot = np.full(max_num_seqs, -1, np.int64)
        self._length = np.zeros(max_num_seqs, np.int64)  # length of each slot's list
        self._strength = np.zeros((max_num_seqs, 3), np.float32)  # of each slot: repetition, frequency, presence
        self._free: list[int] = list(range(max_num_seqs))[::-1]
        self._seen = torch.zeros((0, 0), dtype=torch.int64, device=device)  # [slots, tokens]
        self._counts = torch.zeros((0, vocab_size), dtype=torch.int32, device=device)  # [slots, V], output tokens only

    def enter(self, init: RowInit) -> None:
        """Count the tokens of a row that asks for penalties."""
        params = init.params
        strength = (params.repetition_penalty, params.frequency_penalty, params.presence_penalty)
        if strength == (1.0, 0.0, 0.0):
            return
        prompt, output = init.token_ids[: init.num_prompt_tokens], init.token_ids[init.num_prompt_tokens :]
        made = np.array(output, np.int64)
        seen, tokens = upload(self._device, np.concatenate([np.unique(prompt), made]).astype(np.int64), made)
        slot = self._slot[init.row] = self._free.pop()
        self._length[slot] = len(seen)
        self._strength[slot] = strength
        self._reserve(slot + 1, len(seen))
        self._seen[slot] = seen[0]
        self._seen[slot, : len(seen)] = seen
        ones = torch.ones(len(made), dtype=torch.int32, device=self._device)
        self._counts[slot].zero_().index_add_(0, tokens, ones)  # bincount waits for the device

    def has(self, row: int) -> bool:
        """True if the row's logits are penalised."""
        return bool(self._slot[row] >= 0)

    def release(self, row: int) -> None:
        """Clear a row."""
        if self._slot[row] >= 0:
            self._free.append(int(self._slot[row]))
            self._slot[row] = -1

    def apply(self, logits: Tensor, rows: IntArray) -> None:
        """Penalise `logits` fp32 [N, V] of `rows` [N] in place.

        Repetition, over prompt and output, as HF's RepetitionPenaltyLogitsProcessor: positive logits are divided,
        others multiplied. Frequency (per occurrence) and presence (once) are subtracted for output tokens only, as in
        OpenAI's API and vLLM.
        """
        places, slots = self._penalised(rows)
        if not slots.size:
            return
        slot, place, strength = upload(self._device, slots, places, self._strength[slots])
        place = place[:, None]
        repetition, frequency, presence = strength[:, :, None].unbind(1)  # [n, 1] each
        seen = self._seen[slot, : int(self._length[slots].max())]  # [n, tokens]
        counts = self._counts[slot[:, None], seen]
        values = logits[place, seen]
        values = torch.where(values > 0, values / repetition, values * repetition)
        logits[place, seen] = values - frequency * counts - presence * (counts > 0)

    def append(self, rows: IntArray, token_ids: Tensor) -> None:
        """Count one more output token int64 [N] for each of `rows` [N]."""
        places, slots = self._penalised(rows)
        if not slots.size:
            return
        self._reserve(0, int(self._length[slots].max()) + 1)
        slot, place, end = upload(self._device, slots, places, self._length[slots])
        tokens = token_ids[place]
        self._seen[slot, end] = tokens
        self._counts[slot, tokens] += 1
        self._length[slots] += 1

    def _penalised(self, rows: IntArray) -> tuple[IntArray, IntArray]:
        """Indices in `rows` that have penalties, and their slots."""
        slots = self._slot[rows]
        places = np.flatnonzero(slots >= 0)
        return places, slots[places]

    def _reserve(self, num_slots: int, num_tokens: int) -> None:
        """Grow to so many slots and to lists of that length, at least twofold each time."""
        slots, width = self._seen.shape
        if num_tokens > width:
            wider = self._seen.new_zeros((slots, max(num_tokens, 2 * width)))
            if width:
                wider[:] = self._seen[:, :1]
            wider[:, :width] = self._seen
            self._seen = wider
        if num_slots > slots:
            more = max(num_slots, min(2 * slots, len(self._slot))) - slots
            self._seen = torch.cat([self._seen, self._seen.new_zeros((more, self._seen.shape[1]))])
            self._counts = torch.cat([self._counts, self._counts.new_zeros((more, self._counts.shape[1]))])
