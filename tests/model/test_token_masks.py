"""Masks of allowed tokens: only what the grammar allows is ever chosen, also after a row is left and taken again."""

from __future__ import annotations

import json

import pytest
import torch

from tests.tokenizers import write_tiny_tokenizer
from tfserve.errors import RequestError
from tfserve.model import grammar as grammars
from tfserve.model.grammar import check_grammar, json_schema_grammar, lark_json
from tfserve.model.sampler import Sampler
from tfserve.model.token_masks import GrammarCompiler, TokenMasks, open_masks
from tfserve.model.tokenizer import Tokenizer
from tfserve.plan import Row, RowInit
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


def row_init(row: int, output: tuple[int, ...] = (), **params: object) -> RowInit:
    wanted = SamplingParams(**params)
    return RowInit(Row(row), f"r{row}", wanted, row, PROMPT + output, len(PROMPT), eos_token_ids=EOS)


class Writer:
    """Samples rows over random logits that depend on the row and the place alone."""

    def __init__(self, masks: TokenMasks | None) -> None:
        self.sampler = Sampler(VOCAB, 8, "cpu", masks)
        self.output: dict[int, list[int]] = {}

    def enter(self, init: RowInit) -> None:
        self.sampler.enter(init)
        self.output[int(init.row)] = list(init.token_ids[len(PROMPT) :])

    def step(self, *rows: int) -> None:
        places = [len(PROMPT) + len(self.output[row]) for row in rows]
        generators = [torch.Generator().manual_seed(1000 * r + p) for r, p in zip(rows, places, strict=True)]
        logits = torch.stack([torch.randn(VOCAB, generator=generator) * 3 for generator in generators])
        before = logits.clone()
        for row, token in zip(rows, self.sampler.sample(logits, rows, places).token_ids.tolist(), strict=True):
            self.output[row].append(token)
        assert torch.equal(logits, before)

    def finish(self, row: int) -> list[int]:
        while not self.output[row] or self.output[row][-1] not in EOS:
            self.step(row)
        return self.output[row][:-1]


@pytest.mark.parametrize("seed", range(6))
def test_random_logits_make_json_by_the_schema(masks: TokenMasks, tokenizer: Tokenizer, seed: int) -> None:
    writer = Writer(masks)
    writer.enter(row_init(seed, grammar=json_schema_grammar(SCHEMA), temperature=1.0))
    value = json.loads(tokenizer.decode(writer.finish(seed)))
    assert value["kind"] in ("sun", "rain")
    assert value["ok"] in (True, False)
    assert 0 <= value["n"] <= 99
    assert set(value) == {"kind", "ok", "n"}


@pytest.mark.parametrize("leave_after", [1, 4, 9])
def test_a_row_that_leaves_and_comes_back_goes_on_as_if_it_had_not(masks: TokenMasks, leave_after: int) -> None:
    grammar = json_schema_grammar(SCHEMA)
    whole, cut = Writer(masks), Writer(masks)
    whole.enter(row_init(1, grammar=grammar))
    expected = whole.finish(1)
    cut.enter(row_init(1, grammar=grammar))
    for _ in range(leave_after):
        cut.step(1)
    cut.sampler.release(Row(1))
    cut.enter(row_init(1, tuple(cut.output[1]), grammar=grammar))
    assert cut.finish(1) == expected


def test_rows_beside_it_are_as_they_would_be_without(masks: TokenMasks) -> None:
    together, alone = Writer(masks), Writer(None)
    together.enter(row_init(0, grammar=json_schema_grammar(SCHEMA), logit_bias={5: 100.0}))
    for writer in (together, alone):
        writer.enter(row_init(3, temperature=1.0))
        writer.enter(row_init(4, temperature=0, presence_penalty=1.0))
    for _ in range(5):
        together.step(3, 0, 4)
        alone.step(3, 4)
    assert [together.output[row] for row in (3, 4)] == [alone.output[row] for row in (3, 4)]


def test_after_the_end_only_the_end_is_allowed(masks: TokenMasks) -> None:
    writer = Writer(masks)
    writer.enter(row_init(0, grammar=json_schema_grammar({"const": 1})))
    writer.finish(0)
    for _ in range(3):
        writer.step(0)
    assert set(writer.output[0][-3:]) <= set(EOS)


def test_output_that_does_not_fit_may_only_end(masks: TokenMasks, caplog: pytest.LogCaptureFixture) -> None:
    writer = Writer(masks)
    writer.enter(row_init(0, (200, 201), grammar=json_schema_grammar(SCHEMA)))
    assert "left its grammar" in caplog.text
    writer.step(0)
    assert writer.output[0][-1] in EOS


def test_lark_with_a_schema_inside(masks: TokenMasks, tokenizer: Tokenizer) -> None:
    grammar = f'start: "<call>" one "</call>"\none: {lark_json(SCHEMA)}'
    check_grammar(grammar)
    writer = Writer(masks)
    writer.enter(row_init(0, grammar=grammar))
    text = tokenizer.decode(writer.finish(0))
    assert set(json.loads(text.removeprefix("<call>").removesuffix("</call>"))) == {"kind", "ok", "n"}


def test_bad_grammars_and_a_missing_extra_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RequestError, match=r"grammar: .* cannot be served"):
        check_grammar(json_schema_grammar({"type": "wobble"}))
    monkeypatch.setattr(grammars, "find_spec", lambda name: None)
    with pytest.raises(RequestError, match=r"grammar support.* pip install '?llguidance") as missing:
        json_schema_grammar({}, "response_format")
    assert missing.value.param == "response_format"


def test_a_tokenizer_it_cannot_read_is_no_reason_not_to_load(caplog: pytest.LogCaptureFixture) -> None:
    assert open_masks("{}", VOCAB, EOS) is None
    assert "cannot read" in caplog.text
