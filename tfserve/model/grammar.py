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
from typing import Any

from tfserve.errors import RequestError
from tfserve.install_hint import requirements

_WHITESPACE = r"[\x20\x0A\x0D\x09]{0,20}"
"""White space allowed between the parts of a JSON text. With no limit, small models write nothing else to the end."""

MAX_GRAMMAR_CHARS = 131_072
"""Longest grammar or JSON schema (OpenAI's limit for a schema is about as high)."""

_CHECKED = 256
"""How many checked grammars are remembered: clients send the same ones again and again, and the engine checks too."""


def json_schema_grammar(schema: Mapping[str, Any], param: str = "grammar") -> str:
    """The grammar of the JSON texts that `schema` allows. Raises RequestError about `param` if the extra is missing."""
    _require_extra(param)
    from llguidance import LLMatcher

    return LLMatcher.grammar_from_json_schema(dict(schema), defaults={"whitespace_pattern": _WHITESPACE})


def lark_json(schema: Mapping[str, Any]) -> str:
    """What stands in a Lark grammar for the JSON texts that `schema` allows."""
    return f"%json {json.dumps({**schema, 'x-guidance': {'whitespace_pattern': _WHITESPACE}})}"


def check_grammar(grammar: str, param: str = "grammar") -> None:
    """Raise RequestError about the field `param` for a grammar that cannot be served, or if the extra is missing.

    May take a second for a very complex one, without the interpreter lock; a repeated call is quick.
    """
    _require_extra(param)
    if len(grammar) > MAX_GRAMMAR_CHARS:
        raise RequestError(param, f"{param}: {len(grammar)} characters are too long; the limit is {MAX_GRAMMAR_CHARS}")
    if problem := _problem(grammar):
        raise RequestError(
            param, f"{param}: this grammar or JSON schema cannot be served: {problem}", "invalid_grammar"
        )


def _require_extra(param: str) -> None:
    if find_spec("llguidance") is None:
        # Clients read this too: no paths of the server's.
        command = f"pip install {shlex.join(requirements('grammar'))}"
        message = f"{param}: this server has no grammar support; in its environment, run: {command}"
        raise RequestError(param, message, "unsupported_parameter")


@lru_cache(maxsize=_CHECKED)
def _problem(grammar: str) -> str:
    """What is wrong with a grammar; empty if nothing is."""
    from llguidance import LLMatcher

    failed, messages = LLMatcher.validate_grammar_with_warnings(grammar)
    return "; ".join(messages) if failed else ""
