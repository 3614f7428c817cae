"""Every token that a file of the checkpoint calls an end ends an answer; `min_tokens` puts off each of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.scripted import scripted_engine, write_scripted_model
from tfserve.errors import ModelError
from tfserve.types import FinishReason, SamplingParams

ENDTEXT, START, IM_END = 0, 1, 2
"""Ids of the tiny tokenizer's special tokens."""

GREEDY = SamplingParams(temperature=0.0, max_tokens=20)


def write(path: Path, **fields: Any) -> None:
    kept = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(kept | fields))


@pytest.fixture
def model_dir(tmp_path: Path) -> Path:
    """A scripted model whose files name no end."""
    model_dir = write_scripted_model(tmp_path / "model", eos_token_id=None)
    write(model_dir / "tokenizer_config.json", eos_token=None)
    return model_dir


SOURCES: list[tuple[str, Any, int]] = [
    ("config.json", {"eos_token_id": ENDTEXT}, ENDTEXT),
    ("config.json", {"eos_token_id": [START, ENDTEXT]}, ENDTEXT),
    ("generation_config.json", {"eos_token_id": START}, START),
    ("generation_config.json", {"eos_token_id": [IM_END, START]}, START),
    ("tokenizer_config.json", {"eos_token": "<|im_end|>"}, IM_END),
    ("tokenizer_config.json", {"eos_token": {"content": "<|im_end|>", "__type": "AddedToken"}}, IM_END),
    ("special_tokens_map.json", {"eos_token": {"content": "<|im_end|>"}}, IM_END),
]


@pytest.mark.parametrize(("file", "fields", "end"), SOURCES)
def test_an_end_that_one_file_names_ends_the_answer(
    file: str, fields: dict[str, Any], end: int, model_dir: Path
) -> None:
    write(model_dir / file, **fields)
    with scripted_engine(model_dir, ["the sky", end, "never"], ends=False) as engine:
        (output,) = engine.generate("Why?", GREEDY)
    assert (output.text, output.finish_reason, output.stop_reason) == ("the sky", FinishReason.STOP, None)


@pytest.mark.parametrize("end", [ENDTEXT, START, IM_END])
def test_all_ends_count_where_each_file_names_another(end: int, model_dir: Path) -> None:
    write(model_dir / "config.json", eos_token_id=ENDTEXT)
    write(model_dir / "generation_config.json", eos_token_id=START)
    write(model_dir / "tokenizer_config.json", eos_token="<|im_end|>")
    late = SamplingParams(temperature=0.0, max_tokens=20, min_tokens=5)
    deaf = SamplingParams(temperature=0.0, max_tokens=6, ignore_eos=True)
    with scripted_engine(model_dir, [40, 41, end, 42], ends=False) as engine:
        now, put_off, ignored = engine.generate(["Why?"] * 3, [GREEDY, late, deaf])
    assert (now.token_ids, now.finish_reason) == ([40, 41, end], FinishReason.STOP)
    assert put_off.finish_reason is FinishReason.STOP
    assert not {ENDTEXT, START, IM_END} & set(put_off.token_ids[:5])
    assert len(put_off.token_ids) == 7  # the first turn of the script's end that is not forbidden
    assert (ignored.token_ids, ignored.finish_reason) == ([40, 41, end, 42, 40, 41], FinishReason.LENGTH)


def test_an_end_beyond_the_vocabulary_never_reaches_a_step(model_dir: Path) -> None:
    write(model_dir / "config.json", eos_token_id=99999)
    with pytest.raises(ModelError, match=r"config\.json: eos_token_id .* got 99999"), scripted_engine(model_dir, "x"):
        pass
    write(model_dir / "config.json", eos_token_id=None, vocab_size=437)
    write(model_dir / "added_tokens.json", **{"<end>": 437})
    write(model_dir / "tokenizer_config.json", eos_token="<end>")
    with pytest.raises(ModelError, match=r"tokenizer_config\.json: eos_token '<end>'"), scripted_engine(model_dir, "x"):
        pass


def test_min_tokens_with_most_of_the_vocabulary_forbidden_fails_no_neighbour(model_dir: Path) -> None:
    """A request may forbid or favour every id that the logits have."""
    write(model_dir / "config.json", eos_token_id=list(range(400)))
    odd = SamplingParams(
        temperature=0.0,
        max_tokens=4,
        min_tokens=4,
        stop_token_ids=tuple(range(400, 512)),
        logit_bias={0: 100.0, 511: -100.0},
        logprobs=20,
    )
    with scripted_engine(model_dir, [450], ends=False) as engine:
        alone, beside = engine.generate(["Why?"] * 2, [odd, GREEDY])
    assert (alone.finish_reason, beside.finish_reason) == (FinishReason.ERROR, FinishReason.LENGTH)
    assert beside.token_ids == [450] * 20
