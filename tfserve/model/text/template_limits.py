"""The sandbox of chat templates: limits access, computing time and the amount of text.

Templates are programs in checkpoints. jinja2's sandbox blocks access to Python's internals, but not endless loops or
huge texts. Here every loop, call, filter and operator counts towards a limit. Torch-free.
"""

from __future__ import annotations

import functools
import re
import string
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

MAX_SECONDS = 2.0
"""CPU time of one rendering. A conversation of thousands of messages takes some tenths."""

MAX_CHARS = 200_000_000
"""Characters of all texts of one rendering, intermediate ones included."""

_MAX_BITS = 4096
"""Longest integer that a template may compute."""

_CHECK_EVERY = 64
"""Operations between two looks at the clock, which is a system call."""

_ITEMS_AT_ONCE = 10_000
"""Items of a value that are counted between two looks at the clock."""

_ITEM_CHARS = 50
"""Characters that a value other than text counts for: about its length when written."""

_QUOTES = 4
"""Added to a text's characters: quotes, a comma and a space in a list."""

_AMPLIFIERS = frozenset(
    (
        *("replace", "join", "center", "ljust", "rjust", "zfill", "expandtabs", "format", "format_map", "translate"),
        *("to_bytes", "indent", "wordwrap", "tojson", "xmlattr", "strftime_now", "batch", "slice"),
    )
)
"""Methods, filters and functions whose result may be as long as the product of two arguments."""

_NO_TEXT = frozenset(
    (
        *("abs", "attr", "count", "d", "default", "dictsort", "first", "float", "groupby", "int", "items", "last"),
        *("length", "list", "map", "max", "min", "random", "reject", "rejectattr", "reverse", "round", "select"),
        *("selectattr", "sort", "sum", "unique"),
    )
)
"""Filters that do not convert their value to text, so that lists are not counted."""

_UNNEEDED_FILTERS = ("pprint", "urlize", "wordwrap")
"""Removed filters: no prompt needs them, and their time is at least quadratic in the text."""

_CHAR_COSTS = {"title": 20, "strftime_now": 10_000}
"""Weight of a character of an argument, for slow functions."""

_FORMATS = frozenset(("%", "format", "format_map", "strftime_now"))
"""Functions that read widths from a format text."""

_WIDTH = re.compile(r"\d{5}|%[^%a-z]*\*")

_CONTAINERS: tuple[type[Any], ...] = (list, tuple, set, frozenset, type({}.keys()), type({}.values()), type({}.items()))


class TemplateLimitError(jinja2.TemplateRuntimeError):
    """A rendering exceeds the time or the text limit."""


class LimitedEnvironment(ImmutableSandboxedEnvironment):
    """jinja2's immutable sandbox, with limits for each rendering and each compilation: call `restart` before either."""

    intercepted_binops = frozenset(("+", "*", "**", "%"))

    def __init__(self, extensions: Sequence[type[Extension]]) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=extensions, finalize=self._finalize)
        self._meter = _Meter()
        self.restart = self._meter.restart
        del self.globals["lipsum"]  # it writes any number of words
        for name in _UNNEEDED_FILTERS:
            del self.filters[name]
        for name, function in list(self.filters.items()):
            self.add_filter(name, function)
        self.tests = {name: self._limited_test(function) for name, function in self.tests.items()}
        self.filters |= {"_each": self._each, "_text": self._text}
        self.filters |= {"_made": self._meter.made, "_sliced": self._meter.sliced}

    def add_filter(self, name: str, function: Callable[..., Any]) -> None:
        """Make `function` callable in templates as `name`, within the limits."""
        is_marked = hasattr(function, "jinja_pass_arg")  # its first argument is then jinja2's own

        @functools.wraps(function)
        def limited(*args: Any, **kwargs: Any) -> Any:
            given = [*args[is_marked:], *kwargs.values()]
            if name == "sum" and any(isinstance(item, list | tuple) for item in given[1:]):
                raise TemplateLimitError("it adds lists up one by one")
            if name in _AMPLIFIERS:
                self._meter.expect(name, given)
            elif name not in _NO_TEXT:
                self._meter.count(self._meter.size(given[:1]) * _CHAR_COSTS.get(name, 1))
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
            return self._meter.made(left + right)
        if isinstance(left, int) and isinstance(right, int):
            bits = left.bit_length() * right if operator == "**" else left.bit_length() + right.bit_length()
            if bits > _MAX_BITS:
                raise TemplateLimitError("it computes an integer that is too long")
        elif operator == "%" and isinstance(left, str | bytes):
            self._meter.expect(operator, [left, right])
        elif operator == "*":
            length = len(left) if hasattr(left, "__len__") else len(right) if hasattr(right, "__len__") else 0
            self._meter.count(length * max((item for item in (left, right) if isinstance(item, int)), default=0))
        return self._meter.made(super().call_binop(context, operator, left, right))

    def concat(self, pieces: Iterable[str]) -> str:
        """Join the output of a template, macro or block."""
        return "".join(self._counted(pieces))

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree: nodes.Template = _Instrumented().visit(super()._parse(source, name, filename))
        tree.set_environment(self)
        return tree

    def _limited_test(self, function: Any) -> Callable[..., Any]:
        """A test for `is`, or for filters such as select, that counts as an operation."""

        @functools.wraps(function)
        def limited(*args: Any, **kwargs: Any) -> Any:
            self._meter.count(1)
            return function(*args, **kwargs)

        return limited

    def _counted(self, pieces: Iterable[str]) -> Iterator[str]:
        for piece in pieces:
            self._meter.count(len(piece))
            yield piece

    def _each(self, items: Iterable[Any]) -> Iterator[Any]:
        for item in items:
            self._meter.count(1)
            yield item

    def _text(self, parts: Sequence[Any]) -> str:
        self._meter.count(self._meter.size(parts))
        return "".join(map(str, parts))

    def _finalize(self, value: Any) -> Any:
        """Convert an expression's value for output; texts are counted when they are joined."""
        if not isinstance(value, str):
            self._meter.count(self._meter.size(value))
        return value


class _Instrumented(NodeTransformer):
    """Routes loops, `~`, slices and literals, which jinja2 compiles to plain Python, through filters."""

    def visit_For(self, node: nodes.For) -> nodes.For:  # noqa: N802 - jinja2's name
        self.generic_visit(node)
        node.iter = _filter(node.iter, "_each")
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Filter:  # noqa: N802
        self.generic_visit(node)
        return _filter(nodes.List(node.nodes, lineno=node.lineno), "_text")

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Expr:  # noqa: N802
        self.generic_visit(node)
        return _filter(node, "_sliced") if isinstance(node.arg, nodes.Slice) else node

    def visit_List(self, node: nodes.List) -> nodes.Filter:  # noqa: N802
        self.generic_visit(node)
        return _filter(node, "_made")

    visit_Dict = visit_List  # noqa: N815

    def visit_Tuple(self, node: nodes.Tuple) -> nodes.Expr:  # noqa: N802
        self.generic_visit(node)
        return _filter(node, "_made") if node.ctx == "load" else node


def _filter(node: Any, name: str) -> nodes.Filter:
    return nodes.Filter(node, name, [], [], None, None, lineno=node.lineno)


class _Meter(threading.local):
    """The remaining budget of this thread's rendering."""

    def __init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        """Reset both budgets."""
        self._chars = MAX_CHARS
        self._operations = 0
        self._end_s = time.thread_time() + MAX_SECONDS

    def count(self, chars: int) -> None:
        """Count an operation with `chars` characters (or items). Raises TemplateLimitError."""
        self._chars -= chars
        if self._chars < 0:
            raise TemplateLimitError(f"it makes more than {MAX_CHARS} characters of text")
        self._operations += 1
        if self._operations % _CHECK_EVERY == 0:
            self._check_time()

    def size(self, value: Any) -> int:
        """Approximate length of a value as text; stops at the limit."""
        size, left, looked_at = 0, [value], 0
        while left and size <= MAX_CHARS:
            item = left.pop()
            if isinstance(item, str | bytes):
                size += len(item) + _QUOTES
                continue
            size += _ITEM_CHARS + (item.bit_length() // 3 if isinstance(item, int) else 0)
            looked_at += 1
            if looked_at % _ITEMS_AT_ONCE == 0:
                self._check_time()
            if isinstance(item, dict):
                left += item.keys()
                left += item.values()
            elif isinstance(item, _CONTAINERS):
                left += item
        return size

    def made(self, result: Any) -> Any:
        """Count the result of a call, or a literal, with everything in it, and return it.

        Values that contain the same value twice, on many levels, would take for ever to compare or to hash.
        """
        self.count(len(result) if isinstance(result, str) else self.size(result))
        return result

    def sliced(self, part: Any) -> Any:
        """Count a slice; the contents of its items are counted already."""
        self.count(len(part) * (1 if isinstance(part, str | bytes) else _ITEM_CHARS))
        return part

    def expect(self, name: str, given: Sequence[Any]) -> None:
        """Count the longest possible result of the function `name` for its arguments."""
        if name == "replace" and all(isinstance(item, str) for item in given[:3]) and len(given) > 2:
            text, old, new = given[:3]
            self.count(len(text) + text.count(old) * len(new))
            return
        if name in _FORMATS and isinstance(given[0], str) and _has_unknown_width(given[0], name):
            raise TemplateLimitError("it formats a text with a width of five digits or of unknown size")
        if name in _CHAR_COSTS:
            self.count(self.size(given) * _CHAR_COSTS[name])
            return
        factors = sorted((abs(item) if isinstance(item, int) else self.size(item) for item in given), reverse=True)
        self.count(factors[0] * max(factors[1], 1) if len(factors) > 1 else sum(factors))

    def _check_time(self) -> None:
        if time.thread_time() > self._end_s:
            raise TemplateLimitError(f"it computes for more than {MAX_SECONDS:.0f} s")


def _has_unknown_width(text: str, name: str) -> bool:
    """True for a format text with a width of five digits or of unknown size: the result may be huge."""
    if _WIDTH.search(text):
        return True
    try:
        fields = list(string.Formatter().parse(text)) if name in ("format", "format_map") else []
    except ValueError:  # not a format text
        return False
    return any("{" in (spec or "") for _, _, spec, _ in fields)
