"""A server process from bind to exit code, with a fake engine."""

from __future__ import annotations

import json
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import msgspec
import pytest

from tests.http.fakes import FakeEngine
from tfserve.config import EngineConfig
from tfserve.http.banner import banner
from tfserve.http.service import Service

Launch = Callable[..., "ServerProcess"]


class ServerProcess:
    """`serve` in a process; `lines` are what it has printed so far."""

    def __init__(self, loader: str, *settings: str, port: int | None = None, launcher: Sequence[str] = ()) -> None:
        self.port = port or free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        program = [*launcher, sys.executable, "-m", "tests.http.serve_fake"]
        args = [*program, loader, f"server.port={self.port}", *settings]
        self.process = subprocess.Popen(args, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        self.lines: list[str] = []

    def wait_until_ready(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.append(line.rstrip())
            if self.lines[-1].endswith("}'"):  # of the curl line
                return
        raise AssertionError(f"the server left: {self.process.communicate()[1]}")

    def get(self, path: str) -> tuple[int, Any]:
        try:
            with urllib.request.urlopen(self.url + path, timeout=5) as response:
                return response.status, json.load(response)
        except urllib.error.HTTPError as error:
            with error:
                return error.code, json.load(error)

    def open_stream(self, prompt: str = "x") -> Any:
        body = json.dumps({"prompt": prompt, "stream": True}).encode()
        return urllib.request.urlopen(urllib.request.Request(self.url + "/v1/completions", body), timeout=10)

    def end(self, timeout_s: float = 10) -> tuple[int, str, str]:
        out, err = self.process.communicate(timeout=timeout_s)
        return self.process.returncode, out, err


@pytest.fixture
def launch(heeded_signals: None) -> Iterator[Launch]:
    servers: list[ServerProcess] = []

    def begin(loader: str, *settings: str, **options: Any) -> ServerProcess:
        servers.append(ServerProcess(loader, *settings, **options))
        return servers[-1]

    yield begin
    for server in servers:
        if server.process.poll() is None:
            server.process.kill()
        server.process.communicate()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_for_answer(server: ServerProcess, path: str) -> None:
    """Until `path` is answered with 200."""
    deadline = time.monotonic() + 10
    while True:
        try:
            if server.get(path)[0] == 200:
                return
        except urllib.error.URLError:
            pass
        assert time.monotonic() < deadline
        time.sleep(0.05)


def last_events(stream: Any) -> list[str]:
    return [line.decode().strip() for line in stream if line.startswith(b"data: ")][-2:]


def test_the_banner_tells_what_is_served_and_ends_with_a_curl_line_that_works(launch: Launch) -> None:
    server = launch("FakeEngine")
    server.wait_until_ready()
    text = "\n".join(server.lines)
    for part in ("tiny", "float32", "cpu", "101 blocks of 32 tokens", "3.2 requests of 1,000", server.url):
        assert part in text
    (begin,) = (index for index, line in enumerate(server.lines) if line.startswith("curl "))
    command = shlex.split("\n".join(server.lines[begin:]).replace("\\\n", " "))
    assert command[:3] == ["curl", "-N", f"{server.url}/v1/chat/completions"]
    body = command[command.index("-d") + 1].encode()
    with urllib.request.urlopen(urllib.request.Request(command[2], body), timeout=5) as response:
        assert response.read().endswith(b"data: [DONE]\n\n")


@pytest.mark.parametrize("policy", ["tokenflow", "fcfs"])
@pytest.mark.parametrize("host", ["http://127.0.0.1:8000", "http://[2001:db8:85a3::8a2e:370:7334]:65535"])
def test_the_banner_is_one_screen_and_names_what_decides(policy: str, host: str) -> None:
    name = "Qwen2.5-72B-Instruct-with-a-longer-name"
    config = EngineConfig(model="m", served_model_name=name, scheduler={"policy": policy}, server={"api_keys": ["k"]})
    info = msgspec.structs.replace(
        FakeEngine(config).info,
        quantization="int8",
        policy=policy,
        num_host_blocks=4096,
        host_tier_reason="four times the device's KV, held down to half of the memory that is free",
        max_num_seqs=1024,
    )
    text = banner(info, Service(config), host)
    assert len(text.splitlines()) <= 24
    assert max(map(len, text.splitlines())) <= 100
    words = " ".join(text.split())
    parts = ["overload: queue", "6 tokens/s"] if policy == "tokenflow" else ["ignores"]
    for part in (f"Page: {host}/ ", f"Policy {policy}", "Host tier: ", *parts):
        assert part in words


def test_where_the_log_is_json_nothing_else_is_printed(launch: Launch) -> None:
    server = launch("FakeEngine", "log_format=json")
    wait_for_answer(server, "/ready")
    server.process.terminate()
    code, out, err = server.end()
    assert (code, out) == (0, "fake engine: shutdown\n")
    assert "try:" in err


def test_health_is_503_while_loading_and_the_port_is_bound(launch: Launch) -> None:
    server = launch("load_slowly")
    deadline = time.monotonic() + 10
    while True:
        try:
            assert server.get("/health") == (503, {"status": "loading"})
            break
        except urllib.error.URLError:
            assert time.monotonic() < deadline
            time.sleep(0.05)
    server.wait_until_ready()
    status, body = server.get("/health")
    assert (status, body["status"], body["engine"]["num_free_blocks"]) == (200, "ready", 76)


def test_a_port_in_use_is_exit_code_2_before_anything_loads(launch: Launch) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        code, out, err = launch("load_slowly", port=port).end()
    assert code == 2
    assert f"server.port: port {port} on 127.0.0.1 is in use" in err
    assert "Loading" not in out
    assert "Traceback" not in err


@pytest.mark.parametrize(
    ("loader", "code", "says"), [("load_badly", 2, "truncated"), ("load_impossible", 2, "device: cuda")]
)
def test_a_model_that_cannot_be_loaded_is_an_exit_code(launch: Launch, loader: str, code: int, says: str) -> None:
    returned, _, err = launch(loader).end()
    assert returned == code
    assert says in err
    assert "Traceback" not in err


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_drains_open_streams_to_their_end(launch: Launch, number: signal.Signals) -> None:
    server = launch("load_chatty")
    server.wait_until_ready()
    with server.open_stream() as stream:
        stream.readline()
        server.process.send_signal(number)
        time.sleep(0.3)
        assert server.get("/ready")[0] == 503
        assert '"finish_reason":"stop"' in (events := last_events(stream))[0]
        assert events[1] == "data: [DONE]"
    code, out, _ = server.end()
    assert code == 0
    assert "fake engine: shutdown" in out


def test_a_server_that_is_to_outlive_its_terminal_does(launch: Launch) -> None:
    server = launch("FakeEngine", launcher=["nohup"])
    server.wait_until_ready()
    server.process.send_signal(signal.SIGHUP)
    server.process.send_signal(signal.SIGHUP)
    time.sleep(0.3)
    assert server.get("/ready")[0] == 200
    server.process.terminate()
    assert server.end()[0] == 0


def test_a_server_goes_on_when_nobody_reads_what_it_prints(launch: Launch) -> None:
    server = launch("load_slowly")
    assert server.process.stdout is not None
    server.process.stdout.close()
    wait_for_answer(server, "/ready")
    server.process.terminate()
    assert server.process.wait(10) == 0
    assert server.process.stderr is not None
    assert "Traceback" not in server.process.stderr.read()


@pytest.mark.skipif(not socket.has_dualstack_ipv6(), reason="this machine has no IPv6")
def test_all_addresses_are_those_of_both_families(launch: Launch) -> None:
    server = launch("FakeEngine", "server.host=::")
    server.wait_until_ready()
    for host in ("127.0.0.1", "[::1]"):
        with urllib.request.urlopen(f"http://{host}:{server.port}/ready", timeout=5) as response:
            assert response.status == 200


@pytest.mark.parametrize("how", ["timeout", "second signal"])
def test_a_drain_that_takes_too_long_aborts_the_rest(launch: Launch, how: str) -> None:
    server = launch("load_chatty", f"server.drain_timeout={0.2 if how == 'timeout' else 60}")
    server.wait_until_ready()
    begun = time.monotonic()
    with server.open_stream() as stream:
        stream.readline()
        server.process.terminate()
        if how == "second signal":
            time.sleep(0.2)
            server.process.terminate()
        events = last_events(stream)
    assert "shutting down" in events[0]
    assert events[1] == "data: [DONE]"
    assert time.monotonic() - begun < 1.5
    assert server.end()[0] == 0


def test_an_idle_server_leaves_at_once(launch: Launch) -> None:
    server = launch("FakeEngine")
    server.wait_until_ready()
    server.process.terminate()
    # Far less than server.drain_timeout, also on a busy machine.
    assert server.end(timeout_s=10)[0] == 0


def test_a_server_told_to_stop_while_loading_loads_and_leaves(launch: Launch) -> None:
    server = launch("load_slowly")
    assert server.process.stdout is not None
    assert server.process.stdout.readline().startswith("Loading")
    server.process.terminate()
    code, out, err = server.end()
    assert (code, out) == (0, "fake engine: shutdown\n")
    assert "Traceback" not in err


def test_a_dead_engine_ends_its_streams_and_the_server(launch: Launch) -> None:
    server = launch("load_mortal")
    server.wait_until_ready()
    begun = time.monotonic()
    seen: list[list[str]] = []

    def read(prompt: str) -> None:
        with server.open_stream(prompt) as stream:
            seen.append(last_events(stream))

    readers = [threading.Thread(target=read, args=(prompt,)) for prompt in ("x", "y", "kill")]
    for reader in readers:
        reader.start()
    for reader in readers:
        reader.join()
    assert len(seen) == 3
    for events in seen:
        assert "killed by signal 9" in events[0]
        assert events[1] == "data: [DONE]"
    status, body = server.get("/health")
    assert status == 503
    assert "killed by signal 9" in body["status"]
    assert server.end()[0] == 1
    assert time.monotonic() - begun < 5


def test_the_http_side_does_not_import_torch() -> None:
    code = "import sys, tfserve.http.server; print(sorted({'torch', 'transformers'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_the_http_side_steps_back_behind_an_engine_process(launch: Launch) -> None:
    niceness = {}
    for mode in ("auto", "off"):
        server = launch("FakeEngine", f"engine_process={mode}")
        server.wait_until_ready()
        with open(f"/proc/{server.process.pid}/stat") as stat:
            niceness[mode] = int(stat.read().rsplit(")", 1)[1].split()[16])
    assert niceness["auto"] >= niceness["off"] + 10 or niceness["auto"] == 19
