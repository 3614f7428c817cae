"""GrammarChecker: checks grammars in a process of its own, so that a crash of the library ends only that process."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import signal
import subprocess
import sys
import threading
import weakref
from collections import OrderedDict, deque
from concurrent.futures import Future
from multiprocessing import Pipe
from multiprocessing.connection import Connection

from tfserve.errors import QueueFullError

logger = logging.getLogger(__name__)

PROCESS_MODULE = "tfserve.model.grammars.process"
"""The module that the process runs; its argument is the file descriptor of its end of the socket pair."""

WALL_LIMIT_S = 20.0
"""Wall-clock limit for a grammar on a busy machine; the process itself limits the processor time."""

MAX_WAITING = 256
"""Most grammars in the queue; each may be as long as MAX_SCHEMA_CHARS."""

_REMEMBERED = 4096
"""Number of cached results: clients repeat grammars, and the engine checks them too."""

_RETRY_AFTER_S = 5.0


_Job = tuple[str, "Future[str]"]


class GrammarChecker:
    """Checks grammars one after the other and caches the results. Safe to use from several threads, and after a fork.

    Owners are served in turn, so that one with many slow grammars does not block the others.

    The process starts with the first grammar. It starts again after it has ended, because the library has crashed or a
    grammar took too long. `module` is the module that it runs, `wall_limit_s` the time limit for a grammar.
    """

    def __init__(self, module: str = PROCESS_MODULE, wall_limit_s: float = WALL_LIMIT_S) -> None:
        self._module = module
        self._wall_limit_s = wall_limit_s
        self._results: OrderedDict[bytes, str] = OrderedDict()  # by digest
        self._lock = threading.Lock()
        self._jobs = _Turns()
        self._thread: threading.Thread | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._conn: Connection | None = None
        reference = weakref.WeakMethod(self._disown)
        os.register_at_fork(after_in_child=lambda: (method := reference()) and method())

    def submit(self, grammar: str, owner: str = "") -> Future[str]:
        """What is wrong with `grammar`, which is valid Unicode; the result is empty if it is valid.

        The result may raise QueueFullError: the machine was too busy for the check, or its process was killed. Raises
        QueueFullError if the queue is full, or if `owner` has filled half of it.
        """
        future: Future[str] = Future()
        if (known := self._known(grammar)) is not None:
            future.set_result(known)
            return future
        with self._lock:
            if len(self._jobs) >= MAX_WAITING or self._jobs.num_of(owner) >= MAX_WAITING / 2:
                raise QueueFullError("too many grammars wait to be checked; try again later", _RETRY_AFTER_S)
            self._jobs.put(owner, (grammar, future))
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name="tfserve-grammar-checks", daemon=True)
                self._thread.start()
        return future

    @property
    def pid(self) -> int | None:
        """The process; None while there is none."""
        return None if self._process is None else self._process.pid

    @property
    def num_waiting(self) -> int:
        """Number of grammars in the queue, without the one that is being checked."""
        return len(self._jobs)

    def close(self) -> None:
        """End the process and the thread, after all queued grammars are checked."""
        with self._lock:
            thread, self._thread = self._thread, None
            if thread is not None:
                self._jobs.end()
        if thread is not None:
            thread.join()

    def _disown(self) -> None:
        """Start anew in a forked child: thread and process belong to the parent."""
        if self._process is not None:
            self._process.returncode = 0  # a child of the parent: this process cannot wait for it
        if self._conn is not None:
            self._conn.close()
        self._lock = threading.Lock()  # at the fork another thread may have held the old lock
        self._jobs = _Turns()
        self._thread = self._process = self._conn = None

    def _known(self, grammar: str) -> str | None:
        key = _digest(grammar)
        with self._lock:
            if key not in self._results:
                return None
            self._results.move_to_end(key)
            return self._results[key]

    def _work(self) -> None:
        jobs = self._jobs
        while (job := jobs.get()) is not None:
            grammar, future = job
            if not future.set_running_or_notify_cancel():
                continue
            try:
                known = self._known(grammar)  # the same grammar was queued twice
                future.set_result(self._check(grammar) if known is None else known)
            except BaseException as error:
                future.set_exception(error)
        with contextlib.suppress(QueueFullError):
            self._end()

    def _check(self, grammar: str) -> str:
        """Ask the process. Raises QueueFullError if it ended by something else, OSError if it cannot start."""
        conn = self._conn or self._start()
        try:
            conn.send_bytes(grammar.encode())
            is_timely = conn.poll(self._wall_limit_s)
            problem = conn.recv_bytes().decode() if is_timely else ""
        except (EOFError, OSError):
            problem = self._end()
            logger.warning("the process that checks grammars has ended at one: %s", problem)
        else:
            if not is_timely:
                self._end()
                raise QueueFullError(f"a grammar was not checked within {self._wall_limit_s:g} s", _RETRY_AFTER_S)
        with self._lock:
            self._results[_digest(grammar)] = problem
            if len(self._results) > _REMEMBERED:
                self._results.popitem(last=False)
        return problem

    def _start(self) -> Connection:
        conn, child_end = Pipe()
        with child_end:
            command = [sys.executable, "-m", self._module, str(child_end.fileno())]
            self._process = subprocess.Popen(command, stdin=subprocess.DEVNULL, pass_fds=(child_end.fileno(),))
        self._conn = conn
        try:
            if not conn.poll(self._wall_limit_s):
                raise QueueFullError("the process that checks grammars does not start; try again", _RETRY_AFTER_S)
            conn.recv_bytes()
        except BaseException:
            self._end()
            raise
        return conn

    def _end(self) -> str:
        """End the process. Returns why it had ended before, as an error. Raises QueueFullError if it was killed."""
        process, conn = self._process, self._conn
        self._process = self._conn = None
        if conn is not None:
            conn.close()
        if process is None:
            return ""
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(0.5)  # it has closed its end, so it is about to exit
        has_ended = process.poll() is not None
        process.kill()
        status = process.wait()
        if not has_ended:
            return ""
        if status == -signal.SIGPROF:
            return "it takes too long to compile; simplify it"
        if status == -signal.SIGKILL:
            raise QueueFullError("the process that checks grammars was killed; try again", _RETRY_AFTER_S)
        return "the grammar library breaks down on it, or needs too much memory; simplify it"


class _Turns:
    """Jobs of several owners, in turn. Safe to use from several threads."""

    def __init__(self) -> None:
        self._waiting: dict[str, deque[_Job]] = {}  # by owner; the next owner is first
        self._changed = threading.Condition()
        self._is_over = False

    def __len__(self) -> int:
        with self._changed:
            return sum(map(len, self._waiting.values()))

    def num_of(self, owner: str) -> int:
        """Number of waiting jobs of an owner."""
        with self._changed:
            return len(self._waiting.get(owner, ()))

    def put(self, owner: str, job: _Job) -> None:
        """Queue a job."""
        with self._changed:
            self._waiting.setdefault(owner, deque()).append(job)
            self._changed.notify()

    def end(self) -> None:
        """Close the queue."""
        with self._changed:
            self._is_over = True
            self._changed.notify()

    def get(self) -> _Job | None:
        """Wait for the next job; None at the end."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._is_over)
            if not self._waiting:
                return None
            owner = next(iter(self._waiting))
            jobs = self._waiting.pop(owner)
            job = jobs.popleft()
            if jobs:
                self._waiting[owner] = jobs
            return job


def _digest(grammar: str) -> bytes:
    return hashlib.blake2b(grammar.encode(), digest_size=20).digest()
