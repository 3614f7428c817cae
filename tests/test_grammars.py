"""Grammars through the whole engine: an unsatisfiable one is refused or ends with an error, never as a good answer."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from llguidance import LLMatcher
from llguidance._lib import LLParserLimits

from tests.free_blocks import until_all_free
from tests.scripted import scripted_engine, scripted_server, write_scripted_model
from tests.tokenizers import long_token_json
from tfserve.engine.engine import Engine
from tfserve.errors import RequestError
from tfserve.model.grammars.grammar import json_schema_grammar
from tfserve.model.sampling import token_masks
from tfserve.model.sampling.token_masks import GrammarCompiler
from tfserve.types import FinishReason, SamplingParams

CHAT = "/v1/chat/completions"
ASK = [{"role": "user", "content": "Well?"}]
TOOLS_TEMPLATE = """\
{%- for tool in tools or [] %}<tool_call>{{ tool | tojson }}{% endfor %}
{%- for message in messages %}{{ message['role'] + ': ' + message['content'] }}{% endfor %}"""

STUCK = 'start: "yes" stuck\nstuck: stuck "no"'
"""Begins, and can then neither go on nor end."""

ROW = {"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": 9}, "minItems": 20, "maxItems": 20}
N = {"$ref": "#/$defs/n"}
ENDLESS = {
    "itself": {**N, "$defs": {"n": N}},
    "a level more": {**N, "$defs": {"n": {"type": "object", "properties": {"n": N}, "required": ["n"]}}},
}


def greedy(max_tokens: int = 200, **params: Any) -> SamplingParams:
    return SamplingParams(temperature=0.0, max_tokens=max_tokens, **params)


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_scripted_model(tmp_path_factory.mktemp("scripted"), TOOLS_TEMPLATE)


@pytest.fixture(scope="module", params=[1, 2], ids=["depth1", "depth2"])
def engine(request: pytest.FixtureRequest, model_dir: Path) -> Iterator[Engine]:
    script = "yes" + json.dumps(list(range(10)) * 2)
    with scripted_engine(model_dir, script, ends=False, pipeline_depth=request.param) as engine:
        yield engine


def test_an_answer_that_can_no_longer_be_met_is_an_error(engine: Engine) -> None:
    good = greedy(grammar=json_schema_grammar({"enum": ["yes", "no"]}))
    before, stuck, after = engine.generate(["Well?"] * 3, [good, greedy(grammar=STUCK), good])
    assert stuck.finish_reason is FinishReason.ERROR
    assert "grammar or JSON schema" in (stuck.error or "")
    assert stuck.text == "yes"
    for output in (before, after):
        assert (output.text in ('"yes"', '"no"'), output.finish_reason) == (True, FinishReason.STOP)
    assert engine.stats().num_running == 0


@pytest.mark.parametrize("params", [{}, {"temperature": 1.0, "seed": 1}, {"logprobs": 2}, {"stop": ("zzz",)}], ids=repr)
def test_it_is_an_error_however_its_tokens_are_chosen(engine: Engine, params: dict[str, Any]) -> None:
    (output,) = engine.generate("Well?", SamplingParams(**{"temperature": 0.0, "grammar": STUCK, **params}))
    assert (output.text, output.finish_reason) == ("yes", FinishReason.ERROR)


def test_a_limit_of_the_library_is_an_error(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    limits = LLParserLimits(step_max_items=5)

    def matcher(compiler: GrammarCompiler, grammar: str) -> LLMatcher:
        return LLMatcher(compiler._tokenizer, grammar, log_level=0, limits=limits)

    monkeypatch.setattr(GrammarCompiler, "matcher", matcher)
    (output,) = engine.generate("Well?", greedy(grammar=json_schema_grammar({"type": "object"})))
    assert output.finish_reason is FinishReason.ERROR
    assert "limit 5" in (output.error or "")


def test_a_grammar_that_reached_a_limit_is_good_for_the_next_request(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    grammar = json_schema_grammar({"type": "array", "items": {"type": "integer"}, "minItems": 20, "maxItems": 20})
    with monkeypatch.context() as patched:
        patched.setattr(token_masks, "parser_limits", lambda: LLParserLimits(step_lexer_fuel=1, max_lexer_states=40))
        (broken,) = engine.generate("Well?", greedy(grammar=grammar))
    assert broken.finish_reason is FinishReason.ERROR
    (whole,) = engine.generate("Well?", greedy(grammar=grammar))
    assert (len(json.loads(whole.text)), whole.finish_reason) == (20, FinishReason.STOP)


class SlowCompiler:
    """Holds up the compiling of grammars until the test lets it go on."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.begun, self.go = threading.Event(), threading.Event()
        compile = GrammarCompiler.compile

        def slow(compiler: GrammarCompiler, grammar: str) -> str:
            self.begun.set()
            self.go.wait(60)
            return compile(compiler, grammar)

        monkeypatch.setattr(GrammarCompiler, "compile", slow)


async def test_others_go_on_while_a_grammar_is_compiled(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    slow = SlowCompiler(monkeypatch)
    bound = engine.submit("Well?", greedy(grammar=json_schema_grammar({"enum": ["slow", "other"]})))
    given_up = engine.submit("Well?", greedy(grammar=json_schema_grammar({"enum": ["slow", "third"]})))
    assert [output.finish_reason async for output in engine.stream("Well?", greedy(20))][-1] is FinishReason.LENGTH
    assert slow.begun.is_set()
    assert not bound.started
    given_up.abort()
    while not (ended := await given_up.next()):
        pass
    assert ended.finish_reason is FinishReason.ABORT
    slow.go.set()
    text = ""
    is_finished = False
    while not is_finished:
        output = await bound.next()
        text += output.text if output else ""
        is_finished = output is not None and output.finished
    assert json.loads(text) in ("slow", "other")
    assert engine.stats().num_waiting == 0
    await until_all_free(engine)


@pytest.mark.parametrize("depth", [1, 2])
async def test_shutdown_while_compiling_ends_the_stream(
    model_dir: Path, monkeypatch: pytest.MonkeyPatch, depth: int
) -> None:
    slow = SlowCompiler(monkeypatch)
    with scripted_engine(model_dir, "yes", pipeline_depth=depth) as engine:
        stream = engine.submit("Well?", greedy(grammar=json_schema_grammar({"enum": ["slow", "other"]})))
        await asyncio.to_thread(slow.begun.wait, 30)
        threading.Timer(0.2, slow.go.set).start()
        await asyncio.to_thread(engine.shutdown)
        while not (output := await stream.next()):
            pass
    assert output.finish_reason is FinishReason.ABORT


def test_max_tokens_cuts_json_and_says_so(engine: Engine) -> None:
    (cut,) = engine.generate("Well?", greedy(5, grammar=json_schema_grammar(ROW)))
    assert (len(cut.token_ids), cut.finish_reason) == (5, FinishReason.LENGTH)
    # The token that leads nowhere may be the last: nothing more was wanted.
    (last,) = engine.generate("Well?", greedy(len(engine.tokenizer.encode("yes")), grammar=STUCK))
    assert (last.text, last.finish_reason) == ("yes", FinishReason.LENGTH)


def test_json_ends_when_it_is_whole_and_ignore_eos_is_refused(engine: Engine) -> None:
    grammar = json_schema_grammar(ROW)
    (whole,) = engine.generate("Well?", greedy(grammar=grammar))
    assert (len(json.loads(whole.text)), whole.finish_reason) == (20, FinishReason.STOP)
    with pytest.raises(RequestError, match="ignore_eos must be false") as refused:
        engine.generate("Well?", greedy(grammar=grammar, ignore_eos=True))
    assert refused.value.param == "ignore_eos"


@pytest.mark.parametrize("offload", [True, False], ids=["load", "recompute"])
@pytest.mark.parametrize("depth", [1, 2])
def test_a_preempted_answer_reads_itself_again(model_dir: Path, offload: bool, depth: int) -> None:
    scheduler = {"policy": "round-robin", "ablation": {"offload": offload}, "schedule_interval_s": 0.02}
    settings = {"num_gpu_blocks_override": 25, "max_model_len": 320, "pipeline_depth": depth, "scheduler": scheduler}
    row = json.dumps(list(range(10)) * 5)
    long_row = {**ROW, "minItems": 50, "maxItems": 50}
    then_stuck = 'start: row stuck\nrow: %json {"const": ' + row + '}\nstuck: stuck "no"'
    grammars = [json_schema_grammar(long_row), then_stuck] * 4
    prompts = [f"{number}: {'why ' * number}" for number in range(8)]
    with scripted_engine(model_dir, row, ends=False, **settings) as engine:
        outputs = engine.generate(prompts, [greedy(grammar=grammar) for grammar in grammars], rate=200.0)
        assert engine.stats().num_preemptions > 0
    assert [json.loads(output.text) for output in outputs] == [list(range(10)) * 5] * 8
    assert [output.finish_reason for output in outputs] == [FinishReason.STOP, FinishReason.ERROR] * 4


@pytest.mark.parametrize("schema", ENDLESS.values(), ids=ENDLESS)
async def test_a_schema_that_nothing_satisfies_is_400_and_names_the_field(model_dir: Path, schema: Any) -> None:
    def tool(name: str, parameters: Any) -> dict[str, Any]:
        return {"type": "function", "function": {"name": name, "parameters": parameters}}

    format = {"type": "json_schema", "json_schema": {"name": "n", "schema": schema}}
    tools = {"tools": [tool("f", {}), tool("g", schema)], "tool_choice": "required"}
    nested = {"type": "object", "properties": {"x": {"anyOf": [N]}}, "required": ["x"], "$defs": schema["$defs"]}
    cases = {
        "response_format": {"response_format": format},
        "tools[1].function.parameters": tools,
        "tools[0].function.parameters": {"tools": [tool("f", nested)], "tool_choice": "required"},
    }
    async with scripted_server(model_dir, "{}") as server:
        for param, body in cases.items():
            async with server.post(CHAT, {"messages": ASK, **body}) as response:
                error = (await response.json())["error"]
            assert (response.status, error["param"], error["code"]) == (400, param, "invalid_grammar")


@pytest.mark.parametrize("kind", ["string", ["string", "null"], None, 7, []], ids=repr)
@pytest.mark.parametrize("choice", ["auto", "none", "required"])
async def test_parameters_of_no_object_are_400(model_dir: Path, kind: Any, choice: str) -> None:
    functions = [{"name": "f"}, {"name": "g", "parameters": {"type": kind}}]
    tools = [{"type": "function", "function": function} for function in functions]
    async with (
        scripted_server(model_dir, "{}") as server,
        server.post(CHAT, {"messages": ASK, "tools": tools, "tool_choice": choice}) as response,
    ):
        error = (await response.json())["error"]
    assert (response.status, error["param"]) == (400, "tools[1].function.parameters")


@pytest.mark.parametrize("stream", [False, True])
async def test_over_http_it_is_an_error_too(model_dir: Path, stream: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = GrammarCompiler.matcher
    monkeypatch.setattr(GrammarCompiler, "matcher", lambda compiler, _: compiled(compiler, STUCK))
    body = {"messages": ASK, "response_format": {"type": "json_object"}, "stream": stream}
    async with scripted_server(model_dir, "yes") as server, server.post(CHAT, body) as response:
        text = await response.text()
    assert response.status == (200 if stream else 500)
    events = [line.removeprefix("data: ") for line in text.splitlines() if line.startswith("data: ")] or [text]
    error = json.loads(events[-2] if stream else events[0])["error"]
    assert error["code"] == "generation_failed"
    assert "grammar or JSON schema" in error["message"]


async def test_a_tokenizer_that_the_library_panics_on_costs_grammars_only(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model_dir = write_scripted_model(tmp_path, TOOLS_TEMPLATE, vocab_size=513)
    (model_dir / "tokenizer.json").write_text(long_token_json(model_dir))
    tools = [{"type": "function", "function": {"name": "f"}}]
    asking = {
        "response_format": {"response_format": {"type": "json_object"}},
        "tool_choice": {"tools": tools, "tool_choice": "required"},
    }
    async with scripted_server(model_dir, "Yes.") as server:
        assert "no grammars" in caplog.text
        async with server.post(CHAT, {"messages": ASK}) as response:
            assert (await response.json())["choices"][0]["message"]["content"] == "Yes."
        for param, body in asking.items():
            async with server.post(CHAT, {"messages": ASK, **body}) as response:
                error = (await response.json())["error"]
            assert (response.status, error["param"], error["code"]) == (400, param, "unsupported_parameter")
