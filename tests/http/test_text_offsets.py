"""Each token's place in the text: where the character begins that its first byte belongs to."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import example, given
from hypothesis import strategies as st

from tests.http.fakes import BOS, FakeTokenizer
from tfserve.http.text_offsets import TextOffsets


class Pieces(FakeTokenizer):
    """Tokens of several bytes: id 1000 + n is the n-th of `pieces`."""

    def __init__(self, pieces: list[bytes], leading_spaces: int = 0) -> None:
        self.pieces = pieces
        self.leading_spaces = leading_spaces

    def token_bytes(self, token_id: int) -> bytes:
        return self.pieces[token_id - 1000] if token_id >= 1000 else super().token_bytes(token_id)


def places(pieces: list[bytes], leading_spaces: int = 0, start: int = 0) -> list[int]:
    offsets = TextOffsets(Pieces(pieces, leading_spaces), lambda token, place: False, start)
    return [offsets.next(1000 + number) for number in range(len(pieces))]


@given(st.text("aé你🙂", max_size=12), st.lists(st.integers(0, 48), max_size=12))
def test_a_token_is_where_its_first_byte_is(text: str, cuts: list[int]) -> None:
    raw = text.encode()
    bounds = sorted({0, len(raw), *(cut for cut in cuts if cut < len(raw))})
    pieces = [raw[begin:end] for begin, end in pairwise(bounds)]
    owner = [place for place, character in enumerate(text) for _ in character.encode()]
    assert places(pieces) == [owner[begin] for begin in bounds[:-1]]


@given(st.lists(st.binary(max_size=3), max_size=10))
@example([b"\xf0\x9f", b"a", b"\x99", b"\xf0", b"\xf0", b"\xc3", b"\xa9"])
def test_bytes_that_are_no_text_count_as_they_are_shown(pieces: list[bytes]) -> None:
    """A token is at the number of characters before it, or in the last of them if its bytes go on with that one."""
    text = b"".join(pieces).decode(errors="replace")
    for number, place in enumerate(places(pieces)):
        if pieces[number]:
            before = b"".join(pieces[:number])
            shown = before.decode(errors="replace")
            joined = (before + pieces[number][:1]).decode(errors="replace")
            goes_on = len(joined) == len(shown) and before[-1:] != b""
            assert place == len(shown) - goes_on
            assert place < len(text)


def test_special_tokens_leading_spaces_and_starts() -> None:
    tokenizer = Pieces([b"  a", b" b"], leading_spaces=1)
    hidden = TextOffsets(tokenizer, lambda token, place: False, 5)
    assert [hidden.next(token) for token in (BOS, 1000, BOS, 1001, 97)] == [5, 5, 7, 7, 9]
    shown = TextOffsets(FakeTokenizer(), "a<s>b".startswith)
    assert [shown.next(token) for token in (BOS, 97, BOS, 98)] == [0, 0, 1, 4]
