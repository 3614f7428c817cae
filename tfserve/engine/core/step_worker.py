"""StepWorker: launches steps on its own thread, while the loop plans the next step. Torch-free."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from queue import SimpleQueue
from typing import ParamSpec, TypeVar

from tfserve.plan import InFlight, Runner, StepPlan, StepResult

P = ParamSpec("P")
T = TypeVar("T")


class StepWorker:
    """A plan.Runner that calls another runner's `launch`, which may take long, on its own thread.

    Its own `launch` returns at once. `result` waits on the thread that calls it.

    All torch work must run on this one thread, the loading of the model included (use `call`). Torch on a CPU keeps a
    set of OpenMP threads for every thread that computes. With more threads than cores they stop spinning, and every
    step takes 1.5 times as long. The thread is a daemon, so that a program can end without a shutdown of its engine; an
    executor's thread would be joined at exit.
    """

    def __init__(self) -> None:
        self._runner: Runner | None = None
        self._jobs: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._work, name="tfserve-steps", daemon=True)
        self._thread.start()

    def call(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Run a function on the thread and wait for it. Returns its result, or raises its exception."""
        return self._submit(functools.partial(function, *args, **kwargs)).result()

    def serve(self, runner: Runner) -> None:
        """Launch on this runner from now on."""
        self._runner = runner

    def launch(self, plan: StepPlan) -> InFlight:
        """Queue a step behind those before it."""
        return QueuedStep(self._submit(functools.partial(self._launch, plan)))

    def close(self) -> None:
        """Wait for the steps that are queued and end the thread."""
        self._jobs.put(None)
        self._thread.join()
        if self._runner is not None:
            self._runner.close()

    def _submit(self, job: Callable[[], T]) -> Future[T]:
        future: Future[T] = Future()

        def run() -> None:
            try:
                future.set_result(job())
            except BaseException as error:
                future.set_exception(error)

        self._jobs.put(run)
        return future

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            job()

    def _launch(self, plan: StepPlan) -> InFlight:
        if self._runner is None:
            raise RuntimeError("the StepWorker has no runner to launch on")
        return self._runner.launch(plan)


@dataclass(frozen=True, slots=True)
class QueuedStep:
    """A step that the thread launches, or has launched."""

    launched: Future[InFlight]

    def result(self) -> StepResult:
        """Wait for the step. Returns its result, or raises its exception."""
        return self.launched.result().result()
