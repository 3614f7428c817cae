"""A real tiny model whose requests are preempted and resumed: exactly the tokens of an undisturbed run.

At both depths of the pipeline, with all sampling parameters and stop conditions.
"""

from __future__ import annotations

import asyncio

import msgspec
import pytest

from tests.scheduler_settings import scheduler_config
from tests.tokenizers import write_tiny_tokenizer
from tfserve.config import EngineConfig, SchedulerConfig
from tfserve.engine.engine import Engine
from tfserve.errors import RequestError
from tfserve.model.grammars.grammar import json_schema_grammar
from tfserve.types import FinishReason, Place, PromptTokens, SamplingParams

NUM_REQUESTS, NUM_TOKENS = 12, 48
SHARED = {"schedule_interval_s": 0.02, "min_residency_s": 0.02}
WAYS = {
    "load": scheduler_config(policy="round-robin", **SHARED),
    "load, no write-through": scheduler_config(policy="round-robin", write_through=False, **SHARED),
    "load, no overlap": scheduler_config(policy="round-robin", load_evict_overlap=False, **SHARED),
    "recompute": scheduler_config(policy="round-robin", offload=False, **SHARED),
    "tokenflow": scheduler_config(policy="tokenflow", low_buffer_s=0.02, min_swap_gain_s=0.02, **SHARED),
}


@pytest.fixture(scope="module")
def model_dir(tiny_llama3):
    return write_tiny_tokenizer(tiny_llama3)


def requests() -> tuple[list[list[int]], list[SamplingParams]]:
    """Every second one sampled, with a seed of its own; every third bound to a grammar, every fourth scored.

    Every fourth, and no scored one, is in its thoughts.
    """
    prompts = [[3 + (i * 7 + k) % 500 for k in range(10 + 5 * i)] for i in range(NUM_REQUESTS)]
    greedy = SamplingParams(temperature=0, max_tokens=NUM_TOKENS, ignore_eos=True)
    params = [
        SamplingParams(temperature=1.0, seed=i, max_tokens=NUM_TOKENS, ignore_eos=True) if i % 2 else greedy
        for i in range(NUM_REQUESTS)
    ]
    numbers = json_schema_grammar({"type": "array", "items": {"type": "integer"}, "minItems": NUM_TOKENS})
    for i in range(NUM_REQUESTS):
        scored, grammar = (0 if i % 4 == 0 else None), (numbers if i % 3 == 2 else None)
        params[i] = msgspec.structs.replace(
            params[i], prompt_logprobs=scored, grammar=grammar, ignore_eos=grammar is None
        )
    return [PromptTokens(p, Place.THOUGHTS) if i % 4 == 1 else p for i, p in enumerate(prompts)], params


def run(model_dir, scheduler: SchedulerConfig, num_blocks: int, host_kv_gib: float | None = None, **settings):
    config = EngineConfig(
        model=str(model_dir),
        engine_process="off",
        threads=1,
        max_model_len=128,
        max_num_seqs=NUM_REQUESTS,
        block_size=16,
        num_gpu_blocks_override=num_blocks,
        host_kv_gib=host_kv_gib,
        debug_checks=True,
        scheduler=scheduler,
        **settings,
    )
    prompts, params = requests()
    with Engine(config) as engine:
        outputs = engine.generate(prompts, params, rate=200.0)
        for prompt, output in zip(prompts[::4], outputs[::4], strict=True):
            assert [entry.token_id for entry in output.prompt_logprobs] == prompt[1:]
        for output in outputs[2::3]:
            assert set(output.text) <= set("[]-0123456789, \n\r\t")
        assert [output.num_thought_tokens > 0 for output in outputs] == [i % 4 == 1 for i in range(NUM_REQUESTS)]
        return [output.token_ids for output in outputs], engine.stats()


@pytest.fixture(scope="module")
def undisturbed(model_dir):
    tokens, stats = run(model_dir, SchedulerConfig(policy="fcfs-chunked"), 12 * 8 + 1)
    assert stats.num_preemptions == 0
    return tokens


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("way", WAYS)
def test_preempted_requests_get_the_tokens_of_an_undisturbed_run(model_dir, undisturbed, way, depth):
    tokens, stats = run(model_dir, WAYS[way], 25, pipeline_depth=depth)
    assert stats.num_preemptions > 0
    if way == "recompute":
        assert stats.bytes_loaded == 0
    elif way != "tokenflow" and "no write-through" not in way:
        # Those take the cheaper way, and which one that is depends on how fast the machine is at the moment.
        assert stats.bytes_loaded > 0
    assert tokens == undisturbed


def test_a_slow_link_changes_times_but_no_token(model_dir, undisturbed):
    tokens, stats = run(model_dir, WAYS["load"], 25, emulated_bandwidth=0.05)
    assert stats.bytes_stored > 0
    assert tokens == undisturbed


def test_a_host_tier_too_small_for_all_changes_no_token(model_dir, undisturbed):
    tokens, stats = run(model_dir, WAYS["load"], 25, host_kv_gib=8 * 16 * 768 / 2**30)
    assert stats.num_host_blocks == 8
    assert tokens == undisturbed


async def test_rates_reach_the_policy_and_bad_ones_are_named(model_dir):
    scheduler = SchedulerConfig(policy="tokenflow", generate_ahead_s=0.2)
    config = EngineConfig(model=str(model_dir), threads=1, max_model_len=128, scheduler=scheduler)
    params = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True)
    engine = await asyncio.to_thread(Engine, config)
    with engine:
        seconds = {}
        for rate in (20.0, None):
            outputs = [output async for output in engine.stream([5, 6, 7], params, rate=rate)]
            assert outputs[-1].finish_reason is FinishReason.LENGTH
            seconds[rate] = outputs[-1].times.finished_s - outputs[-1].times.first_token_s
        assert seconds[20.0] > 0.6
        assert seconds[None] < 0.6
        for bad in (0, -1.0, "slowly", True):
            with pytest.raises(RequestError, match="consumption_rate"):
                engine.submit([5], params, rate=bad)
