from __future__ import annotations

import threading

import pytest

from tfserve.engine.core.step_worker import StepWorker
from tfserve.plan import StepId, StepPlan, StepResult


class GatedRunner:
    """Computes in `launch`, on whichever thread calls it, when the gate is open."""

    def __init__(self) -> None:
        self.gate = threading.Event()
        self.began: list[int] = []
        self.threads: set[int] = set()
        self.closed = False

    def launch(self, plan: StepPlan) -> Finished:
        self.threads.add(threading.get_ident())
        self.began.append(plan.step)
        self.gate.wait()
        return Finished(plan.step)

    def close(self) -> None:
        self.closed = True


class Finished:
    def __init__(self, step: StepId) -> None:
        self.step = step

    def result(self) -> StepResult:
        if self.step == 1:
            raise RuntimeError("step 1 went wrong")
        return StepResult(self.step, (7,), (None,), 0.5)


def test_steps_queue_up_in_order_on_the_thread_that_loaded_the_model():
    worker, runner = StepWorker(), GatedRunner()
    loader = worker.call(threading.get_ident)
    worker.serve(runner)
    flights = [worker.launch(StepPlan(StepId(step), (), 0)) for step in range(3)]
    runner.gate.set()
    assert flights[2].result().tokens == (7,)
    assert flights[0].result().device_s == 0.5
    with pytest.raises(RuntimeError, match="step 1"):
        flights[1].result()
    assert runner.began == [0, 1, 2]
    assert runner.threads == {loader} != {threading.get_ident()}
    worker.close()
    assert runner.closed


def test_what_a_call_raises_reaches_the_caller():
    worker = StepWorker()
    with pytest.raises(ZeroDivisionError):
        worker.call(lambda: 1 // 0)
    worker.close()


def test_closing_waits_for_what_is_queued():
    worker, runner = StepWorker(), GatedRunner()
    worker.serve(runner)
    for step in (0, 2):
        worker.launch(StepPlan(StepId(step), (), 0))
    runner.gate.set()
    worker.close()
    assert runner.began == [0, 2]
