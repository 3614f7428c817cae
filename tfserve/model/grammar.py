"""Grammars that a request's output must follow: their text, and whether it can be served. Torch-free.

A grammar is text in one of llguidance's own forms: the JSON that `json_schema_grammar` makes, or its Lark dialect.
llguidance is an extra, imported when the first grammar comes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import lru_cache
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from tfserve.errors import RequestError, failures
from tfserve.model.schema_ends import has_finite_text

if TYPE_CHECKING:
    from llguidance import LLTokenizer

_WHITESPACE = r"[\x20\x0A\x0D\x09]{0,20}"
"""White space allowed between the parts of a JSON text. With no limit, small models write nothing else to the end."""

MAX_GRAMMAR_CHARS = 131_072
"""Longest grammar or JSON schema (OpenAI's limit for a schema is about as high)."""

_CHECKED = 256
"""How many checked grammars are remembered: clients send the same ones again and again, and the engine checks too."""


def json_schema_grammar(schema: Mapping[str, Any], param: str = "grammar") -> str:
    """The grammar of the JSON texts that `schema` allows.

    Raises RequestError about `param` if the extra is missing, or for what llguidance cannot take for a schema at all;
    whether it can be served is `check_grammar`'s to say.
    """
    _require_extra(param)
    from llguidance import LLMatcher

    try:
        return LLMatcher.grammar_from_json_schema(dict(schema), defaults={"whitespace_pattern": _WHITESPACE})
    except failures() as error:
        raise _unservable(param, str(error)) from None


def lark_json(schema: Mapping[str, Any]) -> str:
    """What stands in a Lark grammar for the JSON texts that `schema` allows."""
    return f"%json {json.dumps({**schema, 'x-guidance': {'whitespace_pattern': _WHITESPACE}})}"


def check_grammar(grammar: str, param: str = "grammar") -> None:
    """Raise RequestError about the field `param` for a grammar that cannot be served, or if the extra is missing.

    That no text satisfies it is found where it shows at its beginning, or for a JSON schema; else where it shows.

    May take a second for a very complex one, without the interpreter lock; a repeated call is quick.
    """
    _require_extra(param)
    if len(grammar) > MAX_GRAMMAR_CHARS:
        raise RequestError(param, f"{param}: {len(grammar)} characters are too long; the limit is {MAX_GRAMMAR_CHARS}")
    if problem := _problem(grammar):
        raise _unservable(param, problem)


def _require_extra(param: str) -> None:
    if find_spec("llguidance") is None:
        message = f"{param}: this server has no grammar support; install it with: pip install 'tfserve[grammar]'"
        raise RequestError(param, message, "unsupported_parameter")


def _unservable(param: str, problem: str) -> RequestError:
    return RequestError(param, f"{param}: this grammar or JSON schema cannot be served: {problem}", "invalid_grammar")


@lru_cache(maxsize=_CHECKED)
def _problem(grammar: str) -> str:
    """What is wrong with a grammar; empty if nothing is."""
    from llguidance import LLMatcher

    try:
        start = LLMatcher(_byte_tokenizer(), grammar, log_level=0)
        if start.is_error():
            return start.get_error().partition("\n<state>")[0]
        if start.is_stopped() and not start.is_accepting():
            return "no text satisfies it"
        if not all(map(has_finite_text, _schemas(grammar))):
            return "it requires itself again and again, so no finite JSON satisfies it"
    except failures() as error:
        return f"{type(error).__name__}: {error}"
    return ""


@lru_cache(maxsize=1)
def _byte_tokenizer() -> LLTokenizer:
    """A vocabulary of the single bytes: what a grammar allows at all, whatever model writes it."""
    from llguidance import LLTokenizer

    return LLTokenizer("byte", slices=[])


def _schemas(grammar: str) -> list[Any]:
    """The JSON schemas of a grammar made by `json_schema_grammar`; of a Lark grammar, none."""
    if not grammar.startswith("{"):
        return []
    return [part["json_schema"] for part in json.loads(grammar)["grammars"] if part.get("json_schema") is not None]
