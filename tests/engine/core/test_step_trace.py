"""The step trace of a live engine: complete, readable, and honest about damage."""

from __future__ import annotations

import pytest

from tests.tokenizers import write_tiny_tokenizer
from tfserve.config import EngineConfig
from tfserve.engine.core.step_trace import read_trace
from tfserve.engine.engine import Engine
from tfserve.errors import TfserveError
from tfserve.types import SamplingParams


@pytest.fixture(scope="module")
def trace_file(tiny_llama3, tmp_path_factory):
    write_tiny_tokenizer(tiny_llama3)
    path = tmp_path_factory.mktemp("trace") / "steps.jsonl"
    config = EngineConfig(
        model=str(tiny_llama3), max_model_len=256, threads=1, engine_process="off", step_trace=str(path)
    )
    params = SamplingParams(temperature=0, max_tokens=9, ignore_eos=True)
    with Engine(config) as engine:
        engine.generate([[5, 6, 7], [9] * 40, [3] * 20], params)
    return path


def test_it_has_every_step_and_every_request(trace_file):
    trace = read_trace(trace_file)
    assert trace.head.device == "cpu"
    assert [step.step for step in trace.steps] == list(range(len(trace.steps)))
    assert sum(step.n_prefill for step in trace.steps) == 3 + 40 + 20
    assert sum(step.n_decode for step in trace.steps) == 3 * 8
    assert sorted((r.prompt_tokens, r.output_tokens) for r in trace.requests) == [(3, 9), (20, 9), (40, 9)]
    assert all(r.arrival_s < r.first_token_s < r.finished_s for r in trace.requests)
    ends = [step.end_s for step in trace.steps]
    assert ends == sorted(ends)
    assert all(step.seconds > 0 for step in trace.steps)


def test_a_line_cut_short_at_the_end_is_dropped_but_damage_within_is_named(trace_file, tmp_path):
    lines = trace_file.read_bytes().splitlines(keepends=True)
    cut = tmp_path / "cut.jsonl"
    cut.write_bytes(b"".join(lines)[:-20])
    assert len(read_trace(cut).requests) == 2
    bad = tmp_path / "bad.jsonl"
    bad.write_bytes(b"".join([lines[0], b"{}\n", *lines[1:]]))
    with pytest.raises(TfserveError, match=r"bad\.jsonl:2"):
        read_trace(bad)
    for damaged, message in (
        (lines[0].replace(b'"block_size":', b'"block_size":-'), r"bad\.jsonl:1.*block_size must be .*>= 1, got -"),
        (b'{"type": "\xff"}\n', r"bad\.jsonl:1.*not valid UTF-8"),
    ):
        bad.write_bytes(b"".join([damaged, *lines[1:]]))
        with pytest.raises(TfserveError, match=message):
            read_trace(bad)


def test_a_trace_that_cannot_be_written_is_a_clear_error(tiny_llama3, tmp_path):
    write_tiny_tokenizer(tiny_llama3)
    config = EngineConfig(model=str(tiny_llama3), max_model_len=256, threads=1, step_trace=str(tmp_path / "no" / "way"))
    with pytest.raises(TfserveError, match="step_trace"), Engine(config):
        pass
