"""Strict JSON: invalid parts that Python's own module accepts are repaired or refused, in any context."""

from __future__ import annotations

import json
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tfserve.strict_json import decode_at, dumps, is_text, loads, mend, unreadable, well_formed

MENDED = [
    (r'"Os\ud83dlo"', "Os\N{REPLACEMENT CHARACTER}lo"),
    (r'"\ud83d"', "\N{REPLACEMENT CHARACTER}"),
    (r'"\uDE00\uD83D"', "\N{REPLACEMENT CHARACTER}\N{REPLACEMENT CHARACTER}"),
    (r'"\ud83d\ud83d\ude00"', "\N{REPLACEMENT CHARACTER}😀"),
    (r'"\ud83d\ude00"', "😀"),
    (r'"\\ud83d"', r"\ud83d"),
    (r'"\\\ud83d"', "\\\N{REPLACEMENT CHARACTER}"),
    (r'"\"\ud83d\""', '"\N{REPLACEMENT CHARACTER}"'),
    (r'"A \u00e4 \/"', "A ä /"),
]


@pytest.mark.parametrize(("text", "value"), MENDED)
def test_half_a_surrogate_pair_becomes_a_replacement_character(text: str, value: str) -> None:
    assert loads(text) == value
    assert loads(f' {{"a": [{text}], {text}: 1}}\n') == {"a": [value], value: 1}
    assert msgspec.json.decode(mend(text.encode())) == value


@given(st.text(alphabet=st.sampled_from('\\"ud83dDEe0af"n/ ')))
def test_mending_changes_nothing_but_halves(text: str) -> None:
    """Valid JSON stays valid and invalid stays invalid; text without half a pair is unchanged."""
    try:
        value = json.loads(f'"{text}"')
    except ValueError:
        with pytest.raises(ValueError, match=r"\w"):
            loads(f'"{text}"')
        return
    assert loads(f'"{text}"') == well_formed(value)
    if is_text(value):
        assert mend(f'"{text}"') == f'"{text}"'


@pytest.mark.parametrize(
    "text",
    [
        "NaN",
        "-Infinity",
        "[Infinity]",
        "1e999",
        '{"a": -1e999}',
        "",
        " ",
        "{} x",
        "{",
        '{"a": 1,}',
        "[" * 100_000,
        "'a'",
    ],
)
def test_what_is_no_json_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"\w"):
        loads(text)


def test_values_and_their_ends() -> None:
    assert loads('\n{"a": 1e300, "b": 18446744073709551616} ') == {"a": 1e300, "b": 2**64}
    assert decode_at('{"a": 1}; [2]', 10) == ([2], 13)


@pytest.mark.parametrize("value", [float("nan"), [float("inf")], {"a": -float("inf")}])
def test_numbers_that_are_not_finite_are_not_written(value: Any) -> None:
    with pytest.raises(ValueError, match=r"\w"):
        dumps(value)


def test_layouts() -> None:
    assert dumps({"b": "ä", "a": [1]}, sort_keys=True, separators=(",", ":")) == '{"a":[1],"b":"ä"}'
    assert dumps(["ä"], ensure_ascii=True, indent=1) == '[\n "\\u00e4"\n]'
    deep: list[Any] = []
    for _ in range(100_000):
        deep = [deep]
    with pytest.raises(ValueError, match=r"\w"):
        dumps(deep)


@pytest.mark.parametrize(
    ("value", "place"),
    [
        ({"maximum": 2**64}, "$.maximum"),
        ({"properties": {"a": {"enum": [1, -(2**63) - 1]}}}, "$.properties.a.enum[1]"),
        ({"const": float("inf")}, "$.const"),
        ({"default": "\ud83d"}, "$.default"),
        ({"examples": [{"\ud83d": 1}]}, "$.examples[0]"),
        ({1: 2}, "$"),
        ({"a": {1, 2}}, "$.a"),
    ],
)
def test_what_readers_cannot_take_is_named_by_its_place(value: Any, place: str) -> None:
    problem = unreadable(value)
    assert problem is not None
    assert problem.startswith(f"{place} ")


def test_integers_below_some_keys_must_be_exact_as_doubles() -> None:
    value = {"maximum": 2**60, "const": [{"a": 2**53}], "enum": [-(2**53), {"b": 2**53 + 1}]}
    assert unreadable(value) is None
    assert unreadable(value, exact=("const", "enum")) == "$.enum[1].b is an integer beyond 53 bits"


def test_ordinary_values_are_readable() -> None:
    assert unreadable({"a": [True, None, 1.5, 2**64 - 1, -(2**63), "ä😀", ("b",)]}) is None
