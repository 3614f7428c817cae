"""Failures that are kept to one request, step, feature or thread: Exceptions and the panics of Rust libraries."""

from __future__ import annotations

import ast
import asyncio
from pathlib import Path

import pytest

import tfserve
from tests.panics import PanicException
from tests.tokenizers import long_token_json, write_tiny_tokenizer
from tfserve.errors import LibraryPanicError, failures, panics_as_errors


def panic_of_llguidance(tmp_path: Path) -> BaseException:
    from llguidance import LLTokenizer

    try:
        LLTokenizer(long_token_json(write_tiny_tokenizer(tmp_path)))
    except BaseException as error:
        return error
    raise AssertionError("no panic: find another one")


def test_panics_are_failures_and_no_exceptions(tmp_path: Path) -> None:
    for panic in (PanicException("lost"), panic_of_llguidance(tmp_path)):
        assert not isinstance(panic, Exception)
        assert isinstance(panic, failures())
    assert isinstance(ValueError(), failures())


@pytest.mark.parametrize("kind", [KeyboardInterrupt, SystemExit, GeneratorExit, asyncio.CancelledError])
def test_what_ends_a_program_or_a_task_is_no_failure(kind: type[BaseException]) -> None:
    assert not issubclass(kind, failures())
    with pytest.raises(kind), panics_as_errors("reading"):
        raise kind


def test_a_panic_becomes_an_error_and_an_exception_stays_what_it_is() -> None:
    with pytest.raises(LibraryPanicError, match="lost"), panics_as_errors("reading"):
        raise PanicException("lost")
    with pytest.raises(KeyError), panics_as_errors("reading"):
        raise KeyError


def test_every_except_that_isolates_takes_panics_too() -> None:
    """`except Exception` lets a Rust library's panic through; `except failures()` does not."""
    root = Path(tfserve.__file__).parent
    handlers = [
        f"{path.relative_to(root)}:{node.lineno}"
        for path in root.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ExceptHandler) and isinstance(node.type, ast.Name) and node.type.id == "Exception"
    ]
    assert handlers == []
