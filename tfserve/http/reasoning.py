"""Thoughts in what a model writes: told from its answer while the text streams in."""

from __future__ import annotations

import enum
from collections.abc import Sequence
from typing import NamedTuple

from tfserve.http.tool_parsing import overlap
from tfserve.model.text.chat_template import THOUGHT_TAGS
from tfserve.model.text.tokenizer import Tokenizer

_BEGIN, _END = THOUGHT_TAGS
_BEGIN_BYTES, _END_BYTES = _BEGIN.encode(), _END.encode()


class Place(enum.Enum):
    """Where a text is: before its first word, in its thoughts, behind them, or in its answer."""

    BEFORE = enum.auto()
    THOUGHTS = enum.auto()
    BEHIND = enum.auto()
    ANSWER = enum.auto()


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


class Parted(NamedTuple):
    """What a piece of text turned out to be."""

    thoughts: str
    answer: str


class ThoughtParser:
    """Parts one text into thoughts and answer. What may yet become a tag is held back.

    The text thinks if it begins with <think>, white space aside, and until the first </think>. White space around the
    tags belongs to neither part. A text whose thoughts never end has no answer.
    """

    def __init__(self, place: Place) -> None:
        self._place = place
        self._held = ""
        self._has_thought = False

    @property
    def is_over(self) -> bool:
        """True once all further text is answer."""
        return self._place is Place.ANSWER

    def push(self, text: str) -> Parted:
        """Take more text; what is certain now."""
        self._held += text
        thoughts = ""
        if self._place is Place.BEFORE:
            self._place = self._begin()
        if self._place is Place.THOUGHTS:
            thoughts = self._think()
        if self._place is Place.BEHIND:
            self._held = self._held.lstrip()
            if self._held:
                self._place = Place.ANSWER
        if self._place is not Place.ANSWER:
            return Parted(thoughts, "")
        answer, self._held = self._held, ""
        return Parted(thoughts, answer)

    def finish(self) -> Parted:
        """The rest. Nothing may be pushed afterwards."""
        rest, self._held = self._held, ""
        return Parted(rest.rstrip(), "") if self._place is Place.THOUGHTS else Parted("", rest)

    def _begin(self) -> Place:
        begin = self._held.lstrip()
        if begin.startswith(_BEGIN):
            self._held = begin.removeprefix(_BEGIN)
            return Place.THOUGHTS
        return Place.BEFORE if _BEGIN.startswith(begin) else Place.ANSWER

    def _think(self) -> str:
        if not self._has_thought:
            self._held = self._held.lstrip()
        thoughts, end, rest = self._held.partition(_END)
        if end:
            self._place, self._held = Place.BEHIND, rest
            return thoughts.rstrip()
        certain = len(self._held[: len(self._held) - overlap(self._held, _END)].rstrip())
        thoughts, self._held = self._held[:certain], self._held[certain:]
        self._has_thought = self._has_thought or bool(thoughts)
        return thoughts


class ThoughtCounter:
    """How many of one text's tokens belong to its thoughts: all up to the token that completes </think>."""

    def __init__(self, place: Place, tokenizer: Tokenizer) -> None:
        self.num_tokens = 0
        self._place = place
        self._tokenizer = tokenizer
        self._num_undecided = 0
        self._tail = b""

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
