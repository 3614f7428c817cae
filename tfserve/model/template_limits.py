"""The sandbox in which chat templates run: what they may reach, how long they may compute and how much text they make.

Templates are programs that come with checkpoints. jinja2's sandbox keeps them from Python's internals, but not from
loops without an end or from text without measure: every loop, call, filter and operator here is counted against a
limit. Torch-free.
"""

from __future__ import annotations

import functools
import re
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

MOST_SECONDS = 2.0
"""CPU time of one rendering. A conversation of thousands of messages takes some tenths."""

MOST_CHARS = 200_000_000
"""Characters of all texts that one rendering makes, intermediate ones included."""

_MOST_BITS = 4096
"""Longest integer that a template may compute."""

_CHECK_EVERY = 64
"""Operations between two looks at the clock, which is a system call."""

_AMPLIFIERS = frozenset(
    (
        *("replace", "join", "center", "ljust", "rjust", "zfill", "expandtabs", "format", "format_map", "translate"),
        *("to_bytes", "indent", "wordwrap", "tojson", "xmlattr", "strftime_now", "batch", "slice"),
    )
)
"""Methods, filters and functions whose result may be as long as one argument times another."""

_NO_TEXT = frozenset(
    (
        *("abs", "attr", "count", "d", "default", "dictsort", "first", "float", "groupby", "int", "items", "last"),
        *("length", "list", "map", "max", "min", "random", "reject", "rejectattr", "reverse", "round", "select"),
        *("selectattr", "sort", "sum", "unique"),
    )
)
"""Filters that do not write their value as text; a list is not measured for them."""

_FORMATS = frozenset(("%", "format", "format_map", "strftime_now"))
"""Amplifiers that read widths out of a text."""

_WIDTH = re.compile(r"\d{5}|%[^%a-z]*\*")


class TemplateLimitError(jinja2.TemplateRuntimeError):
    """A rendering that takes too long or makes too much text."""


class LimitedEnvironment(ImmutableSandboxedEnvironment):
    """jinja2's immutable sandbox, with limits for each rendering and each compilation: call `restart` before either."""

    intercepted_binops = frozenset(("+", "*", "**", "%"))

    def __init__(self, extensions: Sequence[type[Extension]]) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=extensions, finalize=self._finalize)
        self._meter = _Meter()
        self.restart = self._meter.restart
        del self.globals["lipsum"]  # it writes as many words as it is told to
        for name, function in list(self.filters.items()):
            self.add_filter(name, function)
        self.filters["_each"] = self._each
        self.filters["_text"] = self._text

    def add_filter(self, name: str, function: Callable[..., Any]) -> None:
        """Have templates call `function` by `name`, within the limits."""
        is_marked = hasattr(function, "jinja_pass_arg")  # its first argument is then jinja2's own

        @functools.wraps(function)
        def limited(*args: Any, **kwargs: Any) -> Any:
            given = [*args[is_marked:], *kwargs.values()]
            if name in _AMPLIFIERS:
                self._meter.expect(name, given)
            elif name not in _NO_TEXT:
                self._meter.count(_size(given[:1]))
            return self._meter.made(function(*args, **kwargs))

        self.filters[name] = limited

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N805
        """See SandboxedEnvironment; the names let templates pass arguments called `self`."""
        function = getattr(__obj, "__wrapped__", __obj)  # the sandbox wraps str.format
        name = getattr(function, "__name__", "")
        if name in _AMPLIFIERS:
            owner = [function.__self__] if hasattr(function, "__self__") else []
            __self._meter.expect(name, [*owner, *args, *kwargs.values()])
        return __self._meter.made(super().call(__context, __obj, *args, **kwargs))

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """See SandboxedEnvironment."""
        if operator == "+":
            if hasattr(left, "__len__") and hasattr(right, "__len__"):
                self._meter.count(len(left) + len(right))
            return left + right
        if isinstance(left, int) and isinstance(right, int):
            bits = left.bit_length() * right if operator == "**" else left.bit_length() + right.bit_length()
            if bits > _MOST_BITS:
                raise TemplateLimitError("it computes an integer that is too long")
        elif operator == "%" and isinstance(left, str | bytes):
            self._meter.expect(operator, [left, right])
        elif operator == "*":
            length = len(left) if hasattr(left, "__len__") else len(right) if hasattr(right, "__len__") else 0
            self._meter.count(length * max((item for item in (left, right) if isinstance(item, int)), default=0))
        return super().call_binop(context, operator, left, right)

    def concat(self, pieces: Iterable[str]) -> str:
        """What a template, macro or block has written, as one text."""
        return "".join(self._counted(pieces))

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree: nodes.Template = _Instrumented().visit(super()._parse(source, name, filename))
        tree.set_environment(self)
        return tree

    def _counted(self, pieces: Iterable[str]) -> Iterator[str]:
        for piece in pieces:
            self._meter.count(len(piece))
            yield piece

    def _each(self, items: Iterable[Any]) -> Iterator[Any]:
        for item in items:
            self._meter.count(1)
            yield item

    def _text(self, parts: Sequence[Any]) -> str:
        self._meter.count(_size(parts))
        return "".join(map(str, parts))

    def _finalize(self, value: Any) -> Any:
        """What an expression writes; texts are counted when they are put together."""
        if not isinstance(value, str):
            self._meter.count(_size(value))
        return value


class _Instrumented(NodeTransformer):
    """Sends loops and `~`, which jinja2 compiles to plain Python, through filters."""

    def visit_For(self, node: nodes.For) -> nodes.For:  # noqa: N802 - jinja2's name
        self.generic_visit(node)
        node.iter = _filter(node.iter, "_each")
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Filter:  # noqa: N802
        self.generic_visit(node)
        return _filter(nodes.List(node.nodes, lineno=node.lineno), "_text")


def _filter(node: Any, name: str) -> nodes.Filter:
    return nodes.Filter(node, name, [], [], None, None, lineno=node.lineno)


class _Meter(threading.local):
    """What is left to the rendering of this thread."""

    def __init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        """All of both limits."""
        self._chars = MOST_CHARS
        self._operations = 0
        self._end_s = time.thread_time() + MOST_SECONDS

    def count(self, chars: int) -> None:
        """One operation that makes `chars` characters (or items). Raises TemplateLimitError."""
        self._chars -= chars
        if self._chars < 0:
            raise TemplateLimitError(f"it makes more than {MOST_CHARS} characters of text")
        self._operations += 1
        if self._operations % _CHECK_EVERY == 0 and time.thread_time() > self._end_s:
            raise TemplateLimitError(f"it computes for more than {MOST_SECONDS:.0f} s")

    def made(self, result: Any) -> Any:
        """The result of a call, counted."""
        self.count(len(result) if isinstance(result, str | bytes | list | tuple | dict) else 1)
        return result

    def expect(self, name: str, given: Sequence[Any]) -> None:
        """Count the longest result that the amplifier `name` may have for what it is given."""
        if name == "replace" and all(isinstance(item, str) for item in given[:3]) and len(given) > 2:
            text, old, new = given[:3]
            self.count(len(text) + text.count(old) * len(new))
            return
        if name in _FORMATS and isinstance(given[0], str) and _WIDTH.search(given[0]):
            raise TemplateLimitError("it formats a text with a width of five digits or of unknown size")
        factors = sorted((abs(item) if isinstance(item, int) else _size(item) for item in given), reverse=True)
        self.count(factors[0] * max(factors[1], 1) if len(factors) > 1 else sum(factors))


_ITEM_CHARS = 50
"""What anything but text counts for: it takes as long to look at, and may be written as long."""


def _size(value: Any) -> int:
    """Characters of a value written as text, about; not more than the limit is looked at."""
    size, left = 0, [value]
    while left and size <= MOST_CHARS:
        item = left.pop()
        if isinstance(item, str | bytes):
            size += len(item)
            continue
        size += _ITEM_CHARS + (item.bit_length() // 3 if isinstance(item, int) else 0)
        if isinstance(item, dict):
            left += item.keys()
            left += item.values()
        elif isinstance(item, list | tuple):
            left += item
    return size
