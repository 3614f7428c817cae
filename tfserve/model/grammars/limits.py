"""Limits of the grammar library, the same in the checker and in the engine. Torch-free."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from llguidance._lib import LLParserLimits

_MAX_ITEMS_IN_ROW = 10_000
"""Positions in a grammar that a text may have at the same time. An optional property of an object takes four: with the
library's default, 2,000, answers by a schema of 500 properties fail."""

_MAX_LEXER_STATES = 50_000
"""States of the lexer's automaton, about 2 kB each; all answers with one grammar share it."""

_STEP_FUEL = 50_000
"""Work for one mask, a few milliseconds, for which the step waits; the library's default is 200,000.
Schemas of objects, enums, formats and ordinary patterns need a quarter of this."""


def parser_limits() -> LLParserLimits:
    """Limits for an LLMatcher; the others are the library's defaults. Raises ImportError without llguidance."""
    from llguidance._lib import LLParserLimits

    return LLParserLimits(
        max_items_in_row=_MAX_ITEMS_IN_ROW,
        max_lexer_states=_MAX_LEXER_STATES,
        step_lexer_fuel=_STEP_FUEL,
        verbose_errors=False,
    )
