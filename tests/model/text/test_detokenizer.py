from __future__ import annotations

import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models

from tests.tokenizers import write_tiny_tokenizer
from tfserve.model.text.detokenizer import Detokenizer
from tfserve.model.text.tokenizer import Tokenizer
from tfserve.types import SamplingParams

SENTENCEPIECE = ["<unk>", "▁", "▁▁", "▁the", "▁sky", "s", "é", "你", "�", *(f"<0x{byte:02X}>" for byte in range(256))]

ids = st.lists(st.integers(0, 520), max_size=40)  # 437 to 520 have no token, as in a padded vocabulary
stops = st.lists(st.text("the sky\n1�🙂你", min_size=1, max_size=4), max_size=3).map(tuple)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer.from_dir(write_tiny_tokenizer(tmp_path_factory.mktemp("tokenizer")))


def sentencepiece(decoder: decoders.Decoder) -> Tokenizer:
    backend = Backend(models.BPE({token: place for place, token in enumerate(SENTENCEPIECE)}, []))
    backend.decoder = decoder
    return Tokenizer(backend, {}, None)


def llama2_decoder() -> decoders.Decoder:
    return decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )


def stream(detokenizer: Detokenizer, token_ids: list[int], group: int = 1) -> list[str]:
    pieces = [detokenizer.push(token_ids[start : start + group]) for start in range(0, len(token_ids), group)]
    return [*pieces, detokenizer.finish()]


@given(ids, st.booleans())
@settings(max_examples=300)
def test_pieces_make_the_text_of_the_whole(tokenizer: Tokenizer, token_ids: list[int], skip: bool) -> None:
    pieces = stream(Detokenizer(tokenizer, skip_special_tokens=skip), token_ids)
    assert "".join(pieces) == tokenizer.decode(token_ids, skip)


@given(st.lists(st.integers(0, 8), max_size=20), st.booleans())
def test_sentencepiece_pieces_make_the_text_of_the_whole(token_ids: list[int], metaspace: bool) -> None:
    tokenizer = sentencepiece(decoders.Metaspace() if metaspace else llama2_decoder())
    assert "".join(stream(Detokenizer(tokenizer), token_ids)) == tokenizer.decode(token_ids)


@given(st.text(max_size=10), st.sampled_from(["▁the", "s", "你"]))
def test_sentencepiece_byte_tokens_make_the_characters_they_spell(text: str, neighbour: str) -> None:
    tokenizer = sentencepiece(llama2_decoder())
    bytes_ids = [SENTENCEPIECE.index(f"<0x{byte:02X}>") for byte in text.encode()]
    token_ids = [*bytes_ids, SENTENCEPIECE.index(neighbour), *bytes_ids]
    assert "".join(stream(Detokenizer(tokenizer), token_ids)) == tokenizer.decode(token_ids)


@given(ids, stops)
@settings(max_examples=300)
def test_text_is_cut_before_the_first_stop_string(
    tokenizer: Tokenizer, token_ids: list[int], stop: tuple[str, ...]
) -> None:
    detokenizer, including = (Detokenizer(tokenizer, stop=stop, include_stop=include) for include in (False, True))
    text = "".join(stream(detokenizer, token_ids))
    assert "".join(stream(including, token_ids)) == text + (detokenizer.stopped or "")
    assert (including.stopped, including.tokens_used) == (detokenizer.stopped, detokenizer.tokens_used)
    # Said another way: let the text grow token by token, and cut it as soon as a stop string is in it.
    grown, plain = "", Detokenizer(tokenizer)
    for used, token in enumerate(token_ids, start=1):
        grown += plain.push([token])
        found = [(grown.find(each), each) for each in stop if each in grown]
        if found:
            assert detokenizer.tokens_used == used
            assert (len(text), detokenizer.stopped) in found
            assert text == grown[: min(found)[0]]
            return
    assert detokenizer.stopped is None
    assert detokenizer.tokens_used == len(token_ids)
    assert text == tokenizer.decode(token_ids)


@given(ids, stops, st.integers(2, 50), st.integers(0, 8))
@settings(max_examples=300)
def test_grouping_of_pushes_changes_nothing(
    tokenizer: Tokenizer, token_ids: list[int], stop: tuple[str, ...], group: int, min_tokens: int
) -> None:
    params = SamplingParams(stop=stop, min_tokens=min_tokens)
    single, grouped = (Detokenizer.for_params(tokenizer, params) for _ in range(2))
    assert "".join(stream(single, token_ids)) == "".join(stream(grouped, token_ids, group))
    assert (single.stopped, single.tokens_used) == (grouped.stopped, grouped.tokens_used)


def test_a_character_is_shown_when_its_last_byte_has_come(tokenizer: Tokenizer) -> None:
    token_ids = tokenizer.encode("𝄞ok")
    assert len(token_ids) > 4
    pieces = stream(Detokenizer(tokenizer), token_ids)
    assert pieces[:4] == ["", "", "", "𝄞"]


def test_an_unfinished_character_ends_as_replacement(tokenizer: Tokenizer) -> None:
    assert stream(Detokenizer(tokenizer), tokenizer.encode("𝄞")[:2]) == ["", "", "�"]


def test_sentencepiece_newline_stops_at_its_own_token() -> None:
    detokenizer = Detokenizer(sentencepiece(llama2_decoder()), stop=("\n",))
    assert detokenizer.push([SENTENCEPIECE.index("▁the"), SENTENCEPIECE.index("<0x0A>")]) == "the"
    assert (detokenizer.stopped, detokenizer.tokens_used) == ("\n", 2)


def test_possible_start_of_a_stop_string_waits_and_comes_out_when_it_is_none(tokenizer: Tokenizer) -> None:
    detokenizer = Detokenizer(tokenizer, stop=("1234",))
    digits = tokenizer.encode("5121239")
    assert [detokenizer.push([token]) for token in digits] == ["5", "", "", "12", "", "", "1239"]
    assert detokenizer.push(tokenizer.encode("12")) == ""
    assert detokenizer.finish() == "12"


def test_nothing_follows_a_stop_string_that_spans_tokens(tokenizer: Tokenizer) -> None:
    detokenizer = Detokenizer(tokenizer, stop=("23", "9"))
    assert detokenizer.push(tokenizer.encode("123459")) == "1"
    assert (detokenizer.stopped, detokenizer.tokens_used) == ("23", 3)
    assert detokenizer.push(tokenizer.encode("more")) == ""
    assert detokenizer.finish() == ""
    assert detokenizer.tokens_used == 3


def test_stop_string_within_min_tokens_is_text(tokenizer: Tokenizer) -> None:
    detokenizer = Detokenizer(tokenizer, stop=("12",), min_tokens=3)
    assert detokenizer.push(tokenizer.encode("12012")) == "120"
    assert (detokenizer.stopped, detokenizer.tokens_used) == ("12", 5)


def test_stop_string_that_ends_after_min_tokens_counts(tokenizer: Tokenizer) -> None:
    detokenizer = Detokenizer(tokenizer, stop=("12",), min_tokens=1)
    assert detokenizer.push(tokenizer.encode("123")) == ""
    assert (detokenizer.stopped, detokenizer.tokens_used) == ("12", 2)


def test_cost_per_token_does_not_grow_with_the_output(tokenizer: Tokenizer) -> None:
    detokenizer = Detokenizer(tokenizer, stop=("never to be found",))
    token_ids = tokenizer.encode("Why is the sky blue? 🙂 ") * 100

    def best_of(rounds: int) -> float:
        times = []
        for _ in range(rounds):
            started = time.perf_counter()
            for token in token_ids:
                detokenizer.push([token])
            times.append(time.perf_counter() - started)
        return min(times)

    early = best_of(3)
    for _ in range(20):
        detokenizer.push(token_ids)
    assert best_of(3) < 5 * early


@pytest.mark.parametrize("group", [1, 3, 100])
def test_a_stop_string_may_be_a_special_token(tokenizer: Tokenizer, group: int) -> None:
    token_ids = [*tokenizer.encode("the sky"), 2, *tokenizer.encode(" is 你")[:-1], 1, *tokenizer.encode("blue")]
    for include in (False, True):
        detokenizer = Detokenizer(tokenizer, stop=("skyline", "<|im_start|>"), include_stop=include)
        text = tokenizer.decode(token_ids[: token_ids.index(1)]) + ("<|im_start|>" if include else "")
        assert "".join(stream(detokenizer, token_ids, group)) == text
        assert (detokenizer.stopped, detokenizer.tokens_used) == ("<|im_start|>", token_ids.index(1) + 1)


def test_a_special_token_is_no_stop_among_the_first_min_tokens_nor_one_of_another_name(tokenizer: Tokenizer) -> None:
    detokenizer = Detokenizer(tokenizer, stop=("<|im_start|>",), min_tokens=2)
    assert "".join(stream(detokenizer, [1, 1, 50, 2, 60, 1, 70])) == tokenizer.decode([50, 60])
    assert detokenizer.tokens_used == 6


def test_a_special_token_that_is_text_stops_as_text(tokenizer: Tokenizer) -> None:
    detokenizer = Detokenizer(tokenizer, stop=("<|im_start|>",), skip_special_tokens=False)
    assert "".join(stream(detokenizer, [50, 2, 1, 60])) == tokenizer.decode([50, 2], skip_special_tokens=False)
    assert detokenizer.stopped == "<|im_start|>"
