"""The grammar library's own limits, the same wherever a grammar is compiled. Torch-free."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from llguidance._lib import LLParserLimits

_MAX_ITEMS_IN_ROW = 10_000
"""Places in a grammar where a text may be at once. Each optional property of an object takes four: the library's
default of 2,000 lets answers fail by a schema of 500."""

_MAX_LEXER_STATES = 50_000
"""States of the automaton that reads answers, about 2 kB each; all answers by one grammar share it."""

_STEP_FUEL = 50_000
"""Work of the automaton for one mask, a few milliseconds, for which the step waits; the library's default is 200,000.
Schemas of objects, enums, formats and ordinary patterns are served with a quarter of this."""


def parser_limits() -> LLParserLimits:
    """Limits for an LLMatcher; those not named here are the library's. ImportError without llguidance."""
    from llguidance._lib import LLParserLimits

    return LLParserLimits(
        max_items_in_row=_MAX_ITEMS_IN_ROW,
        max_lexer_states=_MAX_LEXER_STATES,
        step_lexer_fuel=_STEP_FUEL,
        verbose_errors=False,
    )
