"""Scripted models write exactly their script, through the engine and over HTTP, with all kinds of interruptions."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.scripted import scripted_engine, scripted_server, write_scripted_model
from tfserve.model.grammars.grammar import json_schema_grammar
from tfserve.types import FinishReason, SamplingParams

TEXT = "Naïve 你好 👨‍👩‍👧, said <the dog>\n\n  twice."
GREEDY = SamplingParams(temperature=0.0, max_tokens=200)


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_scripted_model(tmp_path_factory.mktemp("scripted"))


def test_text_comes_out_exactly_greedy_and_sampled(model_dir: Path) -> None:
    sampled = SamplingParams(temperature=1.5, seed=3, max_tokens=200)
    with scripted_engine(model_dir, TEXT) as engine:
        for output in engine.generate(["Why?", "A longer prompt"], [GREEDY, sampled]):
            assert (output.text, output.finish_reason) == (TEXT, FinishReason.STOP)


def test_each_prompt_has_its_script_and_ids_stay_ids(model_dir: Path) -> None:
    scripts = {"Rome": "sunny", "Oslo": ["rain", 1, 30, "!"]}
    with scripted_engine(model_dir, scripts) as engine:
        rome, oslo = engine.generate(["In Rome?", "In Oslo?"], GREEDY)
        (nowhere,) = engine.generate("Where?", GREEDY)
        rain, mark = (engine.tokenizer.encode(text) for text in ("rain", "!"))
    assert rome.text == "sunny"
    assert oslo.token_ids == [*rain, 1, 30, *mark, 2]
    assert (nowhere.finish_reason, "no script" in (nowhere.error or "")) == (FinishReason.ERROR, True)


def test_a_function_of_the_prompt_and_a_script_without_an_end(model_dir: Path) -> None:
    with scripted_engine(model_dir, lambda prompt: [prompt[0], 40], ends=False) as engine:
        (output,) = engine.generate([[50, 60]], SamplingParams(temperature=0.0, max_tokens=5))
    assert (output.token_ids, output.finish_reason) == ([50, 40, 50, 40, 50], FinishReason.LENGTH)


def test_masks_act_on_its_logits(model_dir: Path) -> None:
    params = SamplingParams(temperature=0.0, max_tokens=20, grammar=json_schema_grammar({"enum": ["yes", "no"]}))
    with scripted_engine(model_dir, 'I say "no".') as engine:
        (output,) = engine.generate(["Well?"], params)
    assert output.text in ('"yes"', '"no"')


@pytest.mark.parametrize("offload", [True, False], ids=["load", "recompute"])
@pytest.mark.parametrize("depth", [1, 2])
def test_preemption_does_not_disturb_a_script(model_dir: Path, offload: bool, depth: int) -> None:
    scheduler = {"policy": "round-robin", "ablation": {"offload": offload}, "schedule_interval_s": 0.02}
    settings = {"num_gpu_blocks_override": 25, "max_model_len": 320, "pipeline_depth": depth, "scheduler": scheduler}
    prompts = [f"{number}: {'why ' * number}" for number in range(8)]
    scripts = {prompt: f"{prompt}! {TEXT}" for prompt in prompts}
    with scripted_engine(model_dir, lambda ids: scripts[engine.tokenizer.decode(ids)], **settings) as engine:
        outputs = engine.generate(prompts, GREEDY, rate=200.0)
        assert engine.stats().num_preemptions > 0
    assert [output.text for output in outputs] == list(scripts.values())


async def test_text_comes_out_exactly_over_http(model_dir: Path) -> None:
    body = {"messages": [{"role": "user", "content": "Why?"}], "max_tokens": 300}
    async with scripted_server(model_dir, TEXT) as server, server.post("/v1/chat/completions", body) as response:
        (choice,) = (await response.json())["choices"]
    assert (choice["message"]["content"], choice["finish_reason"]) == (TEXT, "stop")
