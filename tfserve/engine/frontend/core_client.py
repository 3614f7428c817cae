"""Clients of the core, which runs in a thread of this process or in its own process: one protocol. Torch-free."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import Future
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from typing import Protocol

import msgspec

from tfserve.config import EngineConfig
from tfserve.engine.core.loop import Inbox
from tfserve.engine.frontend.lifetime import close_at_exit, disown_in_fork
from tfserve.engine.frontend.outbox import Outbox
from tfserve.errors import ConfigError, EngineDeadError, ModelError, TfserveError, panics_as_errors
from tfserve.messages import AbortRequest, Failed, Ready, Shutdown, StepOutputs, StreamStates, ToCore, ToFront
from tfserve.types import EngineInfo

logger = logging.getLogger(__name__)

Deliver = Callable[[StepOutputs | StreamStates], None]
OnDeath = Callable[[str], None]

CORE_MODULE = "tfserve.engine.core.process"
"""The module that the core's process runs; its argument is the file descriptor of its end of the socket pair."""

ENVIRONMENT = dict.fromkeys(("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"), "100")
"""Environment of a core's process; values that are set already win. oneDNN, and torch's layer over it, keep a kernel of
half a MB for each shape of linear layer and batch size. 100 are enough for 20 batch sizes; their default is 1,024, and
then an engine that has seen 256 lengths of prompts is 0.4 GB larger. Rebuilding the kernels of one batch size takes
about 5 ms (measured with SmolLM2-135M in float32).
"""


class Connect(Protocol):
    """Starts a core and returns its client."""

    def __call__(self, config: EngineConfig, deliver: Deliver, on_death: OnDeath) -> CoreClient:
        """Wait until the core is ready. Raises ConfigError or ModelError."""
        ...


class CoreClient(Protocol):
    """A running core. `deliver` and `on_death` (given at construction) are called from a thread of the client."""

    info: EngineInfo

    @property
    def is_full(self) -> bool:
        """True while too many messages wait for the core: then only aborts are accepted."""
        ...

    def send(self, message: ToCore, patience_s: float | None = 0.0) -> None:
        """Queue a message, in order, also if the core does not read at the moment.

        A message that starts or queries something may wait for room for `patience_s` (None: without limit).
        Raises EngineStalledError if there is no room by then, EngineDeadError if the core has ended.
        """
        ...

    def close(self, timeout_s: float) -> None:
        """Abort all requests and end the core; returns when it has ended."""
        ...


def connect(config: EngineConfig, deliver: Deliver, on_death: OnDeath) -> CoreClient:
    """Start a core as `config.engine_process` says and wait until it is ready. Raises ConfigError or ModelError."""
    if config.engine_process == "on":
        return ProcessClient(config, deliver, on_death)
    return ThreadClient(config, deliver, on_death)


class ThreadClient:
    """The core in a daemon thread: nothing is encoded, `deliver` runs in the core's thread.

    The model is loaded in that thread too. Torch on a CPU keeps a set of OpenMP threads for every thread that computes.
    With more threads than cores they stop spinning, and every step takes 1.5 times as long.
    """

    def __init__(self, config: EngineConfig, deliver: Deliver, on_death: OnDeath) -> None:
        self._on_death = on_death
        self._closing = False
        self._inbox: Inbox | None = None
        started: Future[EngineInfo] = Future()
        args = (config, deliver, started)
        self._thread = threading.Thread(target=self._run, args=args, name="tfserve-core", daemon=True)
        close_at_exit(self)
        try:
            self._thread.start()
            self.info = started.result()
        except BaseException:  # also on Ctrl-C; the thread then ends once the model is loaded
            self._ask_to_end()
            raise

    @property
    def is_full(self) -> bool:
        """See CoreClient. Never: waiting messages are objects of this process."""
        return False

    def send(self, message: ToCore, patience_s: float | None = 0.0) -> None:  # noqa: ARG002 - there is always room
        """See CoreClient."""
        if self._inbox is None or not self._thread.is_alive():
            raise EngineDeadError("the engine thread has ended")
        self._inbox.put(message)

    def close(self, timeout_s: float) -> None:
        """See CoreClient. A thread cannot be killed: one still in a step after the timeout is left to finish."""
        self._ask_to_end()
        # The interpreter may finalize an Engine in any thread.
        if self._thread.is_alive() and threading.current_thread() is not self._thread:
            self._thread.join(timeout_s)

    def _ask_to_end(self) -> None:
        self._closing = True
        if self._inbox is not None:
            self._inbox.put(Shutdown())

    def _run(self, config: EngineConfig, deliver: Deliver, started: Future[EngineInfo]) -> None:
        try:
            with panics_as_errors("loading the model"):
                # The only place where the front's process imports torch.
                from tfserve.engine.core.build import build_core

                core, info = build_core(config, deliver)
        except BaseException as error:
            started.set_exception(error)
            return
        self._inbox = core.inbox
        if self._closing:
            core.inbox.put(Shutdown())
        started.set_result(info)
        reason = "the engine loop ended unasked"
        try:
            core.run()
        except BaseException as error:  # whatever ends this thread, the streams must hear of it
            logger.exception("the engine loop failed")
            reason = f"the engine loop failed: {type(error).__name__}: {error}"
        if not self._closing:
            self._on_death(reason)
        core.close()


class ProcessClient:
    """The core in its own process, behind a socket pair. When one end closes, the process at the other end ends.

    The child is started by subprocess, not by multiprocessing: user scripts need no __main__ guard, and the front does
    not import torch.
    """

    def __init__(self, config: EngineConfig, deliver: Deliver, on_death: OnDeath, module: str = CORE_MODULE) -> None:
        self._deliver = deliver
        self._on_death = on_death
        self._closing = False
        self._conn, child_end = Pipe()
        environment = {**ENVIRONMENT, **os.environ}
        if config.threads is not None:
            environment["OMP_NUM_THREADS"] = str(config.threads)
        with child_end:
            self._process = subprocess.Popen(
                [sys.executable, "-m", module, str(child_end.fileno())],
                stdin=subprocess.DEVNULL,
                pass_fds=(child_end.fileno(),),
                env=environment,
            )
        try:
            self._conn.send_bytes(msgspec.msgpack.encode(config))
            self.info = self._await_ready()
        except BaseException:
            self._process.kill()
            self._process.wait()
            self._conn.close()
            raise
        self._outbox = Outbox(self._conn)
        self._reader = threading.Thread(target=self._read, name="tfserve-engine-reader", daemon=True)
        self._reader.start()
        disown_in_fork(self)

    @property
    def pid(self) -> int:
        """The core's process id."""
        return self._process.pid

    @property
    def is_full(self) -> bool:
        """See CoreClient."""
        return self._outbox.is_full

    def send(self, message: ToCore, patience_s: float | None = 0.0) -> None:
        """See CoreClient."""
        frame = msgspec.msgpack.encode(message)
        if isinstance(message, AbortRequest | Shutdown):
            # A request is aborted a few times at most, so aborts need no limit; and they free room.
            self._outbox.put(frame)
        else:
            self._outbox.put_in_turn(frame, patience_s)

    def close(self, timeout_s: float) -> None:
        """See CoreClient. A process that does not end in time is killed."""
        self._closing = True
        try:
            self.send(Shutdown())
            self._process.wait(timeout_s)
        except (EngineDeadError, subprocess.TimeoutExpired):
            self._process.kill()
        self._process.wait()
        self._outbox.close(timeout_s)
        if threading.current_thread() is not self._reader:  # the interpreter may finalize an Engine in any thread
            self._reader.join(timeout_s)
        self._conn.close()

    def disown(self) -> None:
        """In a forked child, close the socket: the core must see it closed when the parent ends."""
        self._conn.close()
        # The core is a child of the parent: this process cannot wait for it.
        self._process.returncode = 0

    def _await_ready(self) -> EngineInfo:
        try:
            message = receive(self._conn)
        except EOFError:
            raise EngineDeadError(f"the engine process ended while loading: {self._exit_status()}") from None
        match message:
            case Ready():
                return message.info
            case Failed():
                self._process.wait()
                raise _startup_error(message)
        raise AssertionError(f"unexpected first message {message!r}")

    def _read(self) -> None:
        try:
            reason = self._deliver_all()
        except BaseException as error:  # whatever ends this thread, the streams must hear of it
            logger.exception("the engine's outputs cannot be read")
            reason = f"the engine's outputs cannot be read: {type(error).__name__}: {error}"
            # Without a reader the request would run on; abort it.
            self._process.kill()
        if not self._closing:
            self._on_death(reason)

    def _deliver_all(self) -> str:
        """Deliver outputs until the core ends. Returns the reason for its end."""
        while True:
            try:
                message = receive(self._conn)
            except (EOFError, OSError):
                return f"the engine process died: {self._exit_status()}"
            match message:
                case StepOutputs() | StreamStates():
                    self._deliver(message)
                case Failed():
                    return f"the engine failed: {message.message}"

    def _exit_status(self) -> str:
        code = self._process.wait()
        return f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"


_decoder = msgspec.msgpack.Decoder(ToFront)


def receive(conn: Connection) -> ToFront:
    """The next message of a core. Raises EOFError when the core has ended."""
    message: ToFront = _decoder.decode(conn.recv_bytes())
    return message


def _startup_error(failed: Failed) -> TfserveError:
    if failed.key is not None:
        return ConfigError(failed.key, failed.message)
    if failed.exit_code == ModelError.exit_code:
        return ModelError(failed.message)
    return EngineDeadError(f"the engine process failed while loading: {failed.message}")
