"""Tool calls in what a model writes: found while the text streams in, in the two formats that models here write."""

from __future__ import annotations

import json
from collections.abc import Collection
from typing import Any, NamedTuple, Protocol

from tfserve.model.chat_template import ToolFormat

_BEGIN, _END = "<tool_call>", "</tool_call>"
_PYTHON_TAG = "<|python_tag|>"


class Call(NamedTuple):
    """One call; `arguments` is JSON."""

    name: str
    arguments: str


class Found(NamedTuple):
    """What a piece of text turned out to be: text for the reader, and calls."""

    content: str
    calls: list[Call]


class ToolCallParser(Protocol):
    """Tells calls from text for the reader; what may yet become a call is held back."""

    def push(self, text: str) -> Found:
        """Take more text; what is certain now."""
        ...

    def finish(self) -> Found:
        """The rest. Nothing may be pushed afterwards."""
        ...


def tool_call_parser(format: ToolFormat, names: Collection[str]) -> ToolCallParser:
    """A parser for one answer. `names` are the functions that exist."""
    return HermesParser() if format is ToolFormat.HERMES else Llama3Parser(names)


class HermesParser:
    """`<tool_call>{"name": ..., "arguments": {...}}</tool_call>`, as Qwen2.5 and Hermes write: several, amid text.

    A call is told as soon as its tag closes. White space beside calls is no text; what is not a call is.
    """

    def __init__(self) -> None:
        self._held = ""
        self._inside = False
        self._searched = 0  # characters of _held in which no closing tag begins
        self._after_call = False

    def push(self, text: str) -> Found:
        """See ToolCallParser."""
        self._held += text
        content, calls = "", []
        while True:
            tag = _END if self._inside else _BEGIN
            place = self._held.find(tag, self._searched)
            if place < 0:
                break
            before, self._held = self._held[:place], self._held[place + len(tag) :]
            self._searched = 0
            if not self._inside:
                content += self._shown(before.rstrip())
            elif (call := _call(before, "arguments")) is not None:
                calls.append(call)
                self._after_call = True
            else:
                content += self._shown(_BEGIN + before + _END)
            self._inside = not self._inside
        if self._inside:
            self._searched = max(0, len(self._held) - len(_END))
        else:
            certain = len(self._held[: len(self._held) - _overlap(self._held, _BEGIN)].rstrip())
            content += self._shown(self._held[:certain])
            self._held = self._held[certain:]
        return Found(content, calls)

    def finish(self) -> Found:
        """See ToolCallParser. A call whose closing tag never came counts if it is complete."""
        rest, self._held = self._held, ""
        if not self._inside:
            return Found(self._shown(rest), [])
        call = _call(rest, "arguments")
        return Found(self._shown(_BEGIN + rest), []) if call is None else Found("", [call])

    def _shown(self, text: str) -> str:
        """`text` for the reader: without the white space that separates it from a call before it."""
        if self._after_call:
            text = text.lstrip()
            self._after_call = not text
        return text


class Llama3Parser:
    """`{"name": ..., "parameters": {...}}` as the whole answer, as Llama 3 writes: several are separated by `;`.

    Only JSON that names a function that exists is a call, so an answer that begins with a brace is held until its end.
    """

    def __init__(self, names: Collection[str]) -> None:
        self._names = names
        self._held = ""
        self._is_text = False

    def push(self, text: str) -> Found:
        """See ToolCallParser."""
        if self._is_text:
            return Found(text, [])
        self._held += text
        begin = self._held.lstrip()
        if begin.startswith(("{", _PYTHON_TAG)) or _PYTHON_TAG.startswith(begin):
            return Found("", [])
        self._is_text = True
        held, self._held = self._held, ""
        return Found(held, [])

    def finish(self) -> Found:
        """See ToolCallParser."""
        calls = self._calls(self._held.strip().removeprefix(_PYTHON_TAG))
        return Found("", calls) if calls else Found(self._held, [])

    def _calls(self, text: str) -> list[Call]:
        """The calls that `text` consists of; none if there is anything else in it."""
        decoder = json.JSONDecoder()
        calls: list[Call] = []
        place = 0
        while place < len(text):
            if text[place] in "; \n\t\r":
                place += 1
                continue
            try:
                value, place = decoder.raw_decode(text, place)
            except (ValueError, RecursionError):
                return []
            call = _call_of(value, "parameters") or _call_of(value, "arguments")
            if call is None or call.name not in self._names:
                return []
            calls.append(call)
        return calls


def _call(text: str, arguments: str) -> Call | None:
    try:
        return _call_of(json.loads(text), arguments)
    except (ValueError, RecursionError):
        return None


def _call_of(value: Any, arguments: str) -> Call | None:
    """The call that a JSON value stands for, if it does."""
    if not isinstance(value, dict) or not isinstance(value.get("name"), str):
        return None
    given = value.get(arguments, {})
    return Call(value["name"], json.dumps(given, ensure_ascii=False)) if isinstance(given, dict) else None


def _overlap(text: str, tag: str) -> int:
    """Length of the longest end of `text` with which `tag` begins."""
    for length in range(min(len(tag) - 1, len(text)), 0, -1):
        if tag.startswith(text[-length:]):
            return length
    return 0
