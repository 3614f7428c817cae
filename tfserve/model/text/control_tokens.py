"""Keeps control tokens in a message's text as plain text: a message cannot end itself and start another one.

A chat template joins all messages into one text. In it a control token of the template looks like one that a user
typed. So the template renders the messages with a mark inside every possible control token, and the prompt's text is
cut at the marks before it is tokenised. Torch-free.
"""

from __future__ import annotations

import functools
import re
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any, SupportsIndex

from tokenizers import AddedToken

from tfserve.errors import RequestError
from tfserve.model.text.chat_template import MISTRAL_TAGS

_ANSWER_TAGS = frozenset(
    f"<{slash}{name}>" for name in ("tool_call", "tool_response", "think", "thinking") for slash in ("", "/")
)
"""Tags that answers contain and that templates search for in messages; some checkpoints call them special."""

_PIPED = re.compile(r"<[|\uff5c].*[|\uff5c]>", re.DOTALL)
"""Spelling of control tokens. Not all of them are special in the tokenizer: DeepSeek's <\uff5cUser\uff5c> is not."""

_WINDOW = 65_536
"""Characters searched in one call: a search holds the interpreter lock, so a long one would block other streams."""

_MARKS = range(0xF8FF, 0xDFFF, -1)
"""Private-use characters; the mark is one that neither the request nor the template contains."""

Render = Callable[[Any], str]


class PromptText(str):
    """The text of a prompt. `cuts` are positions in it, ascending; no token may span a cut.

    A slice keeps its cuts; any other operation gives a plain str.
    """

    cuts: tuple[int, ...]

    def __new__(cls, text: str, cuts: Collection[int] = ()) -> PromptText:
        """Make a prompt's text with cuts."""
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
    """True for a token that is a control token by its spelling."""
    return text in MISTRAL_TAGS or _PIPED.fullmatch(text) is not None


class ControlTokens:
    """The control tokens among a tokenizer's added ones: special tokens, and those spelt <|...|> or [TOOL_CALLS].

    Tags that answers contain (<tool_call>, <think>) and other added tokens are not included: users may write them, and
    a template may search for them in a message.
    """

    def __init__(self, added: Collection[AddedToken], normalize: Callable[[str], str] | None = None) -> None:
        """`normalize` is the tokenizer's normalisation, applied before it searches for tokens with `normalized` set."""
        tokens = [token for token in added if token.special or _is_written_so(token.content)]
        texts = {token.content for token in tokens} - _ANSWER_TAGS
        self._normalize = normalize if any(token.normalized for token in tokens) else None
        if self._normalize is not None:
            texts |= set(map(self._normalize, texts))
        self._texts = sorted(text for text in texts if len(text) > 1)  # a token of one character cannot be cut
        self._pattern = _any_of(self._texts)
        self._each = re.compile(f"(?=({self._pattern.pattern}))")
        self._firsts = _one_of("".join(text[0] for text in self._texts))
        inside, last = "".join(text[1:-1] for text in self._texts), "".join(text[-1] for text in self._texts)
        longest = max(map(len, self._texts), default=2)
        self._longest = longest
        # Matches every text that could be the rest of a control token, and some others.
        self._rest = re.compile(f"(?:{_one_of(inside).pattern}){{0,{longest - 2}}}{_one_of(last).pattern}")

    def keep_text(self, render: Render, request: Any, template: str) -> PromptText:
        """The prompt that `render` makes of `request` (messages and variables), with cuts in its control tokens.

        `template` is the source of the template. Raises RequestError if there is no unused character for the mark.
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
        # The template searches the messages for a text that the marks have changed: mark only whole tokens.
        sparsely = render(_mapped(request, lambda text: self._marked_within(text, mark)))
        # If the control tokens differ from those of the fully marked text, the template joined parts of messages into
        # one.
        written = ([found[0] for found in self._search(self._pattern, text)] for text in (sparsely, everywhere))
        return self._cut(sparsely if next(written) == next(written) else everywhere, mark)

    def _normalized(self, normalize: Callable[[str], str], text: str) -> str:
        """`text`, or its normalised form if only that may contain control tokens."""
        found = normalize(text)
        if found == text or not self._is_suspect(found):
            return text
        # Normalising twice changes some texts, for example by another leading space.
        return found if normalize(found) == found or self._pattern.search(found) else text

    def _is_suspect(self, text: str) -> bool:
        return self._firsts.search(text) is not None or self._rest.match(text.lstrip()) is not None

    def _marked(self, text: str, mark: str) -> str:
        """`text` with a mark in each possible start of a control token, and where it begins with a possible rest.

        A name, such as a role or a key, is not changed.
        """
        if text.isidentifier() and not self._pattern.search(text):
            return text
        windows = (text[start : start + _WINDOW] for start in range(0, len(text), _WINDOW))
        marked = "".join(self._firsts.sub(lambda found: found[0] + mark, window) for window in windows)
        place = len(text) - len(text.lstrip())
        return marked[:place] + mark + marked[place:] if self._rest.match(text, place) else marked

    def _marked_within(self, text: str, mark: str) -> str:
        """`text` with a mark inside each whole control token."""
        pieces, start = [], 0
        for found in self._search(self._pattern, text):
            pieces += [text[start : found.start() + 1], mark]
            start = found.start() + 1
        return "".join([*pieces, text[start:]])

    def _search(self, pattern: re.Pattern[str], text: str) -> Iterator[re.Match[str]]:
        """As `pattern.finditer(text)`, one window of the text at a time."""
        end = 0
        for start in range(0, len(text), _WINDOW):
            stop = start + _WINDOW
            for found in pattern.finditer(text, max(start, end), stop + self._longest):
                if found.start() >= stop:
                    break
                end = found.end()
                yield found

    def _cut(self, marked: str, mark: str) -> PromptText:
        """The text without marks, with a cut at each mark that was inside a control token."""
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
    """A pattern that matches the longest of `texts`; common prefixes are shared, so that it fails fast."""
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
