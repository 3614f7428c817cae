"""Thoughts in what a model writes: told from its answer while the text streams in."""

from __future__ import annotations

from typing import NamedTuple

from tfserve.http.tool_parsing import overlap
from tfserve.model.text.chat_template import THOUGHT_TAGS
from tfserve.types import Place

_BEGIN, _END = THOUGHT_TAGS


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
