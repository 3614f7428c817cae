"""The embedding API over a real tiny model: in a thread and in a process, the same answers and the same errors."""

from __future__ import annotations

import asyncio
import json
import os
import signal

import msgspec
import numpy as np
import psutil
import pytest
import torch

from tests.free_blocks import wait_until_all_free
from tests.scheduler_settings import scheduler_config
from tests.tokenizers import write_tiny_tokenizer
from tfserve.config import EngineConfig, SchedulerConfig, ServerConfig
from tfserve.engine.engine import Engine
from tfserve.engine.frontend.validation import validate
from tfserve.errors import ConfigError, EngineDeadError, ModelError, QueueFullError, RequestError
from tfserve.model.grammars.grammar import json_schema_grammar
from tfserve.types import FinishReason, SamplingParams

GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)


@pytest.fixture(scope="module")
def model_dir(tiny_llama3):
    write_tiny_tokenizer(tiny_llama3)
    return tiny_llama3


def config_for(model_dir, **settings) -> EngineConfig:
    settings = {"max_model_len": 256, "max_num_seqs": 4, "threads": 1, "debug_checks": True, **settings}
    return EngineConfig(model=str(model_dir), **settings)


@pytest.fixture(scope="module", params=[("off", 1), ("on", 1), ("off", 2)], ids=["thread", "process", "two-deep"])
def engine(request, model_dir):
    process, depth = request.param
    with Engine(config_for(model_dir, engine_process=process, pipeline_depth=depth)) as engine:
        yield engine


def engine_pid(engine: Engine) -> int:
    return engine._client.pid


def test_batched_requests_get_what_they_get_alone(engine):
    prompts = [[5, 6, 7], list(range(10, 60)), [9], [3] * 30, [8, 1, 8], [4] * 77]
    together = engine.generate(prompts, GREEDY)
    for prompt, output in zip(prompts, together, strict=True):
        (alone,) = engine.generate(prompt, GREEDY)
        assert output.token_ids == alone.token_ids
        assert len(output.token_ids) == 12
        assert output.finish_reason is FinishReason.LENGTH
        assert output.num_prompt_tokens == len(prompt)
    wait_until_all_free(engine)


def test_seeded_sampling_repeats_and_seeds_differ(engine):
    def run(seed):
        params = SamplingParams(temperature=1.0, seed=seed, max_tokens=20, ignore_eos=True)
        return engine.generate([[5, 6, 7]] * 2, params)[1].token_ids

    assert run(1) == run(1)
    assert run(1) != run(2)


async def test_a_conversation_is_answered_as_its_prompt_is(engine):
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}]
    text = engine.tokenizer.apply_chat_template(messages)
    (expected,) = engine.generate([engine.tokenizer.encode(text, add_special_tokens=False)], GREEDY)
    assert engine.chat(messages, GREEDY).token_ids == expected.token_ids
    pieces = [piece async for piece in engine.stream_chat(messages, GREEDY)]
    assert "".join(piece.text for piece in pieces) == expected.text
    alone = [{"role": "user", "content": "Hello"}]
    assert engine.chat("Hello", GREEDY).token_ids == engine.chat(alone, GREEDY).token_ids


@pytest.mark.parametrize("messages", [[], [{}], [{"role": "user"}], ["Hello"], 5, None, [{"role": 1, "content": "x"}]])
def test_what_is_no_conversation_is_refused(engine, messages):
    with pytest.raises(RequestError) as caught:
        engine.chat(messages, GREEDY)
    assert caught.value.param == "messages"


def test_a_conversation_beyond_the_context_is_refused(engine):
    with pytest.raises(RequestError):
        engine.chat("long " * 10_000, GREEDY)


def test_an_engine_is_made_of_a_models_name_alone(model_dir):
    from tfserve import Engine as FromTheTop

    with FromTheTop(str(model_dir)) as engine:
        assert len(engine.chat("Hello", SamplingParams(temperature=0, max_tokens=2, ignore_eos=True)).token_ids) == 2
        assert engine.config.served_model_name == model_dir.name


async def test_stream_pieces_add_up_to_the_whole(engine):
    (whole,) = engine.generate([[5, 6, 7]], GREEDY)
    pieces = [output async for output in engine.stream([5, 6, 7], GREEDY)]
    assert "".join(piece.text for piece in pieces) == whole.text
    assert [token for piece in pieces for token in piece.token_ids] == whole.token_ids
    assert [piece.finished for piece in pieces] == [False] * (len(pieces) - 1) + [True]
    times = pieces[-1].times
    assert times.arrival_s <= times.first_scheduled_s <= times.first_token_s <= times.finished_s


async def test_leaving_a_stream_early_frees_its_blocks(engine):
    params = SamplingParams(temperature=0, max_tokens=200, ignore_eos=True)
    stream = engine.stream([5, 6, 7], params)
    async for _ in stream:
        break
    await stream.aclose()
    await asyncio.to_thread(wait_until_all_free, engine)


async def test_abort_in_the_waiting_queue_ends_the_stream(engine):
    params = SamplingParams(temperature=0, max_tokens=200, ignore_eos=True)
    streams = [engine.submit([5, 6, i + 1], params) for i in range(6)]
    streams[5].abort()
    output = await streams[5].next()
    assert output.finish_reason is FinishReason.ABORT
    for stream in streams[:5]:
        stream.abort()
        while not (await stream.next()).finished:
            pass
    await asyncio.to_thread(wait_until_all_free, engine)


def test_stop_string_ends_text_before_it(engine):
    (free,) = engine.generate([[5, 6, 7]], GREEDY)
    stop = free.text[len(free.text) // 2 :][:3]
    params = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True, stop=(stop,))
    (stopped,) = engine.generate([[5, 6, 7]], params)
    assert stopped.text == free.text[: free.text.index(stop)]
    assert stopped.finish_reason is FinishReason.STOP
    assert stopped.stop_reason == stop
    assert len(stopped.token_ids) <= len(free.token_ids)


def test_logprobs_name_the_chosen_token_first_when_greedy(engine):
    params = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True, logprobs=3)
    (output,) = engine.generate([[5, 6, 7]], params)
    assert [entry.token_id for entry in output.logprobs] == output.token_ids
    for entry in output.logprobs:
        assert entry.top[0] == (entry.token_id, entry.logprob)
        assert len(entry.top) == 3


def test_a_prompt_can_be_scored_with_and_without_going_on(engine):
    prompt = [5, 6, 7] * 30
    alone, before = (SamplingParams(temperature=0, max_tokens=n, prompt_logprobs=2, ignore_eos=True) for n in (0, 3))
    scored, also_scored = engine.generate([prompt] * 2, [alone, before])
    assert (scored.token_ids, scored.text, scored.finish_reason) == ([], "", FinishReason.LENGTH)
    assert [entry.token_id for entry in scored.prompt_logprobs] == prompt[1:]
    assert all(len(entry.top) == 2 for entry in scored.prompt_logprobs)
    assert also_scored.token_ids == engine.generate([prompt], GREEDY)[0].token_ids[:3]
    values = [[entry.logprob for entry in output.prompt_logprobs] for output in (scored, also_scored)]
    assert values[0] == pytest.approx(values[1], abs=1e-4)
    assert engine.generate([[5]], alone)[0].prompt_logprobs == []
    wait_until_all_free(engine)


def test_a_grammar_binds_its_own_request_only(engine):
    schema = {"type": "object", "properties": {"ok": {"type": "boolean"}}, "required": ["ok"]}
    grammar = json_schema_grammar({**schema, "additionalProperties": False})
    bound = SamplingParams(temperature=1, seed=1, max_tokens=120, grammar=grammar)
    free, output, also_free = engine.generate([[5, 6, 7]] * 3, [GREEDY, bound, GREEDY])
    assert json.loads(output.text)["ok"] in (True, False)
    assert output.finish_reason is FinishReason.STOP
    assert free.token_ids == also_free.token_ids == engine.generate([[5, 6, 7]], GREEDY)[0].token_ids
    with pytest.raises(RequestError, match="cannot be served"):
        engine.generate([[5]], SamplingParams(grammar=json_schema_grammar({"type": "wobble"})))


async def test_prompt_logprobs_come_once_and_first(engine):
    params = SamplingParams(temperature=0, max_tokens=5, prompt_logprobs=0, ignore_eos=True)
    pieces = [output async for output in engine.stream([5, 6, 7], params)]
    assert len(pieces[0].prompt_logprobs) == 2
    assert all(piece.prompt_logprobs is None for piece in pieces[1:])


@pytest.mark.parametrize(
    ("prompt", "params", "param", "text"),
    [
        ([], {}, "prompt", "empty"),
        ([512], {}, "prompt", "token id 512 is not in the vocabulary"),
        ([1] * 256, {}, "prompt", "maximum context length is 256 tokens; the prompt has 256"),
        ([1] * 200, {"max_tokens": 100}, "max_tokens", "ask for at most 56"),
        ([1], {"max_tokens": -1}, "max_tokens", "at least 1"),
        ([1], {"max_tokens": 0}, "max_tokens", "at least 1"),
        ([1], {"prompt_logprobs": 21}, "prompt_logprobs", "between 0 and 20"),
        ([1], {"top_p": 3.0}, "top_p", "got 3.0"),
        ([1], {"temperature": float("nan")}, "temperature", "nan"),
        ([1], {"temperature": "hot"}, "temperature", "must be a number, got a string"),
        ([1], {"stop": ("",)}, "stop", "non-empty"),
        ([1], {"stop": ("a", 3)}, r"stop[1]", "must be a string, got an integer"),
        ([1], {"seed": object()}, "seed", "seed must be an integer"),
        ([1], {"logit_bias": {600: 1.0}}, "logit_bias", "512"),
        ([True, 4], {}, "prompt", "token id True"),
        ("half \ud800 pair", {}, "prompt", "not valid Unicode"),
        ("half \ud800 pair" * 2000, {}, "prompt", "not valid Unicode"),
        ([1], {"stop": ("\ud800",)}, "stop", "valid Unicode"),
        ([1], {"grammar": 'start: "\ud800"'}, "grammar", "valid Unicode"),
        ([1], {"grammar": 'start: %json {"const": -9223372036854775808}'}, "grammar", "cannot be served"),
        ([1], {"top_k": 2**70}, "top_k", "positive integer"),
        ([1], {"min_tokens": 2**63 - 1}, "min_tokens", "at most max_tokens"),
        ([1], {"repetition_penalty": 1e-40}, "repetition_penalty", "between 0.01 and 100"),
        ([1], {"stop_token_ids": tuple(range(200))}, "stop_token_ids", "at most 128"),
        ([1], {"stop_token_ids": (-1,)}, "stop_token_ids", "512"),
    ],
)
def test_bad_requests_are_refused_by_name_before_they_run(engine, prompt, params, param, text):
    with pytest.raises(RequestError, match=text) as caught:
        engine.generate([prompt], SamplingParams(**params))
    assert caught.value.param == param


@pytest.mark.parametrize("ids", [np.array([5, 6, 7]), torch.tensor([5, 6, 7]), [np.int64(5), 6, 7], range(5, 8)])
def test_ids_of_other_libraries_are_those_of_a_list(engine, ids):
    assert engine.generate(ids, GREEDY)[0].token_ids == engine.generate([[5, 6, 7]], GREEDY)[0].token_ids


@pytest.mark.parametrize(
    ("prompts", "params", "param"),
    [
        ({"prompt": "a"}, GREEDY, "prompts"),
        (b"bytes", GREEDY, "prompts"),
        (None, GREEDY, "prompts"),
        ([None], GREEDY, "prompts"),
        (np.array([0.5]), GREEDY, "prompt"),
        ([5, "a"], GREEDY, "prompt"),
        ([5], {"max_tokens": 3}, "params"),
        ([5], "greedy", "params"),
        (["a", "b"], [GREEDY], "params"),
        (["a"], [{"max_tokens": 3}], "params"),
    ],
    ids=lambda value: repr(value)[:30],
)
async def test_arguments_of_another_kind_are_refused_by_name(engine, prompts, params, param):
    with pytest.raises(RequestError) as caught:
        engine.generate(prompts, params)
    assert caught.value.param == param
    with pytest.raises(RequestError):
        engine.submit(prompts, params)


async def test_ids_in_use_and_the_engines_own_are_refused(engine):
    params = SamplingParams(temperature=0, max_tokens=200, ignore_eos=True)
    stream = engine.submit([5, 6], params, request_id="req-0")
    with pytest.raises(RequestError, match="'req-0' is in use; give each request its own") as caught:
        engine.submit([5, 6], params, request_id="req-0")
    assert caught.value.param == "request_id"
    for bad in ("tfserve-0", "", 7, "\ud800"):
        with pytest.raises(RequestError, match="does not begin with 'tfserve-'"):
            engine.submit([5, 6], params, request_id=bad)
    own = {engine.submit([5, 6], GREEDY).request_id for _ in range(3)}
    assert len(own) == 3
    assert all(req.startswith("tfserve-") for req in own)
    stream.abort()
    while not (await stream.next()).finished:
        pass
    again = engine.submit([5, 6], GREEDY, request_id="req-0")
    while not (await again.next()).finished:
        pass
    await asyncio.to_thread(wait_until_all_free, engine)


async def test_two_threads_cannot_take_one_id(engine):
    """The check before the request is built may pass for both."""
    params = SamplingParams(temperature=0, max_tokens=200, ignore_eos=True)
    stream = engine.submit([5, 6], params, request_id="mine")
    message = engine._prepare.message([5, 6], params, None, ["other"])
    late = msgspec.structs.replace(message, request_id="mine")
    with pytest.raises(RequestError, match="in use"):
        engine._send(late, [stream])
    stream.abort()
    while not (await stream.next()).finished:
        pass


async def test_a_stream_that_is_over_says_so(engine):
    stream = engine.submit([5, 6], GREEDY)
    await read_to_the_end(stream)
    for _ in range(2):
        with pytest.raises(RequestError, match=f"{stream.request_id} has finished"):
            await asyncio.wait_for(stream.next(), 10)


def test_parameters_are_verified_once_with_max_tokens_resolved(engine, monkeypatch):
    seen = []
    verify = SamplingParams.verify

    def counting(params, vocab_size):
        seen.append(params.max_tokens)
        verify(params, vocab_size)

    monkeypatch.setattr(SamplingParams, "verify", counting)
    assert validate([1, 2], SamplingParams(), engine.info).max_tokens == 254
    assert validate([1, 2], SamplingParams(max_tokens=7), engine.info).max_tokens == 7
    assert seen == [254, 7]


def test_scarce_kv_preempts_without_changing_a_token(model_dir):
    prompts = [[i + 3] * 20 for i in range(6)]
    params = SamplingParams(temperature=1.0, seed=3, max_tokens=100, ignore_eos=True)
    scheduler = scheduler_config(policy="fcfs-chunked", reserve_ratio=0.0, reserve_min_ratio=0.0)
    with Engine(config_for(model_dir)) as roomy:
        expected = [output.token_ids for output in roomy.generate(prompts, params)]
    with Engine(config_for(model_dir, num_gpu_blocks_override=10, scheduler=scheduler)) as scarce:
        got = [output.token_ids for output in scarce.generate(prompts, params)]
        assert scarce.stats().num_preemptions > 0
    assert got == expected


async def test_full_queue_is_refused_with_a_time_to_retry(model_dir):
    server = ServerConfig(max_queued_requests=2)
    with Engine(config_for(model_dir, server=server)) as engine:
        params = SamplingParams(temperature=0, max_tokens=200, ignore_eos=True)
        streams = [engine.submit([1, 2], params) for _ in range(6)]
        with pytest.raises(QueueFullError) as caught:
            engine.submit([1, 2], params)
        assert caught.value.retry_after_s > 0
        for stream in streams:
            stream.abort()


async def test_stalls_are_told_where_a_rate_is_named(engine):
    async def stall(**how):
        stream = engine.submit([5, 6, 7], GREEDY, **how)
        while not (output := await stream.next()).finished:
            pass
        return output.times.stall_s

    assert await stall(rate=5.0) is not None
    assert await stall(rate=None) is None
    assert await stall() is None
    assert engine.generate([[5, 6, 7]], GREEDY)[0].times.stall_s is None
    assert engine.generate([[5, 6, 7]], GREEDY, rate="read")[0].times.stall_s is not None


async def test_a_batch_has_no_reader_and_a_stream_that_names_no_rate_is_assumed_to_have_one(engine):
    long = SamplingParams(max_tokens=200, ignore_eos=True)
    batch = asyncio.ensure_future(asyncio.to_thread(engine.generate, [[5, 6, 7]], long))
    streams = [engine.submit([5, 6, 7], long), engine.submit([5, 6, 7], long, rate=9.0)]
    async with asyncio.timeout(10):
        while len(states := await engine.streams()) < 3:
            await asyncio.sleep(0.001)
    for stream in streams:
        stream.abort()
    await batch
    told = {(state.rate, state.is_rate_assumed, state.stall_s is None) for state in states}
    assert told == {(None, False, True), (6.0, True, True), (9.0, False, False)}


def test_two_engines_live_in_one_process(model_dir):
    with Engine(config_for(model_dir)) as one, Engine(config_for(model_dir)) as two:
        assert one.generate([[5, 6]], GREEDY)[0].token_ids == two.generate([[5, 6]], GREEDY)[0].token_ids


def test_shutdown_ends_the_process_and_later_calls_say_so(model_dir):
    engine = Engine(config_for(model_dir, engine_process="on"))
    child = psutil.Process(engine_pid(engine))
    engine.shutdown()
    engine.shutdown()
    assert not child.is_running()
    with pytest.raises(EngineDeadError, match="shut down"):
        engine.generate([[5]], GREEDY)


async def read_to_the_end(stream) -> None:
    while not (await asyncio.wait_for(stream.next(), 10)).finished:
        pass


async def test_killed_engine_fails_every_stream(model_dir):
    with Engine(config_for(model_dir, engine_process="on")) as engine:
        deaths = []
        engine.on_death(deaths.append)
        params = SamplingParams(temperature=0, max_tokens=200, ignore_eos=True)
        streams = [engine.submit([1, 2], params) for _ in range(6)]
        await streams[0].next()
        os.kill(engine_pid(engine), signal.SIGKILL)
        for stream in streams:
            with pytest.raises(EngineDeadError, match="SIGKILL"):
                await read_to_the_end(stream)
        # Streams end first, and the callback comes from another thread.
        async with asyncio.timeout(10):
            while not deaths:
                await asyncio.sleep(0.01)
        assert len(deaths) == 1
        with pytest.raises(EngineDeadError):
            engine.check_health()
        with pytest.raises(EngineDeadError):
            engine.submit([1], params)


async def test_a_reader_that_takes_only_on_news_gets_the_end_after_the_last_tokens(model_dir):
    with Engine(config_for(model_dir, engine_process="on")) as engine:
        stream = engine.submit([1, 2], SamplingParams(temperature=0, max_tokens=200, ignore_eos=True))
        ended = asyncio.get_running_loop().create_future()
        num_taken = 0

        def take() -> None:
            nonlocal num_taken
            try:
                num_taken += len(stream.take().token_ids)
            except EngineDeadError as error:
                ended.set_result(error)

        async with asyncio.timeout(10):
            while not stream.num_waiting:
                await asyncio.sleep(0.001)
            stream.on_output = lambda: stream._death and take()  # reads nothing before the end
            os.kill(engine_pid(engine), signal.SIGKILL)
            await ended
        assert num_taken > 0


def test_killed_front_leaves_no_engine(model_dir, tmp_path):
    script = tmp_path / "front.py"
    script.write_text(
        "import sys, time\n"
        "from tfserve.config import EngineConfig\n"
        "from tfserve.engine.engine import Engine\n"
        f"engine = Engine(EngineConfig(model={str(model_dir)!r}, max_model_len=256, engine_process='on'))\n"
        "print(engine._client.pid, flush=True)\n"
        "time.sleep(60)\n"
    )
    import subprocess
    import sys

    with subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True) as front:
        child = psutil.Process(int(front.stdout.readline()))
        front.kill()
        front.wait()
        child.wait(10)


@pytest.mark.parametrize("mode", ["off", "on"])
def test_start_errors_name_the_setting(model_dir, tmp_path, mode):
    with pytest.raises(ModelError, match=r"config\.json"):
        Engine(EngineConfig(model=str(tmp_path), engine_process=mode))
    with pytest.raises(ConfigError, match="max_model_len") as caught:
        Engine(config_for(model_dir, num_gpu_blocks_override=3, engine_process=mode))
    assert caught.value.key == "num_gpu_blocks_override"


@pytest.mark.parametrize(
    ("settings", "fix"),
    [
        ({"num_gpu_blocks_override": 10**12}, "Set it to less than that"),
        ({"max_num_seqs": 10**12}, "set at most"),
        ({"kv_cache_gib": 10**6}, "Set a smaller value"),
        ({"host_kv_gib": 10**6, "scheduler": SchedulerConfig(policy="tokenflow")}, "set a smaller value"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_no_machine_has_memory_for_is_refused_by_name(model_dir, settings, fix):
    with pytest.raises(ConfigError, match=fix) as caught:
        Engine(config_for(model_dir, engine_process="off", **settings))
    assert caught.value.key == next(iter(settings))


async def test_streams_are_listed_and_readers_report_what_they_have_read(engine):
    params = SamplingParams(temperature=0, max_tokens=200, ignore_eos=True)
    stream = engine.submit([5, 6, 7], params, rate=1.0)
    while stream.num_output_tokens < 20:
        await stream.next()
    stream.report_played(15)
    (state,) = await engine.streams()
    assert state.id == stream.request_id
    assert state.num_unread <= state.num_output_tokens - 15
    stream.abort()
    while (output := await stream.next()) is None or not output.finished:
        pass
    assert output.times.stall_s >= 0
    assert await engine.streams() == []


async def test_listed_streams_of_a_dead_engine_are_an_error(model_dir):
    with Engine(config_for(model_dir, engine_process="on")) as engine:
        os.kill(engine_pid(engine), signal.SIGSTOP)
        asking = asyncio.create_task(engine.streams())
        await asyncio.sleep(0.05)
        os.kill(engine_pid(engine), signal.SIGKILL)
        with pytest.raises(EngineDeadError):
            await asyncio.wait_for(asking, 10)
