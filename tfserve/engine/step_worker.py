"""StepWorker: launches steps on a thread of its own, so that the next one is planned meanwhile. Torch-free."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import ParamSpec, TypeVar

from tfserve.plan import Fence, InFlight, Runner, StepPlan, StepResult

P = ParamSpec("P")
T = TypeVar("T")


class StepWorker:
    """plan.Runner around another, whose `launch` may take long: because it computes, or because it prepares a device.

    This one's returns at once. Results are read, and waited for, on the thread that asks for them.

    Everything that computes with torch must happen on the one thread, loading the model included (use `call`): torch on
    a CPU keeps OpenMP threads for every thread that computes, and with more threads than cores none of them spins,
    which makes every step 1.5 times as long.
    """

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="tfserve-steps")
        self._runner: Runner | None = None

    def call(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Run a function on the thread; wait for what it returns, or raise what it raises."""
        return self._thread.submit(function, *args, **kwargs).result()

    def serve(self, runner: Runner) -> None:
        """Launch on this runner from now on."""
        self._runner = runner

    def launch(self, plan: StepPlan) -> InFlight:
        """Queue a step behind those before it."""
        return QueuedStep(plan.step, self._thread.submit(self._launch, plan))

    def close(self) -> None:
        """Wait for the steps that are queued and end the thread."""
        self._thread.shutdown()
        if self._runner is not None:
            self._runner.close()

    def _launch(self, plan: StepPlan) -> InFlight:
        if self._runner is None:
            raise RuntimeError("the StepWorker has no runner to launch on")
        return self._runner.launch(plan)


@dataclass(frozen=True, slots=True)
class QueuedStep:
    """A step that the thread launches, or has launched."""

    fence: Fence
    launched: Future[InFlight]

    def ready(self) -> bool:
        """True once the step is over."""
        return self.launched.done() and self.launched.result().ready()

    def result(self) -> StepResult:
        """What the step produced; waits for it, and raises what it raised."""
        return self.launched.result().result()
