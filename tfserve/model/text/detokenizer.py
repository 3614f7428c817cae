"""Incremental detokenizer: never emits half a character, a stop string, or text after one. Torch-free."""

from __future__ import annotations

import codecs
from bisect import bisect_right
from collections.abc import Sequence

from tfserve.model.text.tokenizer import Tokenizer
from tfserve.types import SamplingParams


class Detokenizer:
    """Text of one growing sequence. The engine finds stop strings with it; the front makes text with it.

    The text, `stopped` and `tokens_used` do not depend on how tokens are grouped into pushes. Tokens are processed one
    by one; a stop string is found at the first token that completes one (if a token completes several, the one that
    starts first), or at the special token that it names. A stop string complete within the first `min_tokens` tokens is
    text. All pieces together equal `Tokenizer.decode` of all tokens, cut before the stop string (after it with
    `include_stop`). One exception: `decode` turns a malformed run of SentencePiece byte tokens into U+FFFD as a whole;
    here its valid characters stay, since they were already emitted. Cost is linear in the number of tokens.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        stop: tuple[str, ...] = (),
        skip_special_tokens: bool = True,
        min_tokens: int = 0,
        include_stop: bool = False,
    ) -> None:
        self.stopped: str | None = None
        self.tokens_used = 0
        self.include_stop = include_stop
        self._stop = stop
        self._sorted = sorted(stop)
        self._firsts = {each[0] for each in stop}
        self._longest = max(map(len, stop), default=0)
        self._bytes_of = tokenizer.bytes_table(skip_special_tokens)
        # Skipped special tokens are not text, so they cannot contain a stop string.
        special = tokenizer.special_texts if skip_special_tokens else {}
        self._stop_tokens = {special[each]: each for each in stop if each in special}
        self._min_tokens = min_tokens
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._leading_spaces = tokenizer.leading_spaces
        self._held = ""
        self._exempt = 0  # characters at the start of _held that belong to the first min_tokens tokens

    @classmethod
    def for_params(cls, tokenizer: Tokenizer, params: SamplingParams) -> Detokenizer:
        """The detokenizer for a request's stop strings, min_tokens and skip_special_tokens."""
        return cls(
            tokenizer,
            stop=params.stop,
            skip_special_tokens=params.skip_special_tokens,
            min_tokens=params.min_tokens,
            include_stop=params.include_stop_str_in_output,
        )

    def push(self, token_ids: Sequence[int]) -> str:
        """Add tokens. Returns the text that is now final: whole characters that cannot be the start of a stop string.

        `stopped` is the stop string found, if any; `tokens_used` is the number of tokens up to its end (all while there
        is none). Later tokens are ignored.
        """
        if not self._stop:
            self.tokens_used += len(token_ids)
            if self._leading_spaces:
                return self._utf8.decode(b"".join([self._bytes(token_id) for token_id in token_ids]))
            return self._utf8.decode(b"".join(map(self._bytes_of.__getitem__, token_ids)))
        pieces = []
        for token_id in token_ids:
            if self.stopped is not None:
                break
            self.tokens_used += 1
            if token_id in self._stop_tokens and self.tokens_used > self._min_tokens:
                pieces.append(self.finish())
                self.stopped = self._stop_tokens[token_id]
                if self.include_stop:
                    pieces.append(self.stopped)
            else:
                pieces.append(self._screen(self._utf8.decode(self._bytes(token_id))))
        return "".join(pieces)

    def finish(self) -> str:
        """The text still held back; an unfinished character becomes U+FFFD. No push may follow."""
        rest = self._held if self.stopped is not None else self._held + self._utf8.decode(b"", final=True)
        self._held = ""
        return rest

    def _bytes(self, token_id: int) -> bytes:
        data = self._bytes_of[token_id]
        if self._leading_spaces and data:
            stripped = data.lstrip(b" ")
            data = data[min(self._leading_spaces, len(data) - len(stripped)) :]
            self._leading_spaces = 0
        return data

    def _screen(self, text: str) -> str:
        """Add `text` to the held text, search for stop strings, and return the final part."""
        held, num_known = self._held + text, len(self._held)
        if self.tokens_used <= self._min_tokens:
            self._exempt = len(held)
        # The text held before contains no stop string, so a match ends in `text`.
        hits = [
            (held.find(stop, max(0, self._exempt, num_known, len(stop) - 1) - len(stop) + 1), stop)
            for stop in self._stop
        ]
        first = min((hit for hit in hits if hit[0] >= 0), key=lambda hit: hit[0], default=None)
        if first is not None:
            self._held, self.stopped = "", first[1]
            return held[: first[0] + (len(first[1]) if self.include_stop else 0)]
        certain = self._end_of_certain(held)
        self._held = held[certain:]
        self._exempt = max(0, self._exempt - certain)
        return held[:certain]

    def _end_of_certain(self, text: str) -> int:
        """Start of the longest suffix of `text` that is a proper prefix of a stop string.

        Earlier positions are not searched again, so the time is linear in the text. Stop strings are sorted: the ones
        with a given suffix as prefix directly follow it in order.
        """
        for start in range(max(0, len(text) - self._longest + 1), len(text)):
            if text[start] not in self._firsts:
                continue
            end = text[start:]
            place = bisect_right(self._sorted, end)
            if place < len(self._sorted) and self._sorted[place].startswith(end):
                return start
        return len(text)
