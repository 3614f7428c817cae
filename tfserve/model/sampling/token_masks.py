"""Masks of allowed tokens for slots with a grammar."""

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
from tfserve.model.grammars.limits import parser_limits
from tfserve.model.runner.staging import Download, upload
from tfserve.plan import SlotId, SlotInit

if TYPE_CHECKING:
    from llguidance import LLMatcher

logger = logging.getLogger(__name__)

_IDLE = 32
"""Most compiled grammars that are kept without a request; the least recently used one is dropped."""


class GrammarCompiler:
    """Compiles grammars for one model: its tokenizer as JSON, its vocabulary, the tokens that end its texts.

    `compile` and `hold` keep a grammar until `let_go`; see plan.Grammars. Safe to use from several threads.

    The constructor reads the vocabulary (a second for 128k tokens), so that the first grammar is fast. Raises
    ImportError without llguidance, ValueError without an end token, and llguidance's error for a tokenizer that it
    cannot read.
    """

    def __init__(self, tokenizer_json: str, vocab_size: int, eos_token_ids: Collection[int]) -> None:
        from llguidance import LLTokenizer

        if not eos_token_ids:
            # llguidance would guess an end token that the engine does not use.
            raise ValueError("the checkpoint names no end-of-sequence token (eos_token_id), so no text could end")
        self._tokenizer = LLTokenizer(tokenizer_json, n_vocab=vocab_size, eos_token=sorted(eos_token_ids))
        self._lock = threading.Lock()
        self._held: dict[str, LLMatcher] = {}
        self._spent: set[str] = set()  # held grammars that are compiled again for the next request
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
            # Compute here what the first mask needs; copies of the matcher share it.
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
        """A matcher at the start of the grammar. Compiles a grammar that is not held, which may take long."""
        with self._lock:
            compiled = self._held.get(grammar) or self._idle.get(grammar)
        if compiled is None:
            compiled = self._compile(grammar)
            with self._lock:
                self._held[grammar] = compiled
            self.let_go(grammar)
        return compiled.deep_copy()

    def forget(self, grammar: str) -> None:
        """Compile a grammar again for the next request.

        Copies of a matcher share its lexer: after a limit or an error in it, no copy can be used.
        """
        with self._lock:
            self._idle.pop(grammar, None)
            if grammar in self._held:
                self._spent.add(grammar)

    def _compile(self, grammar: str) -> LLMatcher:
        from llguidance import LLMatcher

        return LLMatcher(self._tokenizer, grammar, log_level=0, limits=parser_limits())


class _Text:
    """The state of a slot's text in its grammar. `lost` is the reason why it cannot continue; empty as long as it can.

    Nothing here raises: an error or panic of llguidance ends only this text.
    """

    def __init__(self, compiler: GrammarCompiler, init: SlotInit) -> None:
        assert init.params.grammar is not None
        self.lost = ""
        self._compiler = compiler
        self._req, self._grammar = init.req, init.params.grammar
        self._matcher: LLMatcher | None = None
        with self._losing():
            self._matcher = compiler.matcher(self._grammar)
            self._matcher.consume_tokens(list(init.token_ids[init.num_prompt_tokens :]))

    def push(self, token: int) -> None:
        """Take the next token."""
        # A finished text gets one more token if the next step was launched before its end was known.
        if self._matcher is not None and not self.lost and not self._matcher.is_stopped():
            with self._losing():
                self._matcher.consume_token(token)

    def allowed(self, vocab_size: int) -> NDArray[np.uint8] | None:
        """1 for each token that may come next, [V]; None if the text is lost."""
        bits = b""
        if self._matcher is not None and not self.lost:
            with self._losing():
                bits = self._matcher.compute_bitmask()
        # In its error state llguidance allows the end token: a broken text would look complete.
        if self.lost:
            return None
        return np.unpackbits(np.frombuffer(bits, np.uint8), bitorder="little", count=vocab_size)

    @contextmanager
    def _losing(self) -> Iterator[None]:
        """Call the matcher; an error becomes `lost`."""
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
    """The grammar state of each slot with a grammar.

    A slot that is entered with output, after a preemption, reads that output again, so no state is saved. A text that
    cannot continue (no token is allowed, or one of llguidance's limits is reached) is `lost`: its request must end with
    an error, because its text is incomplete.

    Tokens are read when the next masks need them, after the forward pass of the next step has been launched. Only a
    step with grammars waits for the previous step.
    """

    def __init__(self, compiler: GrammarCompiler) -> None:
        self.compiler = compiler
        self._texts: dict[SlotId, _Text] = {}
        self._unread: tuple[Download, list[tuple[int, _Text]]] | None = None  # with their places in the batch

    def enter(self, init: SlotInit) -> None:
        """A request enters a slot."""
        self.release(init.slot)
        if init.params.grammar is not None:
            self._texts[init.slot] = _Text(self.compiler, init)

    def release(self, slot: SlotId) -> None:
        """Clear a slot; no effect on an empty one."""
        self._texts.pop(slot, None)

    def has(self, slot: int) -> bool:
        """True if the slot has a grammar."""
        return slot in self._texts

    def apply(self, logits: Tensor, slots: Sequence[int]) -> None:
        """Set forbidden tokens to -inf in `logits` fp32 [N, V], one line for each of `slots`.

        Waits for the tokens of the previous step if one of the slots has a grammar. Does not change lost slots.
        """
        for line, text in self._among(slots):
            self._read()
            allowed = text.allowed(logits.shape[1])
            if allowed is not None:
                (forbidden,) = upload(logits.device, allowed == 0)
                logits[line].masked_fill_(forbidden, -torch.inf)

    def lost(self, slots: Sequence[int]) -> dict[int, str]:
        """The lost places of `slots` [N] and the reasons; call it after `apply`."""
        return {line: text.lost for line, text in self._among(slots) if text.lost}

    def append(self, slots: Sequence[int], chosen: Download) -> None:
        """Record the tokens int64 [N] chosen for `slots` [N]; bool [N] is false for a slot without a token."""
        # Keep the texts, not the slots: when the tokens are read, a slot may belong to another request.
        held = self._among(slots)
        if held:
            self._read()
            self._unread = chosen, held

    def _among(self, slots: Sequence[int]) -> list[tuple[int, _Text]]:
        """The texts of the slots with a grammar, and their places in `slots`."""
        if not self._texts:
            return []
        return [(place, self._texts[SlotId(slot)]) for place, slot in enumerate(slots) if SlotId(slot) in self._texts]

    def _read(self) -> None:
        if self._unread is None:
            return
        (chosen, held), self._unread = self._unread, None
        tokens, usable = chosen.lists()
        for place, text in held:
            if usable[place]:
                text.push(tokens[place])


def open_masks(tokenizer_json: str, vocab_size: int, eos_token_ids: Collection[int]) -> TokenMasks | None:
    """Masks for a model; None, with a log message, if the extra is missing or cannot read the tokenizer."""
    try:
        return TokenMasks(GrammarCompiler(tokenizer_json, vocab_size, eos_token_ids))
    except ImportError:
        how = install_command("grammar")
        logger.info("no grammars: response_format and forced tool calls need llguidance: %s", how)
    except failures() as error:  # a model must load without grammars too, with any tokenizer
        logger.warning("no grammars: llguidance cannot work with this model's tokenizer: %s", error)
    return None
