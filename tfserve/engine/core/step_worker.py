"""StepWorker: launches steps on a thread of its own, so that the next one is planned meanwhile. Torch-free."""

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
    """plan.Runner around another, whose `launch` may take long: because it computes, or because it prepares a device.

    This one's returns at once. Results are read, and waited for, on the thread that asks for them.

    Everything that computes with torch must happen on the one thread, loading the model included (use `call`): torch on
    a CPU keeps OpenMP threads for every thread that computes, and with more threads than cores none of them spins,
    which makes every step 1.5 times as long. The thread is a daemon: a program that leaves without shutting its engine
    down need not wait for it (an executor's would be waited for, and fail the loop's next launch meanwhile).
    """

    def __init__(self) -> None:
        self._runner: Runner | None = None
        self._jobs: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._work, name="tfserve-steps", daemon=True)
        self._thread.start()

    def call(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Run a function on the thread; wait for what it returns, or raise what it raises."""
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
        """What the step produced; waits for it, and raises what it raised."""
        return self.launched.result().result()
