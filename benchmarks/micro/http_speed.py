"""Cost and limit of the HTTP side: `python -m benchmarks.micro.http_speed [--rate 20000] ...`.

The real server (its own process, real tokenizer, real SSE) gets tokens from a process that speaks the engine's
protocol and nothing else: one message per step, a token for each live stream, `--rate` tokens/s in all. The client is a
third process: raw sockets, one epoll loop. Printed: tokens/s delivered, CPU of the server's process per token (user and
system, all threads; CPU time, so that a busy machine does not count), tokens per write, and the latency that the
HTTP side adds: from the moment the engine sends a token to the moment the client has it.

`--slow N` reads N of the streams at `--slow-rate` tokens/s only, and prints the server's memory before, during and
after: unread text must not accumulate. `--profile FILE` runs the server under cProfile by CPU time.

"""

from __future__ import annotations

import argparse
import cProfile
import functools
import json
import os
import re
import selectors
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np
import psutil

from benchmarks.local_server import free_port, running
from tfserve.config import EngineConfig, ServerConfig
from tfserve.engine.engine import Engine
from tfserve.engine.frontend.core_client import ProcessClient
from tfserve.http.server import serve
from tfserve.messages import (
    AbortRequest,
    AddRequest,
    ListStreams,
    Ready,
    Shutdown,
    StepOutputs,
    StreamStates,
    ToCore,
    TokenOutput,
)
from tfserve.types import EngineInfo, EngineStats, FinishReason

TOKEN = "x"
"""Every token is this letter, so that the length of a text is its number of tokens."""

TEXT = re.compile(rb'"text":"(x+)"')


# The null engine.
class NullEngine:
    """Answers every request with `max_tokens` times the same token, one each step; notes when each step was sent."""

    def __init__(self, conn: Connection, token_id: int, rate: float, log: Path) -> None:
        self._conn = conn
        self._token_id = token_id
        self._rate = rate
        self._log = log
        self._inbox: deque[ToCore] = deque()
        self._left: dict[str, int] = {}
        self._sent_s: dict[str, list[float]] = {}
        self._step = 0

    def run(self, num_streams: int) -> None:
        """Begin when `num_streams` requests are there, so that every step is as large as the last."""
        threading.Thread(target=self._listen, daemon=True).start()
        while self._take() and len(self._left) < num_streams:
            time.sleep(0.001)
        begun_s = time.monotonic()
        sent = 0
        while self._take():
            if not self._left:
                self._save()
                time.sleep(0.001)
                continue
            due_s = begun_s + sent / self._rate
            if (wait_s := due_s - time.monotonic()) > 0:
                time.sleep(wait_s)
            sent += len(self._left)
            self._emit()

    def _emit(self) -> None:
        now_s = time.monotonic()
        outputs = []
        for req, left in list(self._left.items()):
            last = left == 1
            outputs.append(TokenOutput(req, [self._token_id], finish_reason=FinishReason.LENGTH if last else None))
            self._sent_s[req].append(now_s)
            if last:
                del self._left[req]
            else:
                self._left[req] = left - 1
        self._step += 1
        self._send(StepOutputs(outputs, self._stats()))

    def _take(self) -> bool:
        while self._inbox:
            match self._inbox.popleft():
                case AddRequest() as added:
                    for request_id in added.request_ids:
                        self._left[request_id] = added.params.max_tokens or 1
                        self._sent_s[request_id] = []
                case AbortRequest(req):
                    if self._left.pop(req, None):
                        self._send(StepOutputs([TokenOutput(req, finish_reason=FinishReason.ABORT)], self._stats()))
                case ListStreams(query):
                    self._send(StreamStates(query, []))
                case Shutdown():
                    return False
        return True

    def _listen(self) -> None:
        decoder = msgspec.msgpack.Decoder(ToCore)
        try:
            while True:
                self._inbox.append(decoder.decode(self._conn.recv_bytes()))
        except (EOFError, OSError):
            os._exit(0)

    def _send(self, message: Any) -> None:
        self._conn.send_bytes(msgspec.msgpack.encode(message))

    def _save(self) -> None:
        if self._sent_s:
            self._log.write_text(json.dumps(next(iter(self._sent_s.values()))))
            self._sent_s = {}

    def _stats(self) -> EngineStats:
        return EngineStats(
            now_s=time.monotonic(),
            step=self._step,
            num_waiting=0,
            num_running=len(self._left),
            num_blocks=2,
            num_free_blocks=1,
            block_size=1,
            num_preemptions=0,
            num_prompt_tokens=0,
            num_output_tokens=0,
            num_finished=0,
        )


def run_null_engine(fd: int) -> None:
    """The process behind the protocol."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    conn = Connection(fd)
    config = msgspec.msgpack.decode(conn.recv_bytes(), type=EngineConfig)
    info = EngineInfo(
        model="null",
        architecture="none",
        num_parameters=0,
        dtype="none",
        quantization=None,
        device="cpu",
        attention_backend="none",
        policy=config.scheduler.policy,
        max_model_len=1_000_000,
        max_num_seqs=config.max_num_seqs,
        max_num_batched_tokens=1,
        vocab_size=1_000_000,
        block_size=1,
        num_blocks=2,
        kv_bytes_per_token=0,
        threads=1,
        load_s=0.0,
    )
    conn.send_bytes(msgspec.msgpack.encode(Ready(info)))
    asked = json.loads(os.environ["HTTP_SPEED"])
    NullEngine(conn, asked["token_id"], asked["rate"], Path(asked["log"])).run(config.max_num_seqs)


# The server.
def run_server(args: argparse.Namespace) -> int:
    """The real server on the null engine."""
    config = EngineConfig(
        model=args.model,
        max_num_seqs=args.streams,
        server=ServerConfig(port=args.port, max_queued_requests=100_000),
    )
    if not args.profile:
        return serve(config, _load)
    profile = cProfile.Profile(time.process_time)
    code = profile.runcall(serve, config, _load)
    profile.dump_stats(args.profile)
    return code


def _load(config: EngineConfig) -> Engine:
    connect = functools.partial(ProcessClient, module="benchmarks.micro.http_speed_engine")
    return Engine(config, connect)


# The client.
class Reader:
    """One connection: sends a request, then records the number and time of tokens."""

    def __init__(self, address: tuple[str, int], body: bytes, slow_rate: float | None) -> None:
        self.sock = socket.socket()
        if slow_rate is not None:
            self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        self.sock.connect(address)
        self.tokens = 0
        self.writes = 0
        self.at: list[tuple[float, int]] = []
        self.done = False
        self.slow_rate = slow_rate
        self._rest = b""
        head = f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n".encode()
        self.sock.sendall(head + body)
        self.sock.setblocking(False)

    def read(self, most: int = 65536) -> None:
        """Read all available bytes."""
        try:
            data = self.sock.recv(most)
        except BlockingIOError:
            return
        now_s = time.monotonic()
        data = self._rest + data
        # A text cut in two is counted when its end arrives.
        cut = data.rfind(b"\n") + 1
        whole, self._rest = data[:cut], data[cut:]
        found = TEXT.findall(whole)
        if found:
            count = sum(map(len, found))
            self.writes += len(found)
            self.tokens += count
            self.at.append((now_s, count))
        if b"[DONE]" in whole or not data:
            self.done = True


def run_client(args: argparse.Namespace) -> int:
    """Read all streams; one line of JSON with every token's time of arrival."""
    body = {"prompt": [1], "stream": True, "max_tokens": args.tokens, "ignore_eos": True, "consumption_rate": None}
    raw = json.dumps(body).encode()
    readers = [
        Reader(("127.0.0.1", args.port), raw, args.slow_rate if i < args.slow else None) for i in range(args.streams)
    ]
    selector = selectors.DefaultSelector()
    for reader in readers:
        if reader.slow_rate is None:
            selector.register(reader.sock, selectors.EVENT_READ, reader)
    slow = [reader for reader in readers if reader.slow_rate is not None]
    begun_s = time.monotonic()
    while any(not reader.done for reader in readers if reader.slow_rate is None):
        for key, _ in selector.select(0.5):
            key.data.read()
            if key.data.done:
                selector.unregister(key.data.sock)
        _read_slowly(slow, begun_s)
    deadline_s = time.monotonic() + args.linger
    while slow and time.monotonic() < deadline_s:
        _read_slowly(slow, begun_s)
        time.sleep(0.05)
    fast = [reader for reader in readers if reader.slow_rate is None]
    result = {
        "arrived": [[at for at, count in reader.at for _ in range(count)] for reader in fast],
        "writes": sum(reader.writes for reader in fast),
        "slow_tokens": sum(reader.tokens for reader in slow),
        "cpu_s": time.process_time(),
    }
    print(json.dumps(result))
    return 0


def _read_slowly(readers: list[Reader], begun_s: float) -> None:
    """Each reader reads what its rate allows by now; an event has about 250 bytes."""
    now_s = time.monotonic()
    for reader in readers:
        assert reader.slow_rate is not None
        if reader.tokens < reader.slow_rate * (now_s - begun_s):
            reader.read(256)


# All of it.
class Cpu(NamedTuple):
    """CPU seconds of the server's process, of all its threads."""

    user_s: float
    system_s: float


def measure(args: argparse.Namespace, rate: float) -> None:
    """One run; prints one line, and memory where there are slow readers."""
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "sent.json"
        asked = {"token_id": args.token_id, "rate": rate, "log": str(log)}
        command = [sys.executable, "-m", "benchmarks.micro.http_speed"]
        shared = ["--port", str(args.port), "--streams", str(args.streams), "--model", args.model]
        profile = ["--profile", args.profile] if args.profile else []
        with running(
            [*command, "--server", *shared, *profile],
            f"http://127.0.0.1:{args.port}",
            "/health",
            env={**os.environ, "HTTP_SPEED": json.dumps(asked)},
        ) as server:
            process = psutil.Process(server.process.pid)
            rss = [process.memory_info().rss]
            cpu_before = process.cpu_times()
            tokens = max(2, int(rate * args.seconds / args.streams))
            limits = ["--tokens", str(tokens), "--slow", str(args.slow), "--slow-rate", str(args.slow_rate)]
            client = subprocess.Popen(
                [*command, "--client", *shared, *limits, "--linger", str(args.linger)],
                stdout=subprocess.PIPE,
                text=True,
            )
            peak = rss[0]
            while client.poll() is None and not _is_readable(client):
                peak = max(peak, process.memory_info().rss)
                time.sleep(0.2)
            output = client.communicate()[0]
            if client.returncode:
                raise SystemExit(f"the client ended with {client.returncode}")
            cpu_after = process.cpu_times()
            rss.append(process.memory_info().rss)
        result = json.loads(output)
        sent = json.loads(log.read_text())
    cpu = Cpu(cpu_after.user - cpu_before.user, cpu_after.system - cpu_before.system)
    report(args, rate, result, sent, cpu)
    if args.slow:
        sizes = [f"{value / 2**20:.1f}" for value in (rss[0], peak, rss[1])]
        print(f"    server memory before, at most, after: {', '.join(sizes)} MiB; {args.slow} readers read "
              f"{result['slow_tokens']} of {tokens * args.slow} tokens")  # fmt: skip


def _is_readable(process: subprocess.Popen[str]) -> bool:
    assert process.stdout is not None
    with selectors.DefaultSelector() as selector:
        selector.register(process.stdout, selectors.EVENT_READ)
        return bool(selector.select(0))


def report(args: argparse.Namespace, rate: float, result: dict[str, Any], sent: list[float], cpu: Cpu) -> None:
    """One line of numbers. All streams get their k-th token in the same step, sent at `sent[k]`."""
    arrived = [np.array(stream) for stream in result["arrived"]]
    delivered = sum(map(len, arrived))
    if not delivered:
        raise SystemExit("nothing was delivered")
    num_sent = len(sent) * args.streams
    span_s = max(stream[-1] for stream in arrived) - sent[0]
    late_ms = np.concatenate([stream - np.array(sent[: len(stream)]) for stream in arrived]) * 1e3
    p50, p99 = np.percentile(late_ms, [50, 99])
    print(
        f"{rate:8.0f} tokens/s asked of {args.streams} streams: {delivered / span_s:8.0f} delivered"
        f", {delivered / result['writes']:.2f} tokens/event;"
        f" server CPU {(cpu.user_s + cpu.system_s) / num_sent * 1e6:.1f} us/token"
        f" ({cpu.system_s / num_sent * 1e6:.1f} of it in the kernel);"
        f" added latency P50 {p50:.1f} P99 {p99:.1f} max {late_ms.max():.1f} ms;"
        f" client CPU {result['cpu_s'] / delivered * 1e6:.1f} us/token",
        flush=True,
    )


def _token_id(model: str) -> tuple[str, int]:
    from tfserve.model.loading.hub import resolve_model
    from tfserve.model.text.tokenizer import Tokenizer

    path = resolve_model(model)
    ids = Tokenizer.from_dir(path).encode(TOKEN, add_special_tokens=False)
    if len(ids) != 1:
        raise SystemExit(f"{TOKEN!r} is not one token of {model}")
    return str(path), ids[0]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo", help="whose tokenizer to use")
    parser.add_argument("--rate", type=float, nargs="+", default=[5000, 10000, 20000, 40000])
    parser.add_argument("--streams", type=int, default=256)
    parser.add_argument("--seconds", type=float, default=8.0)
    parser.add_argument("--slow", type=int, default=0)
    parser.add_argument("--slow-rate", type=float, default=5.0)
    parser.add_argument("--linger", type=float, default=0.0, help="seconds to go on reading slowly after the others")
    parser.add_argument("--port", type=int, default=0, help="default: any free one")
    parser.add_argument("--profile")
    parser.add_argument("--tokens", type=int, default=1, help=argparse.SUPPRESS)
    parser.add_argument("--server", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--client", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.server:
        return run_server(args)
    if args.client:
        return run_client(args)
    args.model, args.token_id = _token_id(args.model)
    args.port = args.port or free_port()
    for rate in args.rate:
        measure(args, rate)
    return 0


if __name__ == "__main__":
    sys.exit(main())
