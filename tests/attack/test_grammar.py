"""Schemas and tools made to hurt: each is refused by name, and costs its own request at most."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import time
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.attack.schemas import HONEST, HOSTILE, LINKS, chain
from tests.http.conftest import StartServer
from tests.tokenizers import write_tiny_tokenizer
from tfserve.errors import QueueFullError, RequestError
from tfserve.model.grammars import grammar
from tfserve.model.grammars.checker import GrammarChecker
from tfserve.model.grammars.grammar import json_schema_grammar
from tfserve.model.sampling.token_masks import GrammarCompiler
from tfserve.model.text.tokenizer import Tokenizer

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
ASK = [{"role": "user", "content": "Hi"}]
BREAKING = "tests.attack.breaking_checker"


def tool(parameters: Any, name: str = "f") -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "parameters": parameters}}


async def refusal(server: Any, path: str, body: Any) -> tuple[int, str | None]:
    async with server.post(path, body) as response:
        answer = await response.json()
    assert "error" in answer, answer
    return response.status, answer["error"]["param"]


@pytest.mark.parametrize("schema", HOSTILE.values(), ids=HOSTILE)
async def test_a_hostile_schema_is_400_wherever_it_comes(start: StartServer, schema: Any) -> None:
    server = await start(reply=None)
    async with server.post(CHAT, {"messages": ASK, "stream": True}) as beside:
        await server.engine.submitted.wait()
        format = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
        assert await refusal(server, CHAT, {"messages": ASK, "response_format": format}) == (400, "response_format")
        assert await refusal(server, COMPLETIONS, {"prompt": "x", "response_format": format}) == (
            400,
            "response_format",
        )
        tools = {"tools": [tool({}), tool(schema, "g")], "messages": ASK}
        assert await refusal(server, CHAT, {**tools, "tool_choice": "required"}) == (
            400,
            "tools[1].function.parameters",
        )
        (stream,) = server.engine.live
        stream.say("still here", "stop")
        assert b"still here" in await beside.read()


@pytest.mark.parametrize("schema", HONEST.values(), ids=HONEST)
async def test_an_honest_one_is_served(start: StartServer, schema: Any) -> None:
    server = await start(reply="{}")
    format = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    bodies: list[dict[str, Any]] = [{"response_format": format}]
    if len(json.dumps(schema)) < 500:  # the fake model's prompts are short
        bodies += [{"tools": [tool(schema)], "tool_choice": choice} for choice in ("required", "auto")]
    for body in bodies:
        async with server.post(CHAT, {"messages": ASK, **body}) as response:
            assert response.status == 200, await response.text()


@pytest.mark.parametrize("depth", [300, 600, 900, 950, 960, 965, 970, 975, 980, 985, 990])
@pytest.mark.parametrize("choice", ["auto", "required"])
async def test_parameters_nested_deep_are_400(start: StartServer, depth: int, choice: str) -> None:
    server = await start()
    deep = b'{"a":' * depth + b"1" + b"}" * depth
    head = b'{"messages": [{"role": "user", "content": "x"}], "tool_choice": "' + choice.encode()
    for parameters in (deep, b'{"type": ' + deep + b"}"):
        body = (
            head + b'", "tools": [{"type": "function", "function": {"name": "f", "parameters": ' + parameters + b"}}]}"
        )
        status, param = await refusal(server, CHAT, body)
        assert status == 400
        # The decoder itself gives up on the deepest, before it is known which field it is.
        assert param is None or param.startswith("tools")
    assert not server.engine.live


@pytest.mark.parametrize("path", [CHAT, "/tokenize"])
@pytest.mark.parametrize("name", ["f\n", "\nf", "f\n\n", "f g", "", "f" * 65, "\N{SUPERSCRIPT TWO}"], ids=repr)
async def test_the_whole_name_of_a_tool_is_looked_at(start: StartServer, path: str, name: str) -> None:
    server = await start()
    status, param = await refusal(server, path, {"messages": ASK, "tools": [tool({}, name)]})
    assert (status, param) == (400, "tools[0].function.name")


@pytest.mark.parametrize("parameters", [{"maximum": 2**64}, {"maximum": -(2**63) - 1}, {"x-guidance": {}}], ids=repr)
async def test_tools_that_are_only_shown_are_measured_too(start: StartServer, parameters: Any) -> None:
    server = await start()
    for path in (CHAT, "/tokenize"):
        where = await refusal(server, path, {"messages": ASK, "tools": [tool(parameters)]})
        assert where == (400, "tools[0].function.parameters")


async def test_the_parameters_of_all_tools_together_have_a_limit(start: StartServer) -> None:
    server = await start()
    long = {"description": "x" * 100_000}
    assert await refusal(server, CHAT, {"messages": ASK, "tools": [tool(long)] * 6}) == (400, "tools")


def test_what_breaks_the_library_ends_a_process_of_its_own() -> None:
    """The chain that overflows its stack, past our own measure."""
    raw = json.dumps({"grammars": [{"json_schema": chain(1000, LINKS["properties"])}]})
    checker = GrammarChecker()
    checker.submit(raw).result()
    assert checker.submit(json_schema_grammar({"type": "object"})).result() == ""
    checker.close()


@pytest.mark.parametrize("how", ["crash", "loop", "leave"])
def test_a_grammar_that_ends_the_process_is_remembered_and_the_next_is_checked(how: str) -> None:
    checker = GrammarChecker(BREAKING)
    assert checker.submit("bad").result() == "no good"
    first = checker.pid
    problem = checker.submit(how).result()
    assert problem
    assert checker.submit("good").result() == ""
    second = checker.pid
    assert second not in (None, first)
    assert checker.submit(how).result() == problem
    assert checker.pid == second
    checker.close()


@pytest.mark.parametrize("how", ["killed", "sleep"])
def test_what_is_not_the_grammars_fault_may_be_tried_again(how: str) -> None:
    checker = GrammarChecker(BREAKING, wall_limit_s=1.0)
    for _ in range(2):
        with pytest.raises(QueueFullError):
            checker.submit(how).result()
        assert checker.submit(f"good: after {how}").result() == ""
    checker.close()


async def test_a_broken_check_is_400_and_costs_nobody_else(start: StartServer, monkeypatch: pytest.MonkeyPatch) -> None:
    checker = GrammarChecker(BREAKING, wall_limit_s=0.5)
    monkeypatch.setattr(grammar, "_checker", checker)
    server = await start(reply="{}")

    async def ask(how: str) -> tuple[int, Any]:
        # The stand-in goes by how a grammar begins.
        monkeypatch.setattr("tfserve.http.structured.json_schema_grammar", lambda *_: how)
        async with server.post(CHAT, {"messages": ASK, "response_format": {"type": "json_object"}}) as response:
            body = await response.json()
        return response.status, body.get("error", {}).get("param")

    assert await ask("crash") == (400, "response_format")
    assert await ask("loop") == (400, "response_format")
    assert (await ask("sleep"))[0] == 429
    assert (await ask("good"))[0] == 200
    checker.close()


async def test_too_many_checks_at_once_are_429(start: StartServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tfserve.model.grammars.checker.MAX_WAITING", 4)
    checker = GrammarChecker(BREAKING, wall_limit_s=1.0)
    waiting = [checker.submit(f"sleep:{number}") for number in range(2)]
    while checker.num_waiting == 2:
        await asyncio.sleep(0.01)
    waiting.append(checker.submit("sleep:3"))
    with pytest.raises(QueueFullError):
        checker.submit("good")
    for future in waiting:
        future.cancel()
    checker.close()


def test_those_who_have_grammars_checked_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tfserve.model.grammars.checker.MAX_WAITING", 6)
    checker = GrammarChecker(BREAKING, wall_limit_s=1.0)
    done: list[str] = []

    def submit(grammar: str, owner: str) -> Future[str]:
        future = checker.submit(grammar, owner)
        future.add_done_callback(lambda _: done.append(grammar))
        return future

    submit("sleep", "many")
    while checker.num_waiting:
        time.sleep(0.01)
    many = [submit(f"good: {number}", "many") for number in range(3)]
    with pytest.raises(QueueFullError):
        checker.submit("good: 3", "many")
    assert submit("good: one", "one").result() == ""
    assert many[-1].result() == ""
    checker.close()
    assert done == ["sleep", "good: 0", "good: one", "good: 1", "good: 2"]


LONELY = """
import os, socket, sys, time
from tfserve.model.grammars import grammar

def check(text):
    grammar.check_grammar(grammar.json_schema_grammar({"const": text}))
    return grammar._checker.pid

listener = socket.create_server(("127.0.0.1", 0))
pid = check("first")
sockets = [name for fd in os.listdir(f"/proc/{pid}/fd") if "socket" in (name := os.readlink(f"/proc/{pid}/fd/{fd}"))]
print(pid, len(sockets), flush=True)
if sys.argv[1] == "fork":
    child = os.fork()
    if child == 0:
        print(check("in the fork"), flush=True)
        os._exit(0)
    os.waitpid(child, 0)
    print(check("after the fork"), flush=True)
if sys.argv[1] == "stay":
    time.sleep(60)
"""


def lonely(how: str) -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, "-W", "ignore", "-c", LONELY, how], stdout=subprocess.PIPE, text=True)


@pytest.mark.parametrize("end", ["leave", "stay"])
def test_the_process_ends_with_the_server_however_that_ends_and_has_none_of_its_sockets(end: str) -> None:
    with lonely(end) as server:
        assert server.stdout is not None
        pid, num_sockets = map(int, server.stdout.readline().split())
        if end == "stay":
            server.kill()
    assert num_sockets == 1
    deadline = time.monotonic() + 20
    while psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_fork_has_a_process_of_its_own() -> None:
    with lonely("fork") as server:
        assert server.stdout is not None
        first, in_fork, after = [int(line.split()[0]) for line in server.stdout.read().splitlines()]
    assert first == after != in_fork


def test_an_answer_at_a_limit_spoils_its_grammar_for_no_later_one(tmp_path: Path) -> None:
    """Copies of a matcher share its lexer, and with it the lexer's error."""
    tokenizer = Tokenizer.from_dir(write_tiny_tokenizer(tmp_path))
    compiler = GrammarCompiler(tokenizer.to_json(), 512, (2,))
    text = json_schema_grammar({"type": "object"})
    assert compiler.compile(text) == ""
    compiler.forget(text)
    assert not compiler.hold(text)
    assert compiler.compile(text) == ""
    assert compiler.hold(text)
    compiler.forget(text)
    compiler.let_go(text)
    assert not compiler.hold(text)


def test_the_limits_are_named() -> None:
    with pytest.raises(RequestError, match="64 levels") as refused:
        json_schema_grammar(chain(100, LINKS["items"]), "response_format")
    assert refused.value.param == "response_format"
    with pytest.raises(RequestError, match="1000 properties"):
        json_schema_grammar(HOSTILE["1,001 properties"])
