"""JSON schemas that are deep, wide, or hard to compile or to follow."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from benchmarks.attack.attacks import Attack, Target, post
from tests.attack.schemas import LINKS, chain, wide

CHAT = "/v1/chat/completions"
_ONE = [{"role": "user", "content": "x"}]


def _format(schema: dict[str, Any], **more: Any) -> Callable[[Target], dict[str, Any]]:
    format = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    body = {"messages": _ONE, "response_format": format, "max_tokens": 200, "temperature": 1.0, "seed": 1, **more}
    return lambda _: body


def _tools(schemas: list[dict[str, Any]], choice: str) -> Callable[[Target], dict[str, Any]]:
    functions = [{"name": f"f{number}", "parameters": schema} for number, schema in enumerate(schemas)]
    tools = [{"type": "function", "function": function} for function in functions]
    return lambda _: {"messages": _ONE, "tools": tools, "tool_choice": choice, "max_tokens": 50}


_DOUBLING = {
    "type": "object",
    "$ref": "#/$defs/d0",
    "$defs": {
        **{f"d{n}": {"allOf": [{"$ref": f"#/$defs/d{n + 1}"}, {"$ref": f"#/$defs/d{n + 1}"}]} for n in range(40)},
        "d40": {"type": "object", "properties": {"a": {"type": "string"}}},
    },
}
_PATTERN = {
    "type": "object",
    "properties": {"a": {"type": "string", "pattern": "^.*a.{200}b.*c.{200}$"}},
    "required": ["a"],
}

ATTACKS: dict[str, Attack] = {
    "grammar-chain": post(CHAT, _format(chain(1000, LINKS["properties"]))),
    "grammar-chain-tool": post(CHAT, _tools([chain(1000, LINKS["items"])], "required")),
    "grammar-11000": post(CHAT, _format(wide(11_000))),
    "grammar-11000-eight": post(CHAT, _format(wide(11_000)), copies=8),
    "grammar-1000": post(CHAT, _format(wide(1000))),
    "grammar-1000-tools": post(CHAT, _tools([wide(1000)] * 7, "required")),
    "grammar-shown-tools": post(CHAT, _tools([{"const": [[]] * 43_000}] * 20, "auto")),
    "grammar-doubling": post(CHAT, _format(_DOUBLING), copies=4),
    "grammar-pattern": post(CHAT, _format(_PATTERN)),
    "grammar-pattern-eight": post(CHAT, _format(_PATTERN), copies=8),
}
