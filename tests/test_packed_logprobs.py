"""Waiting log probabilities take little memory and come out unchanged."""

from __future__ import annotations

import random
import tracemalloc

import pytest

from tests.scripted import scripted_engine, write_scripted_model
from tfserve.engine.frontend.stream import OutputBuffer
from tfserve.messages import TokenOutput
from tfserve.model.text.detokenizer import Detokenizer
from tfserve.model.text.tokenizer import Tokenizer
from tfserve.packed_logprobs import PackedLogprobs
from tfserve.types import MAX_LOGPROBS, SamplingParams, TokenLogprob


def entries(num_tokens: int, seed: int = 0) -> list[TokenLogprob]:
    draw = random.Random(seed)

    def scored() -> tuple[int, float]:
        return draw.randrange(2**18), draw.choice([-draw.expovariate(1), -0.0, float("-inf"), -1e-300, 0.1 + 0.2])

    counts = [draw.randrange(MAX_LOGPROBS + 1) for _ in range(num_tokens)]
    return [TokenLogprob(*scored(), tuple(scored() for _ in range(count))) for count in counts]


@pytest.mark.parametrize("most", [1, 3, 7, 100])
def test_what_is_taken_equals_what_was_given_to_the_last_digit(most: int) -> None:
    given, packed = entries(100), PackedLogprobs()
    packed.extend(given[:60])
    taken = packed.take(most)
    packed.extend(given[60:])
    assert list(packed) == given[len(taken) :]
    while len(packed):
        taken += packed.take(most)
    assert repr(taken) == repr(given)  # which tells -0.0 from 0.0
    assert packed.take(most) == []


def test_a_reader_that_does_not_read_costs_a_tenth_of_the_objects(tmp_path) -> None:
    tokenizer = Tokenizer.from_dir(write_scripted_model(tmp_path))
    params = SamplingParams(logprobs=MAX_LOGPROBS)
    buffer = OutputBuffer("r", 1, Detokenizer.for_params(tokenizer, params))
    tracemalloc.start()
    for number in range(6000):
        top = tuple((1000 + number + rank, -1.0 - rank - number / 7) for rank in range(MAX_LOGPROBS))
        buffer.add(TokenOutput("r", [5], [TokenLogprob(5, -number / 3, top)]), 0.0)
    held, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert held / 6000 < 400  # bytes a token
    (output,) = [buffer.take()]
    assert output is not None
    assert output.logprobs is not None
    assert [entry.logprob for entry in output.logprobs] == [-number / 3 for number in range(6000)]
    assert output.logprobs[-1].top == top


async def test_a_stream_read_late_tells_the_same_as_one_read_at_once(tmp_path) -> None:
    params = SamplingParams(temperature=0, max_tokens=40, logprobs=5, prompt_logprobs=3)
    with scripted_engine(write_scripted_model(tmp_path), "a text of some length, " * 3) as engine:
        at_once = [output async for output in engine.stream("Well, well?", params)]
        (late,) = engine.generate(["Well, well?"], [params])
    assert late.logprobs == [entry for output in at_once for entry in output.logprobs or ()]
    assert late.prompt_logprobs == at_once[0].prompt_logprobs
    assert len(late.logprobs) == len(late.token_ids)
