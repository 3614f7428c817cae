"""Data that does not fit a type: the error has its place and our own words, independent of msgspec's message."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

import msgspec
import pytest

from tfserve.misfit import NotJsonError, find_misfit, plain_json, why_not_json

Small = Annotated[int, msgspec.Meta(ge=0, lt=10)]


class Cat(msgspec.Struct, tag="cat"):
    lives: Small = 9


class Dog(msgspec.Struct, tag="dog"):
    name: Annotated[str, msgspec.Meta(pattern="^[a-z]+$")]


class Home(msgspec.Struct, kw_only=True):
    size: Literal["small", "large"]
    pets: list[Cat | Dog] = []
    rooms: dict[int, float | None] = {}
    owner: str | list[str | Small] | None = None
    floors: tuple[int, ...] = ()
    notes: Sequence[str] = ()
    lift: bool = False
    extra: Any = None
    unset: int | msgspec.UnsetType = msgspec.UNSET


FITS: dict[str, Any] = {"size": "small"}


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"size": None}, "size must be 'small' or 'large', got None"),
        ({"size": "huge"}, "size must be 'small' or 'large', got 'huge'"),
        ({"pets": {}}, "pets must be a list, got an object"),
        (
            {"pets": [{"type": "cat"}, {"type": "cat", "lives": 10}]},
            "pets[1].lives must be an integer >= 0 and < 10, got 10",
        ),
        ({"pets": [{"type": "cat", "lives": "x"}]}, "pets[0].lives must be an integer, got a string"),
        ({"pets": [{"type": "dog"}]}, "pets[0].name is required"),
        ({"pets": [{"type": "dog", "name": "A"}]}, "pets[0].name must be a string that matches ^[a-z]+$, got 'A'"),
        ({"pets": [{"type": "cow"}]}, "pets[0].type must be 'cat' or 'dog', got 'cow'"),
        ({"pets": [{}]}, "pets[0].type is required"),
        ({"pets": [3]}, "pets[0] must be an object, got an integer"),
        ({"rooms": {"1": 2.5, "2": "x"}}, "rooms['2'] must be a number, got a string"),
        ({"rooms": {"1": 2.5, "x": 1}}, "rooms must have keys that are each an integer, got 'x'"),
        ({"rooms": []}, "rooms must be an object, got a list"),
        ({"owner": 3}, "owner must be a string or a list, got an integer"),
        ({"owner": ["a", 1, 1.5]}, "owner[2] must be a string or an integer, got a number"),
        ({"owner": ["a", 11]}, "owner[1] must be an integer >= 0 and < 10, got 11"),
        ({"floors": [1, 2, None, 4, "x"]}, "floors[2] must be an integer, got null"),
        ({"notes": [*["x"] * 1000, 3, *["x"] * 1000]}, "notes[1000] must be a string, got an integer"),
        ({"lift": 1}, "lift must be true or false, got an integer"),
        ({"floors": [True]}, "floors[0] must be an integer, got true or false"),
        ({"unset": None}, "unset must be an integer, got null"),
    ],
)
def test_the_first_thing_that_does_not_fit_is_named(change, says):
    data = FITS | change
    assert str(find_misfit(data, Home)) == says
    assert why_not_json(msgspec.json.encode(data), Home) == says
    with pytest.raises(msgspec.ValidationError):
        msgspec.json.decode(msgspec.json.encode(data), type=Home)


def test_what_fits_has_no_misfit():
    full = {
        "pets": [{"type": "cat"}],
        "rooms": {"1": None},
        "owner": ["a", 1],
        "notes": ["x"],
        "extra": [object],
        "more": 1,
    }
    assert find_misfit(FITS | full, Home) is None
    assert find_misfit({"size": "small", "floors": ["1"], "lift": "true"}, Home, strict=False) is None
    assert (
        str(find_misfit(FITS | {"floors": ["x"]}, Home, strict=False)) == "floors[0] must be an integer, got a string"
    )


def test_the_whole_may_be_of_the_wrong_kind():
    assert str(find_misfit([], Home)) == "must be an object, got a list"
    assert why_not_json(b"[]", Home) == "it must be an object, got a list"


def test_long_values_are_cut():
    assert len(str(find_misfit({"size": "x" * 10_000}, Home))) < 120
    assert len(str(find_misfit(FITS | {"rooms": {"x" * 10_000: 1}}, Home))) < 150


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"{", "is not valid JSON"),
        (b"", "is not valid JSON"),
        (b'"\xff"', "is not valid UTF-8"),
        (b"[" * 100_000, "is nested too deeply"),
        (b"1e999", "holds a number that is out of range"),
    ],
)
def test_bytes_that_are_no_json_are_told_apart(data, says):
    with pytest.raises(NotJsonError, match=f"^{says}"):
        plain_json(data)
    assert why_not_json(data, Any).startswith(f"it {says}")
