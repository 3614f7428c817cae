"""Control tokens that a message spells out stay text, so that no message can end itself and begin another one.

A chat template makes one text of all messages, in which a special token of the template's own looks like one that a
user typed. So the messages go through the template with a mark in every place where such a token could be cut, and the
text of the prompt is cut there before it is tokenised. Torch-free.
"""

from __future__ import annotations

import functools
import re
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any, SupportsIndex

from tokenizers import AddedToken

from tfserve.errors import RequestError
from tfserve.model.chat_template import MISTRAL_TAGS

_ANSWER_TAGS = frozenset(
    f"<{slash}{name}>" for name in ("tool_call", "tool_response", "think", "thinking") for slash in ("", "/")
)
"""What answers say, and templates look for in messages; some checkpoints call them special."""

_PIPED = re.compile(r"<[|\uff5c].*[|\uff5c]>", re.DOTALL)
"""How models write control tokens. Not all of them are called special: DeepSeek's <\uff5cUser\uff5c> is not."""

_WINDOW = 65_536
"""Characters that are searched at once: a search holds the interpreter lock, and others' streams, until it ends."""

_MARKS = range(0xF8FF, 0xDFFF, -1)
"""Private characters, one of which no request and no template holds."""

Render = Callable[[Any], str]


class PromptText(str):
    """The text of a prompt. `cuts` are places within it, ascending, over which no token may reach.

    A slice keeps those within it; any other text made of it is a plain one.
    """

    cuts: tuple[int, ...]

    def __new__(cls, text: str, cuts: Collection[int] = ()) -> PromptText:
        """A prompt's text with its cuts."""
        prompt = super().__new__(cls, text)
        prompt.cuts = tuple(cuts)
        return prompt

    def __getitem__(self, key: SupportsIndex | slice) -> str:
        part = super().__getitem__(key)
        if not isinstance(key, slice) or key.step not in (None, 1):
            return part
        start, stop, _ = key.indices(len(self))
        inside = self.cuts[bisect_right(self.cuts, start) : bisect_left(self.cuts, stop)]
        return PromptText(part, [cut - start for cut in inside])

    def pieces(self) -> Iterator[str]:
        """The texts between the cuts; one, if there are none."""
        start = 0
        for cut in (*self.cuts, len(self)):
            yield str.__getitem__(self, slice(start, cut))
            start = cut


def _is_written_so(text: str) -> bool:
    """True for a token that is a control token whatever the tokenizer calls it."""
    return text in MISTRAL_TAGS or _PIPED.fullmatch(text) is not None


class ControlTokens:
    """The control tokens among a tokenizer's added ones: special tokens, and what is written <|...|> or [TOOL_CALLS].

    Tags that answers contain (<tool_call>, <think>) are none of them, nor are other added tokens: users write them as a
    template does, and a template may look for them in a message.
    """

    def __init__(self, added: Collection[AddedToken], normalize: Callable[[str], str] | None = None) -> None:
        """`normalize` is what the tokenizer does to a text before it looks for tokens that are `normalized`."""
        tokens = [token for token in added if token.special or _is_written_so(token.content)]
        texts = {token.content for token in tokens} - _ANSWER_TAGS
        self._normalize = normalize if any(token.normalized for token in tokens) else None
        if self._normalize is not None:
            texts |= set(map(self._normalize, texts))
        self._texts = sorted(text for text in texts if len(text) > 1)  # one character cannot be cut
        self._pattern = _any_of(self._texts)
        self._each = re.compile(f"(?=({self._pattern.pattern}))")
        self._firsts = _one_of("".join(text[0] for text in self._texts))
        inside, last = "".join(text[1:-1] for text in self._texts), "".join(text[-1] for text in self._texts)
        longest = max(map(len, self._texts), default=2)
        self._longest = longest
        # Any text that could be the rest of a control token, and some that cannot.
        self._rest = re.compile(f"(?:{_one_of(inside).pattern}){{0,{longest - 2}}}{_one_of(last).pattern}")

    def keep_text(self, render: Render, request: Any, template: str) -> PromptText:
        """What `render` makes of `request` (its messages and variables), with the cuts that keep its texts text.

        `template` is the source of the template. Raises RequestError where there is no character to mark places with.
        """
        if self._normalize is not None:
            request = _mapped(request, functools.partial(self._normalized, self._normalize))
        plain = render(request)
        if not self._texts or not any(self._is_suspect(text) for text in _texts_in(request)):
            return PromptText(plain)
        mark = _unused([*_texts_in(request), template])
        everywhere = render(_mapped(request, lambda text: self._marked(text, mark)))
        if everywhere.replace(mark, "") == plain:
            return self._cut(everywhere, mark)
        # The template looks for something in the messages that is marked now: mark no more than whole tokens.
        sparsely = render(_mapped(request, lambda text: self._marked_within(text, mark)))
        # With other control tokens in it than the fully marked one has, a text was put together of what messages hold.
        written = ([found[0] for found in self._search(self._pattern, text)] for text in (sparsely, everywhere))
        return self._cut(sparsely if next(written) == next(written) else everywhere, mark)

    def _normalized(self, normalize: Callable[[str], str], text: str) -> str:
        """`text`, or what it is to the tokenizer, if only that may spell control tokens."""
        found = normalize(text)
        if found == text or not self._is_suspect(found):
            return text
        # To normalise it once more changes some texts, as by another space before them.
        return found if normalize(found) == found or self._pattern.search(found) else text

    def _is_suspect(self, text: str) -> bool:
        return self._firsts.search(text) is not None or self._rest.match(text.lstrip()) is not None

    def _marked(self, text: str, mark: str) -> str:
        """`text` with a mark wherever a control token could begin, and where the rest of one stands at its beginning.

        A name, such as a role or a key, is left alone.
        """
        if text.isidentifier() and not self._pattern.search(text):
            return text
        windows = (text[start : start + _WINDOW] for start in range(0, len(text), _WINDOW))
        marked = "".join(self._firsts.sub(lambda found: found[0] + mark, window) for window in windows)
        place = len(text) - len(text.lstrip())
        return marked[:place] + mark + marked[place:] if self._rest.match(text, place) else marked

    def _marked_within(self, text: str, mark: str) -> str:
        """`text` with a mark in each whole control token."""
        pieces, start = [], 0
        for found in self._search(self._pattern, text):
            pieces += [text[start : found.start() + 1], mark]
            start = found.start() + 1
        return "".join([*pieces, text[start:]])

    def _search(self, pattern: re.Pattern[str], text: str) -> Iterator[re.Match[str]]:
        """As `pattern.finditer(text)`, a window at a time."""
        end = 0
        for start in range(0, len(text), _WINDOW):
            stop = start + _WINDOW
            for found in pattern.finditer(text, max(start, end), stop + self._longest):
                if found.start() >= stop:
                    break
                end = found.end()
                yield found

    def _cut(self, marked: str, mark: str) -> PromptText:
        """The text without its marks, cut where one stood within a control token."""
        text = marked.replace(mark, "")
        spans = ((found.start(1), found.end(1)) for found in self._search(self._each, text))
        places = (found.start() - number for number, found in enumerate(re.finditer(mark, marked)))
        cuts = []
        place = next(places, None)
        for start, end in spans:
            while place is not None and place <= start:
                place = next(places, None)
            while place is not None and place < end:
                cuts.append(place)
                place = next(places, None)
        return PromptText(text, cuts)


def _unused(texts: Collection[str]) -> str:
    used: set[str] = set()
    for text in texts:
        if not text.isascii():
            for start in range(0, len(text), _WINDOW):
                used.update(text[start : start + _WINDOW])
    for code in _MARKS:
        if chr(code) not in used:
            return chr(code)
    raise RequestError("messages", "the messages hold every private character of Unicode; leave some out")


def _texts_in(value: Any) -> Iterator[str]:
    """Every text in a value, keys included."""
    left = [value]
    while left:
        item = left.pop()
        if isinstance(item, str):
            yield item
        elif isinstance(item, Mapping):
            left += item.keys()
            left += item.values()
        elif isinstance(item, list | tuple):
            left += item


def _mapped(value: Any, change: Callable[[str], str]) -> Any:
    """The value with each of its texts changed."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        return {_mapped(key, change): _mapped(item, change) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_mapped(item, change) for item in value]
    return value


def _one_of(chars: str) -> re.Pattern[str]:
    return re.compile(f"[{re.escape(''.join(sorted(set(chars))))}]" if chars else "(?!)")


def _any_of(texts: Collection[str]) -> re.Pattern[str]:
    """Matches the longest of `texts` that begins at a place; their beginnings are shared, so that it fails quickly."""
    tree: dict[str, Any] = {}
    for text in texts:
        node = tree
        for char in text:
            node = node.setdefault(char, {})
        node[""] = {}
    return re.compile(_pattern_of(tree) if texts else "(?!)")


def _pattern_of(tree: Mapping[str, Any]) -> str:
    branches = [re.escape(char) + _pattern_of(node) for char, node in sorted(tree.items()) if char]
    if not branches:
        return ""
    inside = branches[0] if len(branches) == 1 else f"(?:{'|'.join(branches)})"
    return f"(?:{inside})?" if "" in tree else inside
