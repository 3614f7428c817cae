"""Grammars that a request's output must follow: their text, and whether it can be served. Torch-free.

A grammar is text in one of llguidance's own forms: the JSON that `json_schema_grammar` makes, or its Lark dialect.
llguidance is an extra. It sees a grammar in a process of its own first (GrammarChecker), and a schema only after it has
been measured.
"""

from __future__ import annotations

import asyncio
import json
import shlex
from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any

from tfserve import strict_json
from tfserve.errors import RequestError
from tfserve.install_hint import requirements
from tfserve.model.grammar_checker import GrammarChecker
from tfserve.model.schema_limits import MAX_SCHEMA_CHARS, check_schema

_OPTIONS = {"x-guidance": {"whitespace_pattern": r"[\x20\x0A\x0D\x09]{0,20}"}}
"""Options of llguidance in a schema: white space allowed between the parts of a JSON text.

With no limit, small models write nothing else to the end.
"""

_FATAL = "-9223372036854775"
"""How integers of nearly -2**63 begin: llguidance 1.9 ends the whole process on one in a `const` or an `enum`."""

_checker = GrammarChecker()


def json_schema_grammar(schema: Mapping[str, Any], param: str = "grammar") -> str:
    """The grammar of the JSON texts that `schema` allows.

    Raises RequestError about `param` if the extra is missing, and for a schema that is no JSON, or beyond the limits of
    `check_schema`; whether it can be served is `check_grammar`'s to say.
    """
    _require_extra(param)
    check_schema(schema, param)
    grammar = {"grammars": [{"json_schema": {**schema, **_OPTIONS}}]}
    return json.dumps(grammar, ensure_ascii=False, separators=(",", ":"))


def lark_json(schema: Mapping[str, Any], param: str = "grammar") -> str:
    """What stands in a Lark grammar for the JSON texts that `schema` allows. Raises RequestError about `param`."""
    check_schema(schema, param)
    return f"%json {json.dumps({**schema, **_OPTIONS}, separators=(',', ':'))}"


def check_grammar(grammar: str, param: str = "grammar") -> None:
    """Raise RequestError about the field `param` for a grammar that cannot be served, or if the extra is missing.

    That no text satisfies it is found where it shows at its beginning, or for a JSON schema; else where it shows.

    May take seconds for a very complex one; a repeated call is quick. Raises QueueFullError if the machine is too busy.
    """
    _check_text(grammar, param)
    _refuse(_checker.submit(grammar).result(), param)


async def check_grammar_beside(grammar: str, param: str = "grammar", owner: str = "") -> None:
    """As `check_grammar`, while the event loop goes on; owners take turns."""
    _check_text(grammar, param)
    _refuse(await asyncio.wrap_future(_checker.submit(grammar, owner)), param)


def _check_text(grammar: str, param: str) -> None:
    """Raise RequestError for what no process need be asked about."""
    _require_extra(param)
    if len(grammar) > MAX_SCHEMA_CHARS:
        raise RequestError(param, f"{param}: {len(grammar)} characters are too long; the limit is {MAX_SCHEMA_CHARS}")
    if not strict_json.is_text(grammar):
        raise RequestError(param, f"{param}: this grammar is not valid Unicode text", "invalid_grammar")
    if _FATAL in grammar:
        raise RequestError(param, f"{param}: integers from {_FATAL}000 on cannot be served", "invalid_grammar")


def _refuse(problem: str, param: str) -> None:
    if problem:
        message = f"{param}: this grammar or JSON schema cannot be served: {problem}"
        raise RequestError(param, message, "invalid_grammar")


def _require_extra(param: str) -> None:
    if find_spec("llguidance") is None:
        # Clients read this too: no paths of the server's.
        command = f"pip install {shlex.join(requirements('grammar') or ['llguidance'])}"
        message = f"{param}: this server has no grammar support; in its environment, run: {command}"
        raise RequestError(param, message, "unsupported_parameter")
