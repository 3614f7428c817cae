"""Masks of allowed tokens for the rows whose requests must follow a grammar."""

from __future__ import annotations

import logging
import threading
from collections import OrderedDict
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tfserve.errors import failures
from tfserve.install_hint import install_command
from tfserve.model.grammar_limits import parser_limits
from tfserve.model.staging import Download, upload
from tfserve.plan import Row, RowInit

if TYPE_CHECKING:
    from llguidance import LLMatcher

logger = logging.getLogger(__name__)

_IDLE = 32
"""Grammars kept compiled that no request has any more, the most recently used ones."""


class GrammarCompiler:
    """Compiles grammars for one model: its tokenizer as JSON, its vocabulary, the tokens that end its texts.

    `compile` and `hold` keep a grammar until `let_go`; see plan.Grammars. Safe to use from several threads.

    Reads the vocabulary at once (a second for 128k tokens), so that the first grammar holds nobody up. Raises
    ImportError without llguidance, ValueError where no token ends a text, and whatever llguidance says to a tokenizer
    that it cannot read.
    """

    def __init__(self, tokenizer_json: str, vocab_size: int, eos_token_ids: Collection[int]) -> None:
        from llguidance import LLTokenizer

        if not eos_token_ids:
            # llguidance would guess one, which nothing else here takes for the end.
            raise ValueError("the checkpoint names no end-of-sequence token (eos_token_id), so no text could end")
        self._tokenizer = LLTokenizer(tokenizer_json, n_vocab=vocab_size, eos_token=sorted(eos_token_ids))
        self._lock = threading.Lock()
        self._held: dict[str, LLMatcher] = {}
        self._spent: set[str] = set()  # held ones that are to be compiled anew for the next request
        self._idle: OrderedDict[str, LLMatcher] = OrderedDict()

    def hold(self, grammar: str) -> bool:
        """See plan.Grammars."""
        with self._lock:
            if grammar in self._idle:
                self._held[grammar] = self._idle.pop(grammar)
            return grammar in self._held and grammar not in self._spent

    def compile(self, grammar: str) -> str:
        """See plan.Grammars."""
        if self.hold(grammar):
            return ""
        try:
            matcher = self._compile(grammar)
            # What the first mask needs is made here, and copied with the matcher.
            matcher.compute_bitmask()
            if matcher.is_error():
                return matcher.get_error().partition("\n")[0]
        except failures() as error:
            return f"{type(error).__name__}: {error}"
        with self._lock:
            self._held[grammar] = matcher
            self._spent.discard(grammar)
        return ""

    def let_go(self, grammar: str) -> None:
        """See plan.Grammars."""
        with self._lock:
            matcher = self._held.pop(grammar, None)
            if grammar in self._spent:
                self._spent.discard(grammar)
            elif matcher is not None:
                self._idle[grammar] = matcher
                if len(self._idle) > _IDLE:
                    self._idle.popitem(last=False)

    def matcher(self, grammar: str) -> LLMatcher:
        """A matcher at the grammar's beginning. Compiles, which may take long, what is not held."""
        with self._lock:
            compiled = self._held.get(grammar) or self._idle.get(grammar)
        if compiled is None:
            compiled = self._compile(grammar)
            with self._lock:
                self._held[grammar] = compiled
            self.let_go(grammar)
        return compiled.deep_copy()

    def forget(self, grammar: str) -> None:
        """Compile a grammar anew for the next request.

        Copies of a matcher share its lexer: one that has reached a limit, or broken down, is of no use to any of them.
        """
        with self._lock:
            self._idle.pop(grammar, None)
            if grammar in self._held:
                self._spent.add(grammar)

    def _compile(self, grammar: str) -> LLMatcher:
        from llguidance import LLMatcher

        return LLMatcher(self._tokenizer, grammar, log_level=0, limits=parser_limits())


class _Text:
    """Where one row's text stands in its grammar. `lost` says why it cannot go on; empty as long as it can.

    Nothing here raises: what llguidance reports, raises or panics with is the end of this text and of no other.
    """

    def __init__(self, compiler: GrammarCompiler, row: RowInit) -> None:
        assert row.params.grammar is not None
        self.lost = ""
        self._compiler = compiler
        self._req, self._grammar = row.req, row.params.grammar
        self._matcher: LLMatcher | None = None
        with self._losing():
            self._matcher = compiler.matcher(self._grammar)
            self._matcher.consume_tokens(list(row.token_ids[row.num_prompt_tokens :]))

    def push(self, token: int) -> None:
        """Take the next token."""
        # A text that has ended gets a token more where the next step was launched before its end was known.
        if self._matcher is not None and not self.lost and not self._matcher.is_stopped():
            with self._losing():
                self._matcher.consume_token(token)

    def allowed(self, vocab_size: int) -> NDArray[np.uint8] | None:
        """1 for each token that may come next, [V]; None if the text is lost."""
        bits = b""
        if self._matcher is not None and not self.lost:
            with self._losing():
                bits = self._matcher.compute_bitmask()
        # In its error state llguidance allows the end, and a broken text would look like a whole one.
        if self.lost:
            return None
        return np.unpackbits(np.frombuffer(bits, np.uint8), bitorder="little", count=vocab_size)

    @contextmanager
    def _losing(self) -> Iterator[None]:
        """Do something to the matcher; what goes wrong becomes `lost`."""
        problem = ""
        try:
            yield
            if self._matcher is not None and self._matcher.is_error():
                problem = self._matcher.get_error().partition("\n")[0]
        except failures() as error:
            problem = f"{type(error).__name__}: {error}"
        if problem:
            self._compiler.forget(self._grammar)
            self.lost = (
                f"the output cannot go on by its grammar or JSON schema ({problem}): nothing satisfies it from here on,"
                " or it is too complex for this server. Other requests are not affected; correct or simplify it"
            )
            logger.warning("request %s: %s", self._req, self.lost)


class TokenMasks:
    """For each row whose request has a grammar: where in it the row's text stands.

    A row that is entered with output, after a preemption, reads it again; so does nothing else need to be saved. A text
    that cannot follow its grammar any further (nothing satisfies it, or it reaches one of llguidance's limits) is
    `lost`: its request must end with an error, for what it has written is no whole text.

    Tokens are read where the next masks need them, by when the step after theirs is on its way to the device: a step
    with grammars waits for the one before it there, others never wait.
    """

    def __init__(self, compiler: GrammarCompiler) -> None:
        self.compiler = compiler
        self._texts: dict[Row, _Text] = {}
        self._unread: tuple[Download, list[tuple[int, _Text]]] | None = None  # with their places in it

    def enter(self, row: RowInit) -> None:
        """A request takes a row."""
        self.release(row.row)
        if row.params.grammar is not None:
            self._texts[row.row] = _Text(self.compiler, row)

    def release(self, row: Row) -> None:
        """Forget a row; one that is empty stays so."""
        self._texts.pop(row, None)

    def has(self, row: int) -> bool:
        """Whether the row's tokens are restricted."""
        return row in self._texts

    def apply(self, logits: Tensor, rows: Sequence[int]) -> None:
        """Set what is not allowed to -inf in `logits` fp32 [N, V], whose lines belong to `rows`.

        Waits for the tokens of the step before if one of the rows has a grammar. Lost rows stay as they are.
        """
        for line, text in self._among(rows):
            self._read()
            allowed = text.allowed(logits.shape[1])
            if allowed is not None:
                (forbidden,) = upload(logits.device, allowed == 0)
                logits[line].masked_fill_(forbidden, -torch.inf)

    def lost(self, rows: Sequence[int]) -> dict[int, str]:
        """Which places of `rows` [N] are lost, and why; after `apply`."""
        return {line: text.lost for line, text in self._among(rows) if text.lost}

    def append(self, rows: Sequence[int], chosen: Download) -> None:
        """Go on by what was chosen for `rows` [N]: tokens int64 [N], and bool [N], false where a row has none."""
        # The texts, not the rows: by when these tokens are read, a row may be another request's.
        held = self._among(rows)
        if held:
            self._read()
            self._unread = chosen, held

    def _among(self, rows: Sequence[int]) -> list[tuple[int, _Text]]:
        """The texts of those of `rows` that have one, with their places."""
        if not self._texts:
            return []
        return [(place, self._texts[Row(row)]) for place, row in enumerate(rows) if Row(row) in self._texts]

    def _read(self) -> None:
        if self._unread is None:
            return
        (chosen, held), self._unread = self._unread, None
        tokens, usable = chosen.lists()
        for place, text in held:
            if usable[place]:
                text.push(tokens[place])


def open_masks(tokenizer_json: str, vocab_size: int, eos_token_ids: Collection[int]) -> TokenMasks | None:
    """Masks for a model; None, with a line in the log, where the extra is missing or cannot read its tokenizer."""
    try:
        return TokenMasks(GrammarCompiler(tokenizer_json, vocab_size, eos_token_ids))
    except ImportError:
        how = install_command("grammar")
        logger.info("no grammars: response_format and forced tool calls need llguidance: %s", how)
    except failures() as error:  # a model must load without grammars too, whatever its tokenizer
        logger.warning("no grammars: llguidance cannot work with this model's tokenizer: %s", error)
    return None
