"""Thoughts among a model's tokens: where a text begins, and how many of its tokens they are. Torch-free."""

from __future__ import annotations

from collections.abc import Sequence

from tfserve.model.text.chat_template import THOUGHT_TAGS
from tfserve.model.text.tokenizer import Tokenizer
from tfserve.types import Place

_BEGIN, _END = THOUGHT_TAGS
_BEGIN_BYTES, _END_BYTES = _BEGIN.encode(), _END.encode()


def first_place(prompt: str, continued: str | None) -> Place:
    """Where an answer to `prompt` begins; `continued` is the text of the final message, if the answer continues it."""
    prompt = prompt[-_TAIL_CHARS:].rstrip()
    if prompt.endswith(_BEGIN):
        return Place.THOUGHTS
    if continued is None:
        return Place.ANSWER if prompt.endswith(_END) else Place.BEFORE
    if continued.rfind(_BEGIN) > continued.rfind(_END):
        return Place.THOUGHTS
    return Place.ANSWER if continued.strip() else Place.BEFORE


_TAIL_CHARS = 1024


class ThoughtCounter:
    """How many of one text's tokens belong to its thoughts: all up to the token that completes </think>.

    The text thinks if it begins with <think>, white space aside, or in its thoughts.
    """

    def __init__(self, place: Place, tokenizer: Tokenizer) -> None:
        self.num_tokens = 0
        self._place = place
        self._tokenizer = tokenizer
        self._num_undecided = 0
        self._tail = b""

    @property
    def is_over(self) -> bool:
        """True once all further tokens are of the answer."""
        return self._place is Place.ANSWER

    def push(self, token_ids: Sequence[int]) -> None:
        """Take more tokens."""
        if self._place is Place.ANSWER:
            return
        for token_id in token_ids:
            self._tail += self._tokenizer.token_bytes(token_id)
            self._num_undecided += 1
            if self._place is Place.BEFORE:
                self._tail = self._tail.lstrip()
                if self._tail.startswith(_BEGIN_BYTES):
                    self._place, self._tail = Place.THOUGHTS, self._tail.removeprefix(_BEGIN_BYTES)
                elif not _BEGIN_BYTES.startswith(self._tail):
                    self._place = Place.ANSWER
                    return
            if self._place is Place.THOUGHTS:
                self.num_tokens += self._num_undecided
                self._num_undecided = 0
                if _END_BYTES in self._tail:
                    self._place = Place.ANSWER
                    return
                self._tail = self._tail[1 - len(_END_BYTES) :]


def thought_counter(begins_in: Place | None, tokenizer: Tokenizer) -> ThoughtCounter | None:
    """A counter for a text that begins there; None where all of it is answer."""
    return ThoughtCounter(begins_in, tokenizer) if begins_in in (Place.BEFORE, Place.THOUGHTS) else None
