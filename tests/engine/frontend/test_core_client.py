"""For every end of the core's thread or process, the front learns of it: no stream hangs, `generate` raises."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.engine.core.broken_core import ERRORS
from tests.panics import PanicException
from tests.scripted import scripted_engine, write_scripted_model
from tfserve.config import EngineConfig
from tfserve.engine.core import build
from tfserve.engine.engine import Engine
from tfserve.engine.frontend.core_client import ProcessClient, ThreadClient
from tfserve.engine.frontend.stream import RequestStream
from tfserve.engine.scheduling.scheduler import Scheduler
from tfserve.errors import EngineDeadError, EngineStalledError, ModelError, TfserveError
from tfserve.messages import AbortRequest, AddRequest
from tfserve.model.runner.runner import ModelRunner
from tfserve.types import FinishReason, SamplingParams

PATIENCE_S = 10.0
LONG = SamplingParams(temperature=0.0, max_tokens=3000)


def raising(error: BaseException) -> Callable[..., Any]:
    def fail(*_: object, **__: object) -> Any:
        raise error

    return fail


async def read_on(stream: RequestStream) -> None:
    while True:
        await asyncio.wait_for(stream.next(), PATIENCE_S)


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_scripted_model(tmp_path_factory.mktemp("scripted"))


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("error", [RuntimeError("broken"), PanicException("broken"), SystemExit("broken")], ids=repr)
async def test_a_core_thread_that_ends_ends_every_stream(
    model_dir: Path, error: BaseException, depth: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    with scripted_engine(model_dir, "a b ", ends=False, pipeline_depth=depth) as engine:
        deaths: list[str] = []
        engine.on_death(deaths.append)
        streams = [engine.submit("Why?", LONG) for _ in range(3)]
        await streams[0].next()
        monkeypatch.setattr(Scheduler, "schedule", raising(error))
        with pytest.raises(EngineDeadError, match="broken"):
            await asyncio.wait_for(asyncio.to_thread(engine.generate, ["Why?"], LONG), PATIENCE_S)
        for stream in streams:
            with pytest.raises(EngineDeadError, match="broken"):
                await read_on(stream)
        with pytest.raises(EngineDeadError):
            await asyncio.wait_for(engine.streams(), PATIENCE_S)
    assert len(deaths) == 1


async def test_a_core_that_hangs_while_it_closes_has_told_its_streams(
    model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hang = threading.Event()
    with scripted_engine(model_dir, "a b ", ends=False) as engine:
        monkeypatch.setattr(ModelRunner, "close", lambda _: hang.wait())
        monkeypatch.setattr(Scheduler, "schedule", raising(RuntimeError("broken")))
        try:
            with pytest.raises(EngineDeadError, match="broken"):
                await asyncio.wait_for(asyncio.to_thread(engine.generate, ["Why?"], LONG), PATIENCE_S)
        finally:
            hang.set()


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("error", [RuntimeError("broken"), PanicException("broken")], ids=repr)
def test_a_step_that_breaks_fails_its_requests_and_the_engine_goes_on(
    model_dir: Path, error: BaseException, depth: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    with scripted_engine(model_dir, "Because.", pipeline_depth=depth) as engine:
        with monkeypatch.context() as patched:
            patched.setattr(ModelRunner, "_step", raising(error))
            (failed,) = engine.generate("Why?", LONG)
        (output,) = engine.generate("Why?", LONG)
    assert (failed.finish_reason, failed.error) == (FinishReason.ERROR, f"{type(error).__name__}: broken")
    assert (output.text, output.finish_reason) == ("Because.", FinishReason.STOP)


@pytest.mark.parametrize("error", [RuntimeError("broken"), PanicException("broken")], ids=repr)
def test_a_callback_that_breaks_ends_the_engine_with_an_error(model_dir: Path, error: BaseException) -> None:
    with scripted_engine(model_dir, "Because.") as engine:
        engine.on_step(raising(error))
        with pytest.raises(EngineDeadError, match="broken"):
            engine.generate("Why?", LONG)


async def test_a_reader_that_breaks_costs_no_other_its_tokens(
    model_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with scripted_engine(model_dir, "Because.") as engine:
        broken, whole = (engine.submit("Why?", LONG) for _ in range(2))
        broken.on_output = raising(PanicException("broken"))
        text = ""
        while (output := await asyncio.wait_for(whole.next(), PATIENCE_S)) is not None:
            text += output.text
            if output.finished:
                break
    assert text == "Because."
    assert f"the reader of request {broken.request_id} failed" in caplog.text


def test_the_end_of_the_engine_reaches_every_stream(model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with scripted_engine(model_dir, "Because.") as engine:
        told = threading.Event()
        engine.on_death(raising(RuntimeError("a callback")))
        engine.on_death(lambda _: told.set())
        monkeypatch.setattr(Scheduler, "schedule", raising(RuntimeError("broken")))
        with pytest.raises(EngineDeadError, match="broken"):
            engine.generate("Why?", LONG)
        assert told.wait(PATIENCE_S)


@pytest.mark.parametrize("depth", [1, 2])
def test_a_panic_while_loading_is_an_error_of_ours(
    model_dir: Path, depth: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build, "load_model", raising(PanicException("out of bounds")))
    with pytest.raises(ModelError, match="out of bounds"):
        Engine(EngineConfig(model=str(model_dir), engine_process="off", pipeline_depth=depth))


class Front:
    """What a client tells the engine."""

    def __init__(self) -> None:
        self.steps: list[object] = []
        self.stepped, self.died = threading.Event(), threading.Event()
        self.reason = ""

    def deliver(self, message: object) -> None:
        self.steps.append(message)
        self.stepped.set()

    def on_death(self, reason: str) -> None:
        self.reason = reason
        self.died.set()

    def start(self, how: str) -> ProcessClient:
        config = EngineConfig(model="m", served_model_name=how)
        return ProcessClient(config, self.deliver, self.on_death, module="tests.engine.core.broken_core")


@pytest.mark.parametrize("error", ERRORS)
def test_an_engine_process_that_breaks_says_so_though_it_hangs_while_it_closes(error: str) -> None:
    front = Front()
    client = front.start(f"running {error}")
    for _ in range(2):
        front.stepped.clear()
        client.send(AbortRequest("a"))
        assert front.stepped.wait(PATIENCE_S)
    assert front.died.wait(PATIENCE_S)
    assert type(ERRORS[error]).__name__ in front.reason
    client.close(0.1)


@pytest.mark.parametrize("error", ERRORS)
def test_an_engine_process_that_breaks_while_loading_says_so(error: str) -> None:
    with pytest.raises(TfserveError, match=type(ERRORS[error]).__name__):
        Front().start(f"loading {error}")


def test_an_engine_process_that_cannot_hear_its_front_ends() -> None:
    front = Front()
    client = front.start("running bug")
    client._conn.send_bytes(b"\xc1 is no message")
    assert front.died.wait(PATIENCE_S)
    assert "exit code 1" in front.reason
    client.close(PATIENCE_S)


@pytest.mark.parametrize("error", [RuntimeError("broken"), PanicException("broken"), SystemExit("broken")], ids=repr)
def test_an_engine_process_whose_messages_cannot_be_read_is_ended(error: BaseException) -> None:
    front = Front()
    front.deliver = raising(error)  # type: ignore[method-assign]
    client = front.start("running bug")
    client.send(AbortRequest("a"))
    assert front.died.wait(PATIENCE_S)
    assert "broken" in front.reason
    assert client._process.wait(PATIENCE_S) != 0
    client.close(PATIENCE_S)


def fill(client: ProcessClient) -> None:
    """Send a stopped core requests until it has no room for more."""
    prompt = list(range(2**16))
    for number in range(10_000):
        try:
            client.send(AddRequest(f"{number}", prompt, SamplingParams(), 0.0))
        except EngineStalledError:
            return
    raise AssertionError("a queue without end")


def test_a_stopped_engine_process_blocks_no_caller_and_is_ended_in_time() -> None:
    front = Front()
    client = front.start("running bug")
    os.kill(client.pid, signal.SIGSTOP)
    fill(client)
    assert client.is_full
    client.send(AbortRequest("0"))
    client.close(0.1)
    with pytest.raises(EngineDeadError):
        client.send(AbortRequest("0"))
    assert not psutil.pid_exists(client.pid)


def test_what_a_stopped_engine_process_was_sent_arrives_once_it_goes_on() -> None:
    front = Front()
    client = front.start("running bug")
    os.kill(client.pid, signal.SIGSTOP)
    fill(client)
    os.kill(client.pid, signal.SIGCONT)
    assert front.died.wait(PATIENCE_S)  # of its second step, which only messages cause
    assert "ValueError" in front.reason
    client.close(PATIENCE_S)


async def test_an_engine_that_takes_no_messages_is_not_healthy_and_refuses_without_losing_ends(
    model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with scripted_engine(model_dir, "a b ", ends=False) as engine:
        stream = engine.submit("Why?", LONG)
        await stream.next()

        def refuse(client: ThreadClient, message: object, patience_s: float | None = 0.0) -> None:
            if not isinstance(message, AbortRequest):
                raise EngineStalledError("full")
            send(client, message, patience_s)

        with monkeypatch.context() as patched:
            send = ThreadClient.send
            patched.setattr(ThreadClient, "send", refuse)
            patched.setattr(ThreadClient, "is_full", True)
            with pytest.raises(EngineStalledError):
                engine.check_health()
            with pytest.raises(EngineStalledError):
                engine.submit("Why?", LONG)
            with pytest.raises(EngineStalledError):
                stream.report_played(1)
            with pytest.raises(EngineStalledError):
                await engine.streams()
            stream.abort()
        while (output := await asyncio.wait_for(stream.next(), PATIENCE_S)) is None or not output.finished:
            pass
        assert output.finish_reason is FinishReason.ABORT
        engine.check_health()
