"""An engine process whose core breaks where `served_model_name` says: `python -m tests.engine.core.broken_core FD`."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from tests.http.fakes import FakeEngine, fake_info
from tests.panics import PanicException
from tfserve.config import EngineConfig
from tfserve.engine.core import build, process
from tfserve.engine.core.clock import RealClock
from tfserve.engine.core.loop import Inbox
from tfserve.messages import StepOutputs
from tfserve.types import EngineInfo

ERRORS = {
    "panic": PanicException("out of bounds"),
    "exit": SystemExit(3),
    "interrupt": KeyboardInterrupt(),
    "bug": ValueError("a bug"),
}


class BrokenCore:
    """Emits one step for each message; raises at the second."""

    def __init__(self, config: EngineConfig, error: BaseException, emit: Callable[[Any], None]) -> None:
        self._clock = RealClock()
        self._stats = FakeEngine(config).stats()
        self.inbox = Inbox(self._clock)
        self._error, self._emit = error, emit

    def run(self) -> None:
        for _ in range(2):
            while not self.inbox.take():
                self._clock.wait(None)
            self._emit(StepOutputs([], self._stats))
        raise self._error

    def close(self) -> None:
        """A device that hangs."""
        self._clock.wait(None)


def build_core(config: EngineConfig, emit: Callable[[Any], None]) -> tuple[Any, EngineInfo]:
    where, _, error = str(config.served_model_name).partition(" ")
    if where == "loading":
        raise ERRORS[error]
    return BrokenCore(config, ERRORS[error], emit), fake_info(config)


if __name__ == "__main__":
    build.build_core = build_core
    sys.exit(process.main(int(sys.argv[1])))
