"""GrammarGate: requests whose grammar is being compiled, off the loop, before the scheduler gets them. Torch-free."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import threading
from collections import Counter
from dataclasses import dataclass

from tfserve.engine.scheduling.request import Request
from tfserve.plan import Clock, Grammars
from tfserve.types import RequestId, Tenant

logger = logging.getLogger(__name__)

COMPILE_LIMIT_S = 30.0
"""How long one grammar may take. The front has checked it within a few seconds of processor time."""

_MAX_STUCK = 2
"""Most threads that go on with a grammar after its time; each may take a core for as long as the engine lives."""

_STACK_BYTES = 16 * 2**20
"""The library recurses: more than in the process in which the front has it checked."""

_NICENESS = 10
"""How much lower the priority of a compiling thread is than that of threads that run steps."""

_CLOSE_S = 5.0
"""How long `close` waits for the grammar that is being compiled."""


@dataclass(slots=True, eq=False)
class _Job:
    """A grammar that a thread compiles; `problem` is None until it has, and then empty if all is well."""

    grammar: str
    tenant: Tenant
    until_s: float
    problem: str | None = None
    thread: threading.Thread | None = None


class GrammarGate:
    """Lets requests through once their grammar is compiled. One is compiled at a time, in order of arrival.

    A grammar stays held as long as a live request has it, whether that waits here or has been let through; at most
    `max_held` at once, so that their memory has a bound: the next is compiled when one is let go. The next is that of
    the tenant with the fewest held ones; one with none gets its first also beyond `max_held`, up to twice as many, for
    others may never let go of theirs. Everything happens on the loop's thread but the compiling itself, which rings
    `clock`.
    """

    def __init__(
        self, grammars: Grammars, clock: Clock, *, max_held: int, compile_limit_s: float = COMPILE_LIMIT_S
    ) -> None:
        self._grammars = grammars
        self._clock = clock
        self._max_held = max_held
        self._compile_limit_s = compile_limit_s
        self._users: Counter[str] = Counter()  # live requests by grammar
        self._held: dict[str, Tenant] = {}  # with the tenant that it was compiled for
        self._waiting: dict[str, dict[RequestId, Request]] = {}  # by grammar, in order of their first request
        self._job: _Job | None = None
        self._stuck: list[_Job] = []

    @property
    def waiting(self) -> list[Request]:
        """Requests that have not been let through."""
        return [request for requests in self._waiting.values() for request in requests.values()]

    @property
    def num_waiting(self) -> int:
        """How many requests have not been let through."""
        return sum(map(len, self._waiting.values()))

    @property
    def wake_s(self) -> float | None:
        """When to call `poll` even if nothing happens before."""
        return None if self._job is None else self._job.until_s

    def holds_back(self, request: Request) -> bool:
        """Whether a live request has not been let through."""
        return request.id in self._waiting.get(request.params.grammar or "", ())

    def enter(self, request: Request) -> bool:
        """Take note of a new request; True if it may be scheduled at once. `poll` lets the others through."""
        grammar = request.params.grammar
        if grammar is None:
            return True
        self._users[grammar] += 1
        has_room = grammar in self._held or self._has_room(request.tenant, Counter(self._held.values()))
        if has_room and self._grammars.hold(grammar):
            self._held.setdefault(grammar, request.tenant)
            return True
        self._waiting.setdefault(grammar, {})[request.id] = request
        return False

    def leave(self, request: Request) -> bool:
        """A request has ended; True if it had not been let through."""
        grammar = request.params.grammar
        if grammar is None:
            return False
        waiting = self._waiting.get(grammar, {})
        had_waited = waiting.pop(request.id, None) is not None
        if not waiting:
            self._waiting.pop(grammar, None)
        self._users[grammar] -= 1
        if not self._users[grammar]:
            del self._users[grammar]
            if grammar in self._held:
                del self._held[grammar]
                self._grammars.let_go(grammar)
        return had_waited

    def poll(self) -> tuple[list[Request], list[tuple[Request, str]]]:
        """Requests that may be scheduled now, and requests that never may, with the reason; the caller ends the latter.

        Starts on the next grammar when one is done.
        """
        if not self._waiting and self._job is None:
            return [], []
        ready: list[Request] = []
        failed: list[tuple[Request, str]] = []
        if self._job is not None:
            self._end_job(self._job, ready, failed)
        if self._job is None and not failed:
            self._begin_job(failed)
        if failed:
            self._clock.notify()  # by the next call they have left, and the next grammar's turn has come
        return ready, failed

    def close(self) -> None:
        """Wait a while for the grammar that is being compiled: its thread must not outlive the interpreter."""
        until_s = self._clock.now() + _CLOSE_S
        for job in [*self._stuck, *([] if self._job is None else [self._job])]:
            if job.thread is not None:
                job.thread.join(max(0.0, until_s - self._clock.now()))

    def _end_job(self, job: _Job, ready: list[Request], failed: list[tuple[Request, str]]) -> None:
        """See whether the thread has ended, or its time."""
        problem = job.problem
        if problem is None:
            if self._clock.now() < job.until_s:
                return
            problem = f"it was not compiled within {self._compile_limit_s:g} s"
            self._stuck.append(job)
        self._job = None
        requests = list(self._waiting.get(job.grammar, {}).values())
        if problem:
            logger.warning("a grammar of %d characters cannot be compiled: %s", len(job.grammar), problem)
            failed += ((request, _words(problem)) for request in requests)
            return
        self._waiting.pop(job.grammar, None)
        if requests:
            self._held.setdefault(job.grammar, job.tenant)
            ready += requests
        elif job.grammar not in self._held:  # all have been aborted meanwhile
            self._grammars.let_go(job.grammar)

    def _begin_job(self, failed: list[tuple[Request, str]]) -> None:
        """Start on the first grammar that is wanted, if there is room for it."""
        for job in [job for job in self._stuck if job.problem is not None]:
            self._stuck.remove(job)
            if job.grammar not in self._held:
                self._grammars.let_go(job.grammar)
        found = self._next()
        if found is None:
            return
        grammar, tenant = found
        if len(self._stuck) >= _MAX_STUCK or any(job.grammar == grammar for job in self._stuck):
            problem = _words("the server is busy with others that never end")
            failed += ((request, problem) for request in self._waiting[grammar].values())
            return
        self._job = job = _Job(grammar, tenant, self._clock.now() + self._compile_limit_s)
        before = threading.stack_size(_STACK_BYTES)
        try:
            job.thread = threading.Thread(target=self._compile, args=(job,), name="tfserve-grammar", daemon=True)
            job.thread.start()
        except RuntimeError as error:  # the system gives no more threads
            job.problem = str(error)
            self._clock.notify()
        finally:
            threading.stack_size(before)

    def _next(self) -> tuple[str, Tenant] | None:
        """The grammar whose turn it is, and the tenant that it is for; None if there is no room for any."""
        num_held = Counter(self._held.values())
        wanted = {
            (grammar, each.tenant): None for grammar, requests in self._waiting.items() for each in requests.values()
        }
        # One that is held is compiled anew: an answer has broken it.
        allowed = (each for each in wanted if each[0] in self._held or self._has_room(each[1], num_held))
        return min(allowed, key=lambda each: num_held[each[1]], default=None)

    def _has_room(self, tenant: Tenant, num_held: Counter[Tenant]) -> bool:
        return len(self._held) < (self._max_held if num_held[tenant] else 2 * self._max_held)

    def _compile(self, job: _Job) -> None:
        if sys.platform == "linux":  # where a thread has a niceness of its own; elsewhere its id may be a process's
            with contextlib.suppress(OSError):
                thread = threading.get_native_id()
                os.setpriority(os.PRIO_PROCESS, thread, os.getpriority(os.PRIO_PROCESS, thread) + _NICENESS)
        job.problem = self._grammars.compile(job.grammar)
        self._clock.notify()


def _words(problem: str) -> str:
    return f"the grammar or JSON schema cannot be compiled: {problem}. Other requests are not affected; simplify it"
