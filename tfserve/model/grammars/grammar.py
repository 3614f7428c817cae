"""Grammars for the output of a request: their text and their validation. Torch-free.

A grammar is text in one of llguidance's formats: the JSON that `json_schema_grammar` makes, or its Lark dialect.
llguidance is an extra. A grammar is first checked in a process of its own (GrammarChecker), a schema only after its
size has been checked.
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
from tfserve.model.grammars.checker import GrammarChecker
from tfserve.model.grammars.schema_limits import MAX_SCHEMA_CHARS, check_schema

_OPTIONS = {"x-guidance": {"whitespace_pattern": r"[\x20\x0A\x0D\x09]{0,20}"}}
"""llguidance's options for a schema: the white space allowed between the parts of a JSON text.

Without a limit, small models may write white space until the end.
"""

_FATAL = "-9223372036854775"
"""First digits of integers close to -2**63: llguidance 1.9 aborts the process on one in a `const` or an `enum`."""

_checker = GrammarChecker()


def json_schema_grammar(schema: Mapping[str, Any], param: str = "grammar") -> str:
    """The grammar of the JSON texts that `schema` allows.

    Raises RequestError about `param` if the extra is missing, and for a schema that is not JSON, or beyond the limits
    of `check_schema`. Only `check_grammar` finds out whether the grammar can be served.
    """
    _require_extra(param)
    check_schema(schema, param)
    grammar = {"grammars": [{"json_schema": {**schema, **_OPTIONS}}]}
    return json.dumps(grammar, ensure_ascii=False, separators=(",", ":"))


def lark_json(schema: Mapping[str, Any], param: str = "grammar") -> str:
    """The JSON texts that `schema` allows, as an expression in a Lark grammar. Raises RequestError about `param`."""
    check_schema(schema, param)
    return f"%json {json.dumps({**schema, **_OPTIONS}, separators=(',', ':'))}"


def check_grammar(grammar: str, param: str = "grammar") -> None:
    """Raise RequestError about the field `param` for a grammar that cannot be served, or if the extra is missing.

    A grammar that no text satisfies is found if it is a JSON schema, or if the first token shows it; otherwise later.

    May take seconds for a very complex one; a repeated call is quick. Raises QueueFullError if the machine is too busy.
    """
    _check_text(grammar, param)
    _refuse(_checker.submit(grammar).result(), param)


async def check_grammar_beside(grammar: str, param: str = "grammar", owner: str = "") -> None:
    """As `check_grammar`, without blocking the event loop; owners are served in turn."""
    _check_text(grammar, param)
    _refuse(await asyncio.wrap_future(_checker.submit(grammar, owner)), param)


def _check_text(grammar: str, param: str) -> None:
    """Raise RequestError for errors that can be found without the checker's process."""
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
        # Clients read this too: it must not contain paths of the server.
        command = f"pip install {shlex.join(requirements('grammar') or ['llguidance'])}"
        message = f"{param}: this server has no grammar support; in its environment, run: {command}"
        raise RequestError(param, message, "unsupported_parameter")
