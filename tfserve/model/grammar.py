"""Grammars that a request's output must follow: their text, and whether it can be served. Torch-free.

A grammar is text in one of llguidance's own forms: the JSON that `json_schema_grammar` makes, or its Lark dialect.
llguidance is an extra, imported when the first grammar comes.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from functools import lru_cache
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from tfserve import strict_json
from tfserve.errors import RequestError, failures
from tfserve.install_hint import requirements
from tfserve.model.schema_ends import has_finite_text

if TYPE_CHECKING:
    from llguidance import LLTokenizer

_WHITESPACE = r"[\x20\x0A\x0D\x09]{0,20}"
"""White space allowed between the parts of a JSON text. With no limit, small models write nothing else to the end."""

MAX_GRAMMAR_CHARS = 131_072
"""Longest grammar or JSON schema (OpenAI's limit for a schema is about as high)."""

_FATAL = "-9223372036854775"
"""How integers of nearly -2**63 begin: llguidance 1.9 ends the whole process on one in a `const` or an `enum`."""

_CHECKED = 256
"""How many checked grammars are remembered: clients send the same ones again and again, and the engine checks too."""


def json_schema_grammar(schema: Mapping[str, Any], param: str = "grammar") -> str:
    """The grammar of the JSON texts that `schema` allows.

    Raises RequestError about `param` if the extra is missing, and for what llguidance cannot read as a schema at all;
    whether it can be served is `check_grammar`'s to say.
    """
    _require_extra(param)
    _require_readable(schema, param)
    from llguidance import LLMatcher

    try:
        return LLMatcher.grammar_from_json_schema(dict(schema), defaults={"whitespace_pattern": _WHITESPACE})
    except failures() as error:
        raise _unservable(param, str(error)) from None


def lark_json(schema: Mapping[str, Any], param: str = "grammar") -> str:
    """What stands in a Lark grammar for the JSON texts that `schema` allows. Raises RequestError about `param`."""
    _require_readable(schema, param)
    return f"%json {json.dumps({**schema, 'x-guidance': {'whitespace_pattern': _WHITESPACE}})}"


def _require_readable(schema: Mapping[str, Any], param: str) -> None:
    """What is no JSON is no schema; the library fails on integers beyond 64 bits and rounds a const to a double."""
    if problem := strict_json.unreadable(schema, exact=("const", "enum")):
        raise RequestError(param, f"{param}: in this JSON schema {problem}; change or remove it", "invalid_grammar")


def check_grammar(grammar: str, param: str = "grammar") -> None:
    """Raise RequestError about the field `param` for a grammar that cannot be served, or if the extra is missing.

    That no text satisfies it is found where it shows at its beginning, or for a JSON schema; else where it shows.

    May take a second for a very complex one, without the interpreter lock; a repeated call is quick.
    """
    _require_extra(param)
    if len(grammar) > MAX_GRAMMAR_CHARS:
        raise RequestError(param, f"{param}: {len(grammar)} characters are too long; the limit is {MAX_GRAMMAR_CHARS}")
    if not strict_json.is_text(grammar):
        raise RequestError(param, f"{param}: this grammar is not valid Unicode text", "invalid_grammar")
    if _FATAL in grammar:
        raise RequestError(param, f"{param}: integers from {_FATAL}000 on cannot be served", "invalid_grammar")
    if problem := _problem(grammar):
        raise _unservable(param, problem)


def _require_extra(param: str) -> None:
    if find_spec("llguidance") is None:
        # Clients read this too: no paths of the server's.
        command = f"pip install {shlex.join(requirements('grammar') or ['llguidance'])}"
        message = f"{param}: this server has no grammar support; in its environment, run: {command}"
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
