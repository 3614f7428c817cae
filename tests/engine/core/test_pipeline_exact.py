"""Two steps deep on a real tiny model: exactly the results of one step deep, for all parameters."""

from __future__ import annotations

import json
import threading
import time

import pytest

from tests.free_blocks import until_all_free
from tests.scheduler_settings import scheduler_config
from tests.tokenizers import write_tiny_tokenizer
from tfserve.config import EngineConfig, SchedulerConfig
from tfserve.engine.core import build
from tfserve.engine.engine import Engine
from tfserve.model.grammars.grammar import json_schema_grammar
from tfserve.model.runner.runner import ModelRunner
from tfserve.types import FinishReason, RequestOutput, SamplingParams

NUM_TOKENS = 40
SHARED = {"schedule_interval_s": 0.02, "min_residency_s": 0.02}
IN_ORDER = SchedulerConfig(policy="fcfs-chunked")
LOAD = scheduler_config(policy="round-robin", **SHARED)
RECOMPUTE = scheduler_config(policy="round-robin", offload=False, **SHARED)


@pytest.fixture(scope="module")
def model_dir(tiny_llama3):
    return write_tiny_tokenizer(tiny_llama3)


def prompt(i: int) -> list[int]:
    return [3 + (i * 7 + k) % 500 for k in range(10 + 5 * i)]


def serve(
    model_dir, depth: int, params: list[SamplingParams], scheduler: SchedulerConfig, num_blocks: int
) -> tuple[list[RequestOutput], int]:
    """The output of each request, and the number of preemptions."""
    config = EngineConfig(
        model=str(model_dir),
        engine_process="off",
        threads=1,
        max_model_len=128,
        max_num_seqs=len(params),
        block_size=16,
        num_gpu_blocks_override=num_blocks,
        pipeline_depth=depth,
        debug_checks=True,
        scheduler=scheduler,
    )
    with Engine(config) as engine:
        outputs = engine.generate([prompt(i) for i in range(len(params))], params, rate=200.0)
        return outputs, engine.stats().num_preemptions


def wishes(free: list[RequestOutput]) -> list[SamplingParams]:
    """Every kind of parameter, greedy or seeded; stop strings are taken from the unbounded answers `free`."""
    stop_token = free[0].token_ids[NUM_TOKENS // 2]
    text = free[1].text
    stop = text[len(text) // 2 :][:4]
    numbers = json_schema_grammar({"type": "array", "items": {"type": "integer"}, "minItems": NUM_TOKENS})
    answer = json_schema_grammar({"enum": ["yes", "no"]})
    each = [
        {"stop_token_ids": (stop_token,)},
        {"stop": (stop,)},
        {"stop_token_ids": (free[2].token_ids[4],), "min_tokens": 12},
        {"repetition_penalty": 1.3, "frequency_penalty": 0.5, "presence_penalty": 0.2},
        {"logprobs": 3},
        {"logit_bias": {5: 4.0, 9: -100.0}, "ignore_eos": False},
        {"temperature": 1.0, "seed": 7, "top_k": 40, "top_p": 0.9, "min_p": 0.01},
        {"temperature": 0.8, "seed": 8, "presence_penalty": 1.0, "logprobs": 1},
        {"temperature": 1.3, "seed": 9, "repetition_penalty": 1.2, "stop_token_ids": tuple(range(3, 60))},
        {"max_tokens": 1},
        {"max_tokens": 2, "temperature": 1.0, "seed": 3},
        {"temperature": 1.0, "seed": 11, "stop": (" ", "e")},
        {"temperature": 1.0, "seed": 12, "grammar": numbers, "logprobs": 0, "ignore_eos": False},
        {"temperature": 1.0, "seed": 13, "grammar": answer, "ignore_eos": False},
        {"prompt_logprobs": 2},
        {"prompt_logprobs": 1, "max_tokens": 0},
    ]
    common = {"max_tokens": NUM_TOKENS, "temperature": 0.0, "ignore_eos": True}
    return [SamplingParams(**{**common, **wish}) for wish in each]


@pytest.fixture(scope="module")
def one_deep(model_dir):
    free = [SamplingParams(max_tokens=NUM_TOKENS, temperature=0.0, ignore_eos=True)] * 3
    params = wishes(serve(model_dir, 1, free, IN_ORDER, 97)[0])
    outputs, preemptions = serve(model_dir, 1, params, IN_ORDER, len(params) * 8 + 1)
    assert preemptions == 0
    assert [output.finish_reason for output in outputs[:3]] == [FinishReason.STOP] * 3
    numbers, answer, scored, prompt_alone = outputs[-4:]
    assert set(numbers.text) <= set("[]-0123456789, \n\r\t")
    assert (json.loads(answer.text) in ("yes", "no"), answer.finish_reason) == (True, FinishReason.STOP)
    assert [entry.token_id for entry in scored.prompt_logprobs] == prompt(len(params) - 2)[1:]
    assert (prompt_alone.token_ids, prompt_alone.finish_reason) == ([], FinishReason.LENGTH)
    assert [entry.token_id for entry in prompt_alone.prompt_logprobs] == prompt(len(params) - 1)[1:]
    return params, outputs


@pytest.mark.parametrize(
    ("scheduler", "num_blocks"),
    [(IN_ORDER, 129), (LOAD, 25), (RECOMPUTE, 25), (scheduler_config(policy="tokenflow", **SHARED), 25)],
    ids=["undisturbed", "load", "recompute", "tokenflow"],
)
def test_two_deep_every_wish_is_met_as_it_is_one_deep(model_dir, one_deep, scheduler, num_blocks):
    params, expected = one_deep
    outputs, preemptions = serve(model_dir, 2, params, scheduler, num_blocks)
    if scheduler in (LOAD, RECOMPUTE):
        assert preemptions > 0
    for one, two in zip(expected, outputs, strict=True):
        assert two.token_ids == one.token_ids
        assert (two.text, two.finish_reason, two.stop_reason) == (one.text, one.finish_reason, one.stop_reason)
        assert two.num_output_tokens == len(one.token_ids)
        for known, again in ((one.logprobs, two.logprobs), (one.prompt_logprobs, two.prompt_logprobs)):
            assert [entry.token_id for entry in again or ()] == [entry.token_id for entry in known or ()]
            chosen = [entry.logprob for entry in known or ()]
            assert [entry.logprob for entry in again or ()] == pytest.approx(chosen, abs=1e-4)


async def test_two_deep_an_abort_frees_everything_and_disturbs_no_other_request(model_dir, one_deep):
    params, expected = one_deep
    config = EngineConfig(model=str(model_dir), threads=1, max_model_len=128, pipeline_depth=2, debug_checks=True)
    with Engine(config) as engine:
        long = SamplingParams(max_tokens=100, temperature=0.0, ignore_eos=True)
        gone = [engine.submit([5, 6, i + 1], long) for i in range(4)]
        kept = engine.submit(prompt(3), params[3])
        for stream in gone:
            assert (await stream.next()).token_ids
            stream.abort()
        tokens = []
        while (output := await kept.next()) is None or not output.finished:
            tokens += output.token_ids if output else []
        assert tokens + output.token_ids == expected[3].token_ids
        for stream in gone:
            while not (output := await stream.next()).finished:
                pass
            assert output.finish_reason is FinishReason.ABORT
        await until_all_free(engine)


def test_two_deep_the_model_is_loaded_and_run_on_one_thread_which_ends_with_the_engine(model_dir, monkeypatch):
    threads: dict[str, set[int]] = {"load": set(), "launch": set()}
    load, launch = build.load_model, ModelRunner.launch

    def load_model(*args, **options):
        threads["load"].add(threading.get_ident())
        return load(*args, **options)

    def launch_step(runner, plan):
        threads["launch"].add(threading.get_ident())
        return launch(runner, plan)

    monkeypatch.setattr(build, "load_model", load_model)
    monkeypatch.setattr(ModelRunner, "launch", launch_step)
    before = threading.active_count()
    config = EngineConfig(model=str(model_dir), engine_process="off", threads=1, max_model_len=128, pipeline_depth=2)
    with Engine(config) as engine:
        engine.generate([[5, 6, 7]], SamplingParams(max_tokens=5))
        cores = [thread.ident for thread in threading.enumerate() if thread.name == "tfserve-core"]
        stats = engine.stats()
        assert stats.device_busy_s > 0.0
        assert 0.0 <= stats.device_idle_share < 1.0
    assert threads["load"] == threads["launch"]
    assert len(threads["load"]) == 1
    assert threads["load"].isdisjoint(cores)
    deadline = time.monotonic() + 10
    while threading.active_count() > before:
        assert time.monotonic() < deadline, "a thread outlived its engine"
        time.sleep(0.01)
