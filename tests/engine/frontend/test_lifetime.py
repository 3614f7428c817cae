"""The end of an engine without shutdown: the program exits, drops it, or forks."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.tokenizers import write_tiny_tokenizer

SCRIPT = """
import asyncio, gc, os, sys, threading
from tfserve.config import EngineConfig
from tfserve.engine.engine import Engine
from tfserve.errors import EngineDeadError
from tfserve.types import SamplingParams

LONG = SamplingParams(temperature=0, max_tokens=900, ignore_eos=True)
engine = Engine(EngineConfig(model=sys.argv[1], engine_process=sys.argv[2], threads=1, kv_cache_gib=0.1))

async def begin():
    streams = [engine.submit([5, 6, 7], LONG) for _ in range(4)]
    await streams[0].next()

asyncio.run(begin())
"""

FORK = """
child = os.fork()
if child == 0:
    try:
        engine.generate([[5]], LONG)
    except EngineDeadError as error:
        print(error, flush=True)
    engine.shutdown()
    sys.exit(3)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
print(len(engine.generate([[5]], SamplingParams(max_tokens=4, ignore_eos=True))[0].token_ids))
"""

DROP = """
del engine
gc.collect()
for thread in threading.enumerate():
    if thread.name.startswith("tfserve"):
        thread.join(60)
        print(thread.name, thread.is_alive())
"""


@pytest.fixture(scope="module")
def model_dir(tiny_llama3):
    return write_tiny_tokenizer(tiny_llama3)


@pytest.fixture(params=["off", "on"])
def leave(request, model_dir):
    """Runs a script whose four requests are under way, with more lines at its end."""

    def leave(lines: str) -> tuple[int, list[str], str]:
        command = [sys.executable, "-c", SCRIPT + lines, str(model_dir), request.param]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
        return done.returncode, done.stdout.splitlines(), done.stderr

    return leave


@pytest.mark.parametrize(
    ("lines", "code"),
    [
        ("", 0),
        ("sys.exit(7)", 7),
        ("raise ValueError('of the script')", 1),
        ("raise KeyboardInterrupt", -2),
        ("threading.Thread(target=engine.generate, args=([[5]], LONG), daemon=True).start()", 0),
        ("other = Engine(engine.config); del engine", 0),
    ],
    ids=["falls off", "exits", "fails", "is interrupted", "has a thread that waits", "has two engines"],
)
def test_a_program_that_leaves_requests_behind_ends_with_its_own_code(leave, lines, code):
    returned, _, err = leave(lines)
    assert returned == code, err


def test_an_engine_that_nothing_refers_to_ends(leave):
    code, out, err = leave(DROP)
    assert code == 0, err
    assert not any(line.endswith("True") for line in out)


def test_an_engine_is_dead_in_a_fork_and_works_on_in_its_own_process(leave):
    code, out, err = leave(FORK)
    assert code == 0, err
    assert "fork" in out[0]
    assert out[1:] == ["3", "4"]


INTERRUPTED = """
import os, signal, sys, threading, time
from tfserve.config import EngineConfig
from tfserve.engine.engine import Engine

# A shell's background jobs ignore Ctrl-C, and so do their children.
signal.signal(signal.SIGINT, signal.default_int_handler)

def interrupt():
    while not any(thread.name == "tfserve-core" and thread.is_alive() for thread in threading.enumerate()):
        time.sleep(0.001)
    os.kill(os.getpid(), signal.SIGINT)

threading.Thread(target=interrupt).start()
try:
    Engine(EngineConfig(model=sys.argv[1], engine_process="off", threads=1, kv_cache_gib=0.1))
except KeyboardInterrupt:
    if sys.argv[2] == "stays":
        [core] = [thread for thread in threading.enumerate() if thread.name == "tfserve-core"]
        core.join(60)
        print(core.is_alive())
    sys.exit(5)
"""


@pytest.mark.parametrize("then", ["stays", "leaves"])
def test_a_load_that_is_interrupted_ends_by_itself(model_dir, then):
    command = [sys.executable, "-c", INTERRUPTED, str(model_dir), then]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stdout.split()) == (5, ["False"] if then == "stays" else []), done.stderr
