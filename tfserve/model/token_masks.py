"""Masks of allowed tokens for the rows whose requests must follow a grammar."""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from tfserve.install_hint import install_command
from tfserve.model.staging import Download, upload
from tfserve.plan import Row, RowInit

if TYPE_CHECKING:
    from llguidance import LLMatcher

logger = logging.getLogger(__name__)

_COMPILED = 32
"""Grammars kept compiled, the most recently used ones."""


class GrammarCompiler:
    """Compiles grammars for one model: its tokenizer as JSON, its vocabulary, the tokens that end its texts.

    Reads the vocabulary at once (a second for 128k tokens), so that the first grammar holds nobody up. Raises
    ImportError without llguidance, and whatever it says to a tokenizer that it cannot read.
    """

    def __init__(self, tokenizer_json: str, vocab_size: int, eos_token_ids: Collection[int]) -> None:
        from llguidance import LLTokenizer

        self._tokenizer = LLTokenizer(tokenizer_json, n_vocab=vocab_size, eos_token=sorted(eos_token_ids) or None)
        self._compiled: OrderedDict[str, LLMatcher] = OrderedDict()

    def matcher(self, grammar: str) -> LLMatcher:
        """A matcher at the grammar's beginning."""
        from llguidance import LLMatcher

        if grammar not in self._compiled:
            self._compiled[grammar] = LLMatcher(self._tokenizer, grammar, log_level=0)
            if len(self._compiled) > _COMPILED:
                self._compiled.popitem(last=False)
        self._compiled.move_to_end(grammar)
        return self._compiled[grammar].deep_copy()


class TokenMasks:
    """For each row whose request has a grammar: where in it the row's text stands.

    A row that is entered with output, after a preemption, reads it again; so does nothing else need to be saved. A text
    that no longer fits its grammar (that takes a bug or one of llguidance's limits) may only end.

    Tokens are read where the next masks need them, by when the step after theirs is on its way to the device: a step
    with grammars waits for the one before it there, others never wait.
    """

    def __init__(self, compiler: GrammarCompiler) -> None:
        self._compiler = compiler
        self._matchers: dict[Row, LLMatcher] = {}
        self._unread: tuple[Download, list[tuple[int, int, LLMatcher]]] | None = None  # with places, rows, matchers

    def enter(self, row: RowInit) -> None:
        """A request takes a row."""
        self.release(row.row)
        if row.params.grammar is None:
            return
        matcher = self._compiler.matcher(row.params.grammar)
        matcher.consume_tokens(list(row.token_ids[row.num_prompt_tokens :]))
        self._note_error(matcher, row.row)
        self._matchers[row.row] = matcher

    def release(self, row: Row) -> None:
        """Forget a row; one that is empty stays so."""
        self._matchers.pop(row, None)

    def has(self, row: int) -> bool:
        """Whether the row's tokens are restricted."""
        return row in self._matchers

    def apply(self, logits: Tensor, rows: Sequence[int]) -> None:
        """Set what is not allowed to -inf in `logits` fp32 [N, V], whose lines belong to `rows`.

        Waits for the tokens of the step before if one of the rows has a grammar.
        """
        for line, row in enumerate(rows):
            if (matcher := self._matchers.get(Row(row))) is not None:
                self._read()
                bits = np.frombuffer(matcher.compute_bitmask(), np.uint8)
                allowed = np.unpackbits(bits, bitorder="little", count=logits.shape[1])
                (forbidden,) = upload(logits.device, allowed == 0)
                logits[line].masked_fill_(forbidden, -torch.inf)

    def append(self, rows: Sequence[int], chosen: Download) -> None:
        """Go on by what was chosen for `rows` [N]: tokens int64 [N], and bool [N], false where a row has none."""
        held = [(i, row, self._matchers[Row(row)]) for i, row in enumerate(rows) if Row(row) in self._matchers]
        if held:
            self._read()
            # The matchers, not the rows: by when these tokens are read, a row may be somebody else's.
            self._unread = chosen, held

    def _read(self) -> None:
        if self._unread is None:
            return
        (chosen, held), self._unread = self._unread, None
        tokens, usable = chosen.lists()
        for i, row, matcher in held:
            # One that is lost already has been spoken of; one that has ended gets a token more where the next step was
            # launched before its end was known.
            if usable[i] and not matcher.is_error() and not matcher.is_stopped():
                matcher.consume_token(tokens[i])
                self._note_error(matcher, row)

    def _note_error(self, matcher: LLMatcher, row: int) -> None:
        if matcher.is_error():
            reason = matcher.get_error().partition("\n")[0]
            logger.warning("the output in row %d left its grammar and must end: %s", row, reason)


def open_masks(tokenizer_json: str, vocab_size: int, eos_token_ids: Collection[int]) -> TokenMasks | None:
    """Masks for a model; None, with a line in the log, where the extra is missing or cannot read its tokenizer."""
    try:
        return TokenMasks(GrammarCompiler(tokenizer_json, vocab_size, eos_token_ids))
    except ImportError:
        how = install_command("grammar")
        logger.info("no grammars: response_format and forced tool calls need llguidance: %s", how)
    except Exception as error:  # a model must load without grammars too, whatever its tokenizer
        logger.warning("no grammars: llguidance cannot read this model's tokenizer: %s", error)
    return None
