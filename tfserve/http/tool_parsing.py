"""Tool calls in what a model writes: found while the text streams in, in the formats that models here write."""

from __future__ import annotations

import re
import uuid
from collections.abc import Collection
from typing import Any, NamedTuple, Protocol

from tfserve import strict_json
from tfserve.model.text.chat_template import MISTRAL_TAGS, TOOL_CALL_TAGS, ToolFormat

_BEGIN, _END = TOOL_CALL_TAGS
_TAG = re.compile("</?tool_call>")
_PYTHON_TAG = "<|python_tag|>"
_CALLS, _ID, _ARGS = MISTRAL_TAGS
_NAMED_CALL = re.compile(rf"([\w.-]+)(?:{re.escape(_ID)}\w*)?(?:{re.escape(_ARGS)})?\s*(?={{)", re.ASCII)
_BESIDE_ARGUMENTS = frozenset({"name", "type", "id"})
_OUTSIDE_STRING = re.compile(r"[\s\w{}\[\],:.+-]*", re.ASCII)
_IN_STRING = re.compile(r'(?:[^"\\\x00-\x1f]|\\.)*', re.DOTALL)
"""How far a JSON text goes on without a quote that begins or ends a string."""


class Call(NamedTuple):
    """One call; `arguments` is JSON."""

    name: str
    arguments: str


class Found(NamedTuple):
    """What a piece of text turned out to be: text for the reader, and calls."""

    content: str
    calls: list[Call]

    def join(self, later: Found) -> Found:
        """Both together."""
        return Found(self.content + later.content, [*self.calls, *later.calls])


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
    match format:
        case ToolFormat.HERMES:
            return HermesParser()
        case ToolFormat.MISTRAL:
            return MistralParser(names)
        case ToolFormat.LLAMA3:
            return Llama3Parser(names)


def new_call_id(format: ToolFormat | None) -> str:
    """An id for a call. Mistral's templates take ids of nine letters and digits, and no others."""
    name = uuid.uuid4().hex
    return name[:9] if format is ToolFormat.MISTRAL else f"call_{name}"


class HermesParser:
    """`<tool_call>{"name": ..., "arguments": {...}}</tool_call>`, as Qwen2.5 and Hermes write: several, amid text.

    A call is told as soon as its tag closes or another opens; a tag in one of its strings is part of the string. What
    is not a call is text, as it stands; white space beside calls is text only between two others.
    """

    def __init__(self) -> None:
        self._held = ""
        self._block: _Block | None = None  # set behind an opening tag
        self._has_shown = False
        self._gap: str | None = None  # behind a call: the white space around it

    def push(self, text: str) -> Found:
        """See ToolCallParser."""
        self._held += text
        found = Found("", [])
        while self._block is not None or _BEGIN in self._held:
            if self._block is None:
                before, _, self._held = self._held.partition(_BEGIN)
                shown = before.rstrip()
                found = self._shown(found, shown)
                self._block = _Block(before[len(shown) :])
            end = self._block.end(self._held)
            if end is None:
                return found
            found = self._close(found, end)
        certain = len(self._held[: len(self._held) - overlap(self._held, _BEGIN)].rstrip())
        found = self._shown(found, self._held[:certain])
        self._held = self._held[certain:]
        return found

    def finish(self) -> Found:
        """See ToolCallParser. A call whose closing tag did not come, or not whole, counts if it is complete."""
        found = Found("", [])
        while self._block is not None:
            found = self._close(found, len(self._held)).join(self.push(""))
        rest, self._held = self._held, ""
        return self._shown(found, rest)

    def _close(self, found: Found, end: int) -> Found:
        """The block ends at `end` of what is held, with the closing tag if one is there: as a call or as text."""
        assert self._block is not None
        block, self._block = self._block, None
        is_all = end == len(self._held)
        call = _call(self._held[: end - overlap(self._held, _END) if is_all else end], "arguments")
        if call is None and block.first_tag is not None:
            end = block.first_tag  # what follows it may have calls of its own
        inside, rest = self._held[:end], self._held[end:]
        self._held = rest.removeprefix(_END)
        if call is None:
            text = block.space + _BEGIN + inside + rest[: len(rest) - len(self._held)]
            shown = text.rstrip()
            self._held = text[len(shown) :] + self._held  # a call may follow
            return self._shown(found, shown)
        self._gap = (self._gap or "") + block.space
        return found.join(Found("", [call]))

    def _shown(self, found: Found, text: str) -> Found:
        """Add text for the reader; the white space around calls before it only if there is text before them."""
        if self._gap is not None:
            self._gap += text[: len(text) - len(text.lstrip())]
            text = text.lstrip()
            if text:
                text = self._gap + text if self._has_shown else text
                self._gap = None
        self._has_shown = self._has_shown or bool(text)
        return found.join(Found(text, []))


class _Block:
    """What follows an opening tag, while its end is looked for. `space` is the white space before that tag.

    `first_tag` is where the first tag is, if that seems to be in a string.
    """

    def __init__(self, space: str) -> None:
        self.space = space
        self.first_tag: int | None = None
        self._is_object = False
        self._in_string = False
        self._read = 0  # characters that `_in_string` takes into account
        self._searched = 0  # characters in which no further tag begins

    def end(self, held: str) -> int | None:
        """Where the block of which `held` is known ends: at a tag, or at 0 if it cannot be a call."""
        if not self._is_object and (begin := held.lstrip()):
            self._is_object = begin.startswith("{")
            if not self._is_object:
                return 0
        while tag := _TAG.search(held, self._searched):
            if not self._is_in_string(held, tag.start()):
                return tag.start()
            if self.first_tag is None:
                self.first_tag = tag.start()
            self._searched = tag.end()
        self._searched = max(self._searched, len(held) - len(_END) + 1)
        return None

    def _is_in_string(self, held: str, place: int) -> bool:
        """True if a string is open at `place`, and all before it may be JSON."""
        while self._read < place:
            going_on = (_IN_STRING if self._in_string else _OUTSIDE_STRING).match(held, self._read, place)
            assert going_on is not None  # it may be empty
            self._read = going_on.end()
            if self._read < place:
                if held[self._read] != '"':
                    return False
                self._in_string = not self._in_string
                self._read += 1
        return self._in_string


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
        calls = self._calls(strict_json.mend(self._held).strip().removeprefix(_PYTHON_TAG))
        return Found("", calls) if calls else Found(self._held, [])

    def _calls(self, text: str) -> list[Call]:
        """The calls that `text` consists of; none if there is anything else in it."""
        calls: list[Call] = []
        place = 0
        while place < len(text):
            if text[place] in "; \n\t\r":
                place += 1
                continue
            try:
                value, place = strict_json.decode_at(text, place)
                call = _call_of(value, "parameters")
            except ValueError:
                return []
            if call is None or call.name not in self._names:
                return []
            calls.append(call)
        return calls


class MistralParser:
    """`[TOOL_CALLS] [{"name": ..., "arguments": {...}}, ...]`, or `[TOOL_CALLS]name[ARGS]{...}` for each call.

    Calls come last, and are held until the end. Without the tag only a list that is the whole answer counts, and only
    of functions that exist: so a grammar writes it.
    """

    def __init__(self, names: Collection[str]) -> None:
        self._names = names
        self._held = ""
        self._is_text = False

    def push(self, text: str) -> Found:
        """See ToolCallParser."""
        self._held += text
        place = self._held.find(_CALLS)
        if place < 0 and not self._is_text:
            begin = self._held.lstrip()
            if not begin or (begin[0] == "[" and begin[1:].lstrip()[:1] in ("", "{")):
                return Found("", [])
        certain = place if place >= 0 else len(self._held) - overlap(self._held, _CALLS)
        shown = self._held[:certain].rstrip()
        self._held = self._held[len(shown) :]
        self._is_text = self._is_text or bool(shown)
        return Found(shown, [])

    def finish(self) -> Found:
        """See ToolCallParser."""
        first, *pieces = strict_json.mend(self._held).split(_CALLS)
        calls: list[Call] = []
        for piece in pieces or ([] if self._is_text else [first]):
            found = _mistral_calls(piece.strip())
            if not found or not (pieces or all(call.name in self._names for call in found)):
                return Found(self._held, [])
            calls += found
        return Found("", calls) if calls else Found(self._held, [])


def _mistral_calls(text: str) -> list[Call]:
    """The calls that a text between tags consists of; none if there is anything else in it."""
    named = _NAMED_CALL.match(text)
    try:
        value = strict_json.loads(text[named.end() :] if named else text)
        values = [{"name": named[1], "arguments": value}] if named else value
        calls = [_call_of(each, "arguments") for each in values] if isinstance(values, list) else []
    except ValueError:
        return []
    return [] if None in calls else [call for call in calls if call is not None]


def _call(text: str, arguments: str) -> Call | None:
    try:
        return _call_of(strict_json.loads(text), arguments)
    except ValueError:
        return None


def _call_of(value: Any, key: str) -> Call | None:
    """The call that a JSON value stands for, if it does; `key` is what its format calls the arguments.

    Models mix the formats up, so the other's name counts too, and so does a string that holds the JSON of an object.
    An object with neither is a call without arguments only if it holds nothing else that could be meant as some.
    Raises ValueError for a string that holds none.
    """
    if not isinstance(value, dict) or not isinstance(value.get("name"), str):
        return None
    names = [name for name in (key, "arguments", "parameters") if name in value]
    if not names and not value.keys() <= _BESIDE_ARGUMENTS:
        return None
    given: Any = value[names[0]] if names else {}
    if isinstance(given, str):
        given = strict_json.loads(given)
    return Call(value["name"], strict_json.dumps(given)) if isinstance(given, dict) else None


def overlap(text: str, tag: str) -> int:
    """Length of the longest end of `text` with which `tag` begins."""
    for length in range(min(len(tag) - 1, len(text)), 0, -1):
        if tag.startswith(text[-length:]):
            return length
    return 0
