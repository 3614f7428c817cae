"""Schemas that refer to themselves: which have a finite text, and that none is refused which has one."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tfserve.errors import RequestError
from tfserve.model.grammars.grammar import check_grammar, json_schema_grammar
from tfserve.model.grammars.schema_ends import has_finite_text

N = {"$ref": "#/$defs/n"}
NULL = {"type": "null"}


def about_n(n: Any) -> dict[str, Any]:
    """A schema that refers to its definition `n`."""
    return {**N, "$defs": {"n": n}}


def node(**more: Any) -> dict[str, Any]:
    """An object whose member `next` is another of its kind."""
    return {"type": "object", "properties": {"next": N}, **more}


ENDLESS = [
    about_n(N),
    {"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}},
    {"$ref": "#/definitions/n", "definitions": {"n": {"$ref": "#/definitions/n"}}},
    about_n(node(required=["next"])),
    about_n({**node(required=["next"]), "type": ["object"]}),
    about_n({"type": "object", "additionalProperties": N, "required": ["x"]}),
    about_n({"type": "object", "additionalProperties": N, "minProperties": 1}),
    about_n(
        {**node(), "properties": {"end": NULL}, "required": ["end"], "additionalProperties": N, "minProperties": 2}
    ),
    about_n({"type": "array", "items": N, "minItems": 1}),
    about_n({"type": "array", "prefixItems": [N], "minItems": 1}),
    about_n({"anyOf": [N, node(required=["next"])]}),
    about_n({"allOf": [{"type": "object"}, N]}),
    {"type": "object", "properties": {"a": {"$ref": "#"}}, "required": ["a"]},
    {"type": "object", "properties": {"x": N}, "required": ["x"], "$defs": {"n": N}},
    {"type": "object", "properties": {"a": {"$ref": "#/properties/a"}}, "required": ["a"]},
    about_n({"type": "object", "allOf": [node(required=["next"])]}),
    about_n({"type": "object", "required": ["next"], "allOf": [{"properties": {"next": N}}]}),
    about_n({"allOf": [{"type": "object"}, {"properties": {"next": N}}, {"required": ["next"]}]}),
    about_n({"allOf": [{"$ref": "#/$defs/o"}, {"properties": {"next": N}}]})
    | {
        "$defs": {
            "n": {"allOf": [{"$ref": "#/$defs/o"}, {"properties": {"next": N}}]},
            "o": {"type": "object", "required": ["next"]},
        }
    },
    about_n({"type": "object", "patternProperties": {"^x": N}, "additionalProperties": N, "required": ["x"]}),
    {"$schema": "http://json-schema.org/draft-07/schema#", "type": "array", "items": [{"$ref": "#"}], "minItems": 1},
    {"$ref": "#a", "$defs": {"n": {"$anchor": "a", **node(required=["next"]), "properties": {"next": {"$ref": "#a"}}}}},
    {"$id": "http://x/y", "type": "object", "properties": {"a": {"$ref": "http://x/y"}}, "required": ["a"]},
    {"$ref": "#/$defs/a~1b%25", "$defs": {"a/b%": {"$ref": "#/$defs/a~1b%25"}}},
]
FINITE = [
    {},
    {"type": "object"},
    about_n(NULL),
    about_n(node()),
    about_n({**node(required=["next"]), "properties": {"next": {"anyOf": [N, NULL]}}}),
    about_n({"anyOf": [N, NULL]}),
    about_n({"allOf": [{"type": "object"}, {"properties": {"next": N}}]}),
    about_n({"type": "object", "required": ["next"], "allOf": [{"properties": {"next": {"anyOf": [N, NULL]}}}]}),
    about_n({"type": "object", "patternProperties": {"^x": N}, "required": ["y"]}),
    about_n({"type": "array", "items": N}),
    about_n({"type": "array", "prefixItems": [NULL, N], "minItems": 1}),
    about_n(
        {**node(), "properties": {"end": NULL}, "required": ["end"], "additionalProperties": N, "minProperties": 1}
    ),
    about_n({"type": "object", "patternProperties": {"^x": NULL}, "additionalProperties": N, "required": ["x"]}),
    # Without a type a number will do.
    about_n({"properties": {"next": N}, "required": ["next"]}),
    about_n({"type": "object", "properties": {"next": N}, "required": ["other"]}),
    {"type": "object", "properties": {"a": {"$ref": "#"}}},
]


@pytest.mark.parametrize("schema", ENDLESS, ids=json.dumps)
def test_a_schema_without_a_finite_text_is_refused(schema: Any) -> None:
    assert not has_finite_text(schema)
    with pytest.raises(RequestError, match="cannot be served") as refused:
        check_grammar(json_schema_grammar(schema), "response_format")
    assert refused.value.param == "response_format"


@pytest.mark.parametrize("schema", FINITE, ids=json.dumps)
def test_a_schema_with_a_finite_text_is_served(schema: Any) -> None:
    assert has_finite_text(schema)
    check_grammar(json_schema_grammar(schema))


@pytest.mark.parametrize(
    "schema",
    [
        True,
        7,
        None,
        [],
        {"$ref": 7},
        {"$ref": "#/$defs/nowhere"},
        {"$ref": "#/required/9", "required": ["a"]},
        {"$ref": "https://example.org/schema"},
        {"type": "object", "required": [[], {}, 3], "properties": []},
        {"anyOf": {}, "allOf": "x", "type": "array", "minItems": "1", "prefixItems": {}},
        {"$defs": {"n": {"$id": "https://example.org/", "$ref": "#/$defs/n"}}, **N},
    ],
    ids=repr,
)
def test_what_is_not_understood_is_for_llguidance_to_refuse(schema: Any) -> None:
    assert has_finite_text(schema)


def test_time_is_linear_in_a_chain_of_references() -> None:
    """Each definition is looked at once, in whatever order the chain comes."""
    chain: dict[str, Any] = {f"n{i}": {"$ref": f"#/$defs/n{i + 1}"} for i in range(20_000)}
    assert has_finite_text({"$ref": "#/$defs/n0", "$defs": {**chain, "n20000": NULL}})
    assert not has_finite_text({"$ref": "#/$defs/n0", "$defs": {**chain, "n20000": {"$ref": "#/$defs/n0"}}})


def test_schemas_that_hold_together_in_a_long_chain_are_looked_at_in_short_time() -> None:
    """The text of a grammar may be long: its parts are looked at with a few others each."""
    chain: dict[str, Any] = {f"n{i}": {"allOf": [{"$ref": f"#/$defs/n{i + 1}"}]} for i in range(4000)}
    assert has_finite_text({"$ref": "#/$defs/n0", "$defs": {**chain, "n4000": NULL}})
    assert not has_finite_text({"$ref": "#/$defs/n0", "$defs": {**chain, "n4000": {"$ref": "#/$defs/n0"}}})
