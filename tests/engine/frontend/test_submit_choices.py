"""Several choices for one prompt: one message to the core, and the tokens that each would get alone."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.tokenizers import write_tiny_tokenizer
from tfserve.config import EngineConfig, ServerConfig
from tfserve.engine.engine import Engine
from tfserve.engine.frontend.core_client import connect
from tfserve.engine.frontend.stream import RequestStream
from tfserve.errors import QueueFullError, RequestError
from tfserve.messages import AddRequest
from tfserve.types import SamplingParams, Tenant

PROMPT = [5, 6, 7]
IDS = ["a", "b", "c"]


def config_for(tiny_llama3: Path, process: str = "off", queued: int = 8) -> EngineConfig:
    write_tiny_tokenizer(tiny_llama3)
    server = ServerConfig(max_queued_requests=queued)
    return EngineConfig(
        model=str(tiny_llama3), max_model_len=256, max_num_seqs=4, threads=1, engine_process=process, server=server
    )


async def tokens_of(stream: RequestStream) -> list[int]:
    tokens: list[int] = []
    while True:
        output = await stream.next()
        assert output is not None
        tokens += output.token_ids
        if output.finished:
            return tokens


@pytest.mark.parametrize("process", ["off", "on"])
@pytest.mark.parametrize("seed", [4, 2**63 - 2])
async def test_each_choice_gets_the_tokens_of_its_own_seed(tiny_llama3: Path, process: str, seed: int) -> None:
    params = SamplingParams(temperature=1.0, seed=seed, max_tokens=12, ignore_eos=True, stop=("never said",))
    seeds = [seed, seed + 1, seed + 2] if seed < 2**62 else [seed, 2**63 - 1, -(2**63)]
    with Engine(config_for(tiny_llama3, process)) as engine:
        together = [await tokens_of(stream) for stream in engine.submit_choices(PROMPT, params, IDS)]
        for number, each in enumerate(seeds):
            own = SamplingParams(temperature=1.0, seed=each, max_tokens=12, ignore_eos=True)
            assert together[number] == engine.generate(PROMPT, own)[0].token_ids
    assert len({tuple(tokens) for tokens in together}) == 3


async def test_what_choices_share_is_sent_once(tiny_llama3: Path) -> None:
    sent = []

    def spying(*args):
        client = connect(*args)
        send = client.send
        client.send = lambda message, *more: (sent.append(message), send(message, *more))
        return client

    with Engine(config_for(tiny_llama3), spying) as engine:
        for stream in engine.submit_choices(PROMPT, SamplingParams(max_tokens=2), IDS):
            await tokens_of(stream)
    (message,) = [message for message in sent if isinstance(message, AddRequest)]
    assert message.request_ids == tuple(IDS)


async def test_choices_are_refused_together(tiny_llama3: Path) -> None:
    with Engine(config_for(tiny_llama3, queued=2)) as engine:
        taken = engine.submit("x", SamplingParams(max_tokens=1), request_id="b")
        with pytest.raises(RequestError, match="in use"):
            engine.submit_choices(PROMPT, SamplingParams(max_tokens=1), IDS)
        await tokens_of(taken)
        with pytest.raises(QueueFullError):
            engine.submit_choices(PROMPT, SamplingParams(max_tokens=1), [str(number) for number in range(7)])
        for stream in engine.submit_choices(PROMPT, SamplingParams(max_tokens=1), IDS):
            assert len(await tokens_of(stream)) == 1


@pytest.mark.parametrize("ids", [[], ["a", "a"], ["a", "b", "a"]], ids=str)
async def test_ids_that_are_not_all_different_are_refused_and_the_engine_lives(
    tiny_llama3: Path, ids: list[str]
) -> None:
    params = SamplingParams(max_tokens=2, ignore_eos=True)
    with Engine(config_for(tiny_llama3)) as engine:
        with pytest.raises(RequestError) as refused:
            engine.submit_choices(PROMPT, params, ids)
        assert refused.value.param == "request_ids"
        assert len(await tokens_of(engine.submit(PROMPT, params, request_id="a"))) == 2


@pytest.mark.parametrize(
    "tenant",
    [
        "me",
        None,
        Tenant("x", 0.0),
        Tenant("x", -1.0),
        Tenant("x", float("nan")),
        Tenant("x", float("inf")),
        Tenant("\ud800"),
    ],
    ids=repr,
)
async def test_what_is_no_tenant_is_refused_and_the_engine_lives(tiny_llama3: Path, tenant: object) -> None:
    params = SamplingParams(max_tokens=2, ignore_eos=True)
    with Engine(config_for(tiny_llama3)) as engine:
        for start in (
            lambda: engine.submit(PROMPT, params, tenant=tenant),
            lambda: engine.submit_choices(PROMPT, params, IDS, tenant=tenant),
        ):
            with pytest.raises(RequestError) as refused:
                start()
            assert refused.value.param == "tenant"
        assert len(await tokens_of(engine.submit(PROMPT, params))) == 2
