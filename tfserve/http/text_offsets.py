"""Where the tokens of a text begin in it, in characters: `text_offset` of a completion's log probabilities."""

from __future__ import annotations

import codecs
from collections.abc import Callable

from tfserve.model.text.tokenizer import Tokenizer


class TextOffsets:
    """Places of the tokens of one text, asked for in their order; characters count from `start`.

    A token that goes on with a character which an earlier one began is where that character is. `shows` says of a
    special token whether the text has it at a place.
    """

    def __init__(self, tokenizer: Tokenizer, shows: Callable[[str, int], bool], start: int = 0) -> None:
        self._tokenizer = tokenizer
        self._shows = shows
        self._num_chars = start
        self._leading_spaces = tokenizer.leading_spaces
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def next(self, token_id: int) -> int:
        """Where the next token begins."""
        data = self._bytes(token_id)
        pending = self._utf8.getstate()[0]
        begin = self._num_chars
        if pending and data:
            # Bytes that are no character are a U+FFFD each, before this token.
            shown, joined = (len(part.decode(errors="replace")) for part in (pending, pending + data[:1]))
            begin += shown - (joined == shown)
        self._num_chars += len(self._utf8.decode(data))
        return begin

    def _bytes(self, token_id: int) -> bytes:
        """What the token adds to the text: as the Detokenizer, without a text's leading spaces."""
        data = self._tokenizer.token_bytes(token_id)
        if token_id in self._tokenizer.special_ids and not self._shows(data.decode(errors="replace"), self._num_chars):
            return b""
        if self._leading_spaces and data:
            dropped = min(self._leading_spaces, len(data) - len(data.lstrip(b" ")))
            self._leading_spaces = 0
            return data[dropped:]
        return data
