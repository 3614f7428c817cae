"""Effect of hostile requests on other streams: `python -m benchmarks.attack.run [--root DIR] [NAME...]`.

Starts the server of the checkout DIR, so that two states of the code can be compared. A probe, a process of its own,
reads one stream and notes the arrival times. Each attack (benchmarks/attack/attacks) also runs in its own process.
Printed for each: the probe's worst gap in the quiet seconds before, and from the attack until two seconds after it; the
slowest /health (which does not involve the engine); the memory of the front and of the engine (before/most/after); the
time of the answer, and the answer. `--list` prints the names of the attacks.

`--model tiny` (the default) is a small model with random weights and the demo model's tokenizer; its steps of a few
milliseconds show delays of the server itself. `--model demo`, or a model's directory, uses a real model.
"""

from __future__ import annotations

import argparse
import http.client
import json
import multiprocessing
import os
import selectors
import shutil
import socket
import sys
import tempfile
import threading
import time
import urllib.parse
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import psutil

from benchmarks.attack.attacks import PATIENCE_S, Target, attacks
from benchmarks.local_server import free_port, running

QUIET_S = 3.0
AFTER_S = 2.0
"""Seconds of measurement before and after each attack."""

SETTINGS = {
    "scheduler.policy": "fcfs-chunked",  # never pauses a stream for another one: gaps are then delays of the server
    "max-num-seqs": "16",
    "kv-cache-gib": "0.5",
    "threads": "1",
}
"""The server's settings, unless the attack or the command line overrides them."""

PROBE = {"prompt": "Tell me everything:", "stream": True, "ignore_eos": True, "max_tokens": 8000, "temperature": 0}


# The tiny model.
def write_tiny_model(folder: Path) -> Path:
    """A Llama of a few million random weights with the demo model's tokenizer, and a chat template that shows tools."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from tests.http.tool_templates import QWEN25
    from tfserve.model.loading.demo import prepare_demo_model

    config = LlamaConfig(
        vocab_size=49152,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=8192,
        bos_token_id=1,
        eos_token_id=2,
        tie_word_embeddings=True,
    )
    torch.manual_seed(1)
    LlamaForCausalLM(config).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(prepare_demo_model() / name, folder)
    (folder / "chat_template.jinja").write_text(QWEN25)
    return folder


# The probe.
def probe(url: str, model: str, pipe: Connection) -> None:
    """Read one stream after the other. Answer each message on `pipe` with the worst gap since, in seconds.

    The message True asks for a new stream first, and is answered at its first token: after a stream that ends during
    an attack, the next one waits for a place like any other request, which is no gap.
    """
    parts = urllib.parse.urlsplit(url)
    address = (parts.hostname or "", parts.port or 80)
    body = json.dumps({"model": model, **PROBE}).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: {parts.netloc}\r\nContent-Type: application/json\r\n"
    request = f"{head}Connection: close\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body
    selector = selectors.DefaultSelector()
    selector.register(pipe, selectors.EVENT_READ)
    stream: socket.socket | None = None
    last_s, worst_s = time.monotonic(), 0.0
    is_asked = False
    while True:
        if stream is None:
            with suppress(OSError):
                stream = socket.create_connection(address, timeout=1)
                stream.sendall(request)
                selector.register(stream, selectors.EVENT_READ)
        for key, _ in selector.select(0.05):
            if key.fileobj is pipe:
                try:
                    is_asked = pipe.recv()
                except EOFError:
                    return
                if is_asked:
                    _end(selector, stream)
                    stream = None
                    break
                pipe.send(max(worst_s, time.monotonic() - last_s))
                worst_s = 0.0
            elif stream is not None:
                data = b""
                with suppress(OSError):
                    data = stream.recv(1 << 16)
                if b"data: {" in data and b'"error"' not in data:
                    now_s = time.monotonic()
                    worst_s, last_s = max(worst_s, now_s - last_s), now_s
                    if is_asked:
                        pipe.send(0.0)
                        worst_s, is_asked = 0.0, False
                if not data:
                    _end(selector, stream)
                    stream = None


def _end(selector: selectors.BaseSelector, stream: socket.socket | None) -> None:
    if stream is not None:
        selector.unregister(stream)
        stream.close()


# The attacker.
def attack(name: str, target: Target, pipe: Connection) -> None:
    """Prepare the attack, report ready, wait for the start message, attack, and report the result.

    Its own work takes only time that the server leaves over: a client has a machine of its own.
    """
    os.nice(19)
    run = attacks()[name].prepare(target)
    pipe.send(None)
    pipe.recv()
    pipe.send(run())


# The watcher.
class Watch:
    """Polls /health and the processes' memory in a thread, until it is stopped."""

    def __init__(self, target: Target) -> None:
        self.slowest_s = 0.0
        self.peak = memory(target)
        self._target = target
        self._host = urllib.parse.urlsplit(target.url).netloc
        self._over = threading.Event()
        self._threads = [threading.Thread(target=watch) for watch in (self._watch_health, self._watch_memory)]
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        self._over.set()
        for thread in self._threads:
            thread.join()

    def _watch_health(self) -> None:
        while not self._over.wait(0.02):
            begin_s = time.monotonic()
            connection = http.client.HTTPConnection(self._host, timeout=60)
            try:
                connection.request("GET", "/health")
                connection.getresponse().read()
            except (OSError, http.client.HTTPException):
                self.slowest_s = float("inf")
            finally:
                connection.close()
            self.slowest_s = max(self.slowest_s, time.monotonic() - begin_s)

    def _watch_memory(self) -> None:
        while not self._over.wait(0.02):
            self.peak = tuple(map(max, self.peak, memory(self._target)))


def memory(target: Target) -> tuple[float, ...]:
    """MB of the front and of the engine; 0 for a process that has ended."""
    found = []
    for pid in (target.front_pid, target.engine_pid):
        try:
            found.append(psutil.Process(pid).memory_info().rss / 1e6)
        except psutil.Error:
            found.append(0.0)
    return tuple(found)


# The run.
class Outcome(NamedTuple):
    quiet_s: float
    gap_s: float
    health_s: float
    before: tuple[float, ...]
    peak: tuple[float, ...]
    after: tuple[float, ...]
    took_s: float
    answer: str

    def row(self, name: str) -> str:
        front, engine = zip(self.before, self.peak, self.after, strict=True)
        sizes = " ".join("/".join(f"{size:.0f}" for size in one).rjust(16) for one in (front, engine))
        times = f"{self.quiet_s * 1e3:7.0f} {self.gap_s * 1e3:8.0f} {self.health_s * 1e3:8.0f}"
        return f"{name:<26} {times} {sizes} {self.took_s:7.1f}  {self.answer}"


HEADER = (
    f"{'attack':<26} {'quiet':>7} {'gap ms':>8} {'health':>8} {'front MB':>16} {'engine MB':>16} {'took s':>7}  answer"
)


@contextmanager
def served(root: Path, model: str, settings: Mapping[str, str]) -> Iterator[tuple[Target, Connection]]:
    """The server of a checkout, with the probe that reads a stream of it."""
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    words = [word for key, value in {**SETTINGS, **settings}.items() for word in (f"--{key}", value)]
    command = [sys.executable, "-m", "tfserve.cli", "serve", model, "--server.port", str(port), *words]
    env = {**os.environ, "PYTHONPATH": str(root), "PYTHONSAFEPATH": "1"}
    with running(command, url, "/ready", env=env) as server:
        (engine,) = psutil.Process(server.process.pid).children()
        target = Target(url, os.path.basename(os.path.abspath(model)), server.process.pid, engine.pid)
        ours, theirs = multiprocessing.get_context("spawn").Pipe()
        with ours:
            args = (url, target.model, theirs)
            child = multiprocessing.get_context("spawn").Process(target=probe, args=args, daemon=True)
            child.start()
            theirs.close()
            time.sleep(2.0)
            yield target, ours
        child.join()


def worst_gap_s(pipe: Connection, *, is_new: bool = False) -> float:
    """The probe's worst gap since the last call; with `is_new`, the probe begins a new stream."""
    pipe.send(is_new)
    answer: float = pipe.recv()
    return answer


def measure(name: str, target: Target, pipe: Connection) -> Outcome:
    """Measure one attack, with the quiet times before and after it."""
    ours, theirs = multiprocessing.get_context("spawn").Pipe()
    attacker = multiprocessing.get_context("spawn").Process(target=attack, args=(name, target, theirs), daemon=True)
    attacker.start()
    ours.recv()
    time.sleep(0.5)
    worst_gap_s(pipe, is_new=True)
    time.sleep(QUIET_S)
    quiet_s, before = worst_gap_s(pipe), memory(target)
    watch = Watch(target)
    begin_s = time.monotonic()
    ours.send(None)
    answer = ours.recv() if ours.poll(2 * PATIENCE_S) else "the attack does not end"
    took_s = time.monotonic() - begin_s
    time.sleep(AFTER_S)
    gap_s, after = worst_gap_s(pipe), memory(target)
    watch.stop()
    attacker.terminate()
    attacker.join()
    return Outcome(quiet_s, gap_s, watch.slowest_s, before, watch.peak, after, took_s, answer)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="attacks, or beginnings of their names; all if there are none")
    parser.add_argument("--root", type=Path, default=Path(__file__).parents[2], help="the checkout that serves")
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="a setting of the server")
    parser.add_argument("--fresh", action="store_true", help="a new server for every attack")
    parser.add_argument("--list", action="store_true", help="print the names and end")
    args = parser.parse_args()
    table = attacks()
    names = [name for name in table if not args.names or any(map(name.startswith, args.names))]
    if not names:
        parser.error(f"no attack's name begins with {' or '.join(args.names)}; --list prints them")
    if args.list:
        print("\n".join(names))
        return
    wished: dict[str, str] = dict(setting.split("=", 1) for setting in args.set)
    with tempfile.TemporaryDirectory() as folder:
        model = str(write_tiny_model(Path(folder) / "tiny")) if args.model == "tiny" else args.model
        print(HEADER, flush=True)
        while names:
            settings: dict[str, Any] = {**table[names[0]].settings, **wished}
            with served(args.root.resolve(), model, settings) as (target, pipe):
                while names and {**table[names[0]].settings, **wished} == settings:
                    name = names.pop(0)
                    print(measure(name, target, pipe).row(name), flush=True)
                    if args.fresh or not all(memory(target)):
                        break


if __name__ == "__main__":
    main()
