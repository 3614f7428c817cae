"""Masks of allowed tokens: only what the grammar allows is ever chosen, also after a row is left and taken again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.panics import PanicException
from tests.tokenizers import long_token_json, write_tiny_tokenizer
from tfserve.errors import RequestError
from tfserve.model.grammars import grammar as grammars
from tfserve.model.grammars.grammar import check_grammar, json_schema_grammar, lark_json
from tfserve.model.sampling.sampler import Sampler
from tfserve.model.sampling.token_masks import GrammarCompiler, TokenMasks, open_masks
from tfserve.model.text.tokenizer import Tokenizer
from tfserve.plan import SlotId, SlotInit
from tfserve.types import SamplingParams

VOCAB, EOS = 520, (0, 2)  # the tokenizer has 512
SCHEMA = {
    "type": "object",
    "properties": {"kind": {"enum": ["sun", "rain"]}, "ok": {"type": "boolean"}, "n": {"$ref": "#/$defs/small"}},
    "required": ["kind", "ok", "n"],
    "additionalProperties": False,
    "$defs": {"small": {"type": "integer", "minimum": 0, "maximum": 99}},
}
PROMPT = (5, 6, 7)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer.from_dir(write_tiny_tokenizer(tmp_path_factory.mktemp("tokenizer")))


@pytest.fixture
def masks(tokenizer: Tokenizer) -> TokenMasks:
    return TokenMasks(GrammarCompiler(tokenizer.to_json(), VOCAB, EOS))


def slot_init(row: int, output: tuple[int, ...] = (), **params: object) -> SlotInit:
    wanted = SamplingParams(**params)
    return SlotInit(SlotId(row), f"r{row}", wanted, row, PROMPT + output, len(PROMPT), eos_token_ids=EOS)


class Writer:
    """Samples rows over random logits that depend on the row and the place alone."""

    def __init__(self, masks: TokenMasks | None) -> None:
        self.sampler = Sampler(VOCAB, 8, "cpu", masks)
        self.output: dict[int, list[int]] = {}

    def enter(self, init: SlotInit) -> None:
        self.sampler.enter(init)
        self.output[int(init.slot)] = list(init.token_ids[len(PROMPT) :])

    def step(self, *rows: int) -> tuple[tuple[int, str], ...]:
        """Give each row a token; the places that have failed, and why."""
        places = [len(PROMPT) + len(self.output[row]) for row in rows]
        generators = [torch.Generator().manual_seed(1000 * r + p) for r, p in zip(rows, places, strict=True)]
        logits = torch.stack([torch.randn(VOCAB, generator=generator) * 3 for generator in generators])
        before = logits.clone()
        choices = self.sampler.sample(logits, rows, places).read()
        for row, token in zip(rows, choices.tokens, strict=True):
            self.output[row].append(token)
        assert torch.equal(logits, before)
        return choices.failed

    def finish(self, row: int) -> list[int]:
        while not self.output[row] or self.output[row][-1] not in EOS:
            self.step(row)
        return self.output[row][:-1]


@pytest.mark.parametrize("seed", range(6))
def test_random_logits_make_json_by_the_schema(masks: TokenMasks, tokenizer: Tokenizer, seed: int) -> None:
    writer = Writer(masks)
    writer.enter(slot_init(seed, grammar=json_schema_grammar(SCHEMA), temperature=1.0))
    value = json.loads(tokenizer.decode(writer.finish(seed)))
    assert value["kind"] in ("sun", "rain")
    assert value["ok"] in (True, False)
    assert 0 <= value["n"] <= 99
    assert set(value) == {"kind", "ok", "n"}


@pytest.mark.parametrize("leave_after", [1, 4, 9])
def test_a_row_that_leaves_and_comes_back_goes_on_as_if_it_had_not(masks: TokenMasks, leave_after: int) -> None:
    grammar = json_schema_grammar(SCHEMA)
    whole, cut = Writer(masks), Writer(masks)
    whole.enter(slot_init(1, grammar=grammar))
    expected = whole.finish(1)
    cut.enter(slot_init(1, grammar=grammar))
    for _ in range(leave_after):
        cut.step(1)
    cut.sampler.release(SlotId(1))
    cut.enter(slot_init(1, tuple(cut.output[1]), grammar=grammar))
    assert cut.finish(1) == expected


def test_rows_beside_it_are_as_they_would_be_without(masks: TokenMasks) -> None:
    together, alone = Writer(masks), Writer(None)
    together.enter(slot_init(0, grammar=json_schema_grammar(SCHEMA), logit_bias={5: 100.0}))
    for writer in (together, alone):
        writer.enter(slot_init(3, temperature=1.0))
        writer.enter(slot_init(4, temperature=0, presence_penalty=1.0))
    for _ in range(5):
        together.step(3, 0, 4)
        alone.step(3, 4)
    assert [together.output[row] for row in (3, 4)] == [alone.output[row] for row in (3, 4)]


def test_after_the_end_only_the_end_is_allowed(masks: TokenMasks) -> None:
    writer = Writer(masks)
    writer.enter(slot_init(0, grammar=json_schema_grammar({"const": 1})))
    writer.finish(0)
    for _ in range(3):
        writer.step(0)
    assert set(writer.output[0][-3:]) <= set(EOS)


def test_output_that_does_not_fit_is_an_error_and_no_end(masks: TokenMasks, caplog: pytest.LogCaptureFixture) -> None:
    writer = Writer(masks)
    writer.enter(slot_init(0, (200, 201), grammar=json_schema_grammar(SCHEMA)))
    writer.enter(slot_init(1, grammar=json_schema_grammar(SCHEMA)))
    writer.enter(slot_init(2))
    failed = writer.step(1, 0, 2)
    assert [place for place, _ in failed] == [1]
    assert "cannot go on by its grammar" in failed[0][1]
    assert "request r0" in caplog.text
    assert [place for place, _ in writer.step(0, 1)] == [0]


def test_a_grammar_that_can_no_longer_be_met_is_an_error_where_that_shows(masks: TokenMasks) -> None:
    writer = Writer(masks)
    writer.enter(slot_init(0, grammar='start: "a" stuck\nstuck: stuck "x"'))
    failed: tuple[tuple[int, str], ...] = ()
    while not failed and len(writer.output[0]) < 5:
        failed = writer.step(0)
    assert [place for place, _ in failed] == [0]
    assert not set(writer.output[0][:-1]) & set(EOS)


class BrokenMatcher:
    """A matcher that breaks in one of its methods; before, everything is allowed."""

    def __init__(self, breaks: str, error: BaseException) -> None:
        self.breaks, self.error = breaks, error

    def call(self, name: str) -> None:
        if name == self.breaks:
            raise self.error

    def consume_tokens(self, tokens: list[int]) -> None:
        self.call("consume_tokens")

    def consume_token(self, token: int) -> None:
        self.call("consume_token")

    def compute_bitmask(self) -> bytes:
        self.call("compute_bitmask")
        return b"\xff" * (VOCAB // 8)

    def is_error(self) -> bool:
        return False

    def is_stopped(self) -> bool:
        return False


class BreakingCompiler(GrammarCompiler):
    """Compiles the grammar "broken" to a BrokenMatcher, or breaks at it."""

    def __init__(self, tokenizer: Tokenizer, breaks: str, error: BaseException) -> None:
        super().__init__(tokenizer.to_json(), VOCAB, EOS)
        self.breaks, self.error = breaks, error
        self.forgotten: list[str] = []

    def matcher(self, grammar: str) -> Any:
        if grammar != "broken":
            return super().matcher(grammar)
        if self.breaks == "compile":
            raise self.error
        return BrokenMatcher(self.breaks, self.error)

    def forget(self, grammar: str) -> None:
        super().forget(grammar)
        self.forgotten.append(grammar)


@pytest.mark.parametrize("error", [PanicException("out of bounds"), ValueError("out of bounds")], ids=repr)
@pytest.mark.parametrize("breaks", ["compile", "consume_tokens", "compute_bitmask", "consume_token"])
def test_where_the_library_breaks_down_one_row_is_lost(tokenizer: Tokenizer, breaks: str, error: BaseException) -> None:
    compiler = BreakingCompiler(tokenizer, breaks, error)
    writer, alone = Writer(TokenMasks(compiler)), Writer(None)
    writer.enter(slot_init(0, grammar="broken"))
    writer.enter(slot_init(1, grammar=json_schema_grammar(SCHEMA)))
    for each in (writer, alone):
        each.enter(slot_init(2, temperature=1.0))
    failures = [writer.step(0, 1, 2) for _ in range(3)]
    first = 1 if breaks == "consume_token" else 0
    assert [len(failed) for failed in failures] == [0] * first + [1] * (3 - first)
    assert "out of bounds" in failures[first][0][1]
    assert compiler.forgotten == ["broken"]
    for _ in range(3):
        alone.step(2)
    assert writer.output[2] == alone.output[2]
    assert tokenizer.decode(writer.finish(1)).startswith("{")


def test_lark_with_a_schema_inside(masks: TokenMasks, tokenizer: Tokenizer) -> None:
    grammar = f'start: "<call>" one "</call>"\none: {lark_json(SCHEMA)}'
    check_grammar(grammar)
    writer = Writer(masks)
    writer.enter(slot_init(0, grammar=grammar))
    text = tokenizer.decode(writer.finish(0))
    assert set(json.loads(text.removeprefix("<call>").removesuffix("</call>"))) == {"kind", "ok", "n"}


def test_bad_grammars_and_a_missing_extra_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RequestError, match=r"grammar: .* cannot be served"):
        check_grammar(json_schema_grammar({"type": "wobble"}))
    monkeypatch.setattr(grammars, "find_spec", lambda name: None)
    with pytest.raises(RequestError, match=r"grammar support.* pip install '?llguidance") as missing:
        json_schema_grammar({}, "response_format")
    assert missing.value.param == "response_format"


def test_a_tokenizer_it_cannot_read_is_no_reason_not_to_load(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """No tokenizer at all, and one with a token so long that llguidance panics."""
    for unreadable in ("{}", long_token_json(write_tiny_tokenizer(tmp_path))):
        caplog.clear()
        assert open_masks(unreadable, VOCAB, EOS) is None
        assert "no grammars" in caplog.text


def test_without_an_end_of_sequence_token_there_are_no_grammars(
    tokenizer: Tokenizer, caplog: pytest.LogCaptureFixture
) -> None:
    assert open_masks(tokenizer.to_json(), VOCAB, ()) is None
    assert "end-of-sequence" in caplog.text
