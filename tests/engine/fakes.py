"""A runner without a model, whose tokens depend on every token before them and whose KV is checked slot by slot."""

from __future__ import annotations

import zlib
from dataclasses import dataclass, field

from tfserve.config import SchedulerConfig
from tfserve.engine.core import EngineCore
from tfserve.engine.messages import AddRequest, StepOutputs
from tfserve.engine.policies import make_policy
from tfserve.engine.scheduler import Scheduler
from tfserve.memory.block_pool import BlockPool
from tfserve.memory.kv_manager import KVCacheManager
from tfserve.plan import NULL_BLOCK, Fence, RowInit, StepPlan, StepResult
from tfserve.types import SamplingParams

VOCAB = 1000
EOS = 0


def next_token(tokens: list[int]) -> int:
    """What the fake model says after `tokens`; never the end of sequence."""
    return 1 + zlib.crc32(repr(tokens).encode()) % (VOCAB - 1)


def expected_output(prompt: list[int], n: int) -> list[int]:
    tokens = list(prompt)
    for _ in range(n):
        tokens.append(next_token(tokens))
    return tokens[len(prompt) :]


@dataclass
class FakeInFlight:
    fence: Fence
    outcome: StepResult | Exception

    def ready(self) -> bool:
        return True

    def result(self) -> StepResult:
        if isinstance(self.outcome, Exception):
            raise self.outcome
        return self.outcome


@dataclass
class FakeRow:
    init: RowInit
    blocks: list[int] = field(default_factory=list)
    last: int | None = None


class FakeRunner:
    """Stores each token in its KV slot and reads them all back before it answers, as attention would."""

    def __init__(self, block_size: int, max_num_batched_tokens: int) -> None:
        self.block_size = block_size
        self.max_num_batched_tokens = max_num_batched_tokens
        self.slots: dict[tuple[int, int], int] = {}
        self.rows: dict[int, FakeRow] = {}
        self.plans: list[StepPlan] = []
        self.fail_on: set[int] = set()

    def launch(self, plan: StepPlan) -> FakeInFlight:
        self.plans.append(plan)
        for row in plan.released_rows:
            del self.rows[row]
        for entry in plan.entered:
            assert entry.row not in self.rows, "a row was given twice"
            self.rows[entry.row] = FakeRow(entry, list(entry.blocks))
        if plan.step in self.fail_on:
            return FakeInFlight(plan.step, RuntimeError("planned failure"))
        assert plan.num_tokens <= self.max_num_batched_tokens
        tokens = [self._run(seq) for seq in plan.seqs]
        sampled = tuple(t for t in tokens if t is not None)
        return FakeInFlight(plan.step, StepResult(plan.step, sampled, (None,) * len(sampled), 0.0))

    def _run(self, seq) -> int | None:
        row = self.rows[seq.row]
        assert row.init.req == seq.req
        row.blocks += seq.new_blocks
        assert NULL_BLOCK not in row.blocks
        tokens = seq.token_ids if seq.token_ids is not None else (row.last,)
        assert len(tokens) == seq.n
        for position, token in enumerate(tokens, seq.start):
            self.slots[self._slot(row, position)] = token
        if not seq.sample:
            return None
        seen = [self.slots[self._slot(row, position)] for position in range(seq.start + seq.n)]
        row.last = next_token(seen)
        return row.last

    def _slot(self, row: FakeRow, position: int) -> tuple[int, int]:
        return row.blocks[position // self.block_size], position % self.block_size


class FakeClock:
    """Time that moves only when somebody waits or asks it to."""

    def __init__(self) -> None:
        self.time = 0.0

    def now(self) -> float:
        return self.time

    def wait(self, until: float | None) -> None:
        self.time = self.time if until is None else max(self.time, until)

    def notify(self) -> None:
        pass


class FakeEngine:
    """A core with the fake runner, stepped by hand; collects what each request got."""

    def __init__(
        self,
        num_blocks: int = 64,
        block_size: int = 4,
        max_num_seqs: int = 4,
        max_num_batched_tokens: int = 16,
        tokenizer=None,
        **scheduler,
    ) -> None:
        self.kv = KVCacheManager(BlockPool(num_blocks), block_size, run_tokens=8 * block_size)
        self.scheduler = Scheduler(
            make_policy(SchedulerConfig(**scheduler)), self.kv, max_num_seqs, max_num_batched_tokens
        )
        self.runner = FakeRunner(block_size, max_num_batched_tokens)
        self.clock = FakeClock()
        self.outputs: dict[str, list[int]] = {}
        self.finished: dict[str, object] = {}
        self.core = EngineCore(
            scheduler=self.scheduler,
            runner=self.runner,
            clock=self.clock,
            tokenizer=tokenizer,
            eos_token_ids={EOS},
            seed=0,
            emit=self._emit,
            debug_checks=True,
        )

    def add(self, req: str, prompt: list[int], max_tokens: int, **params) -> None:
        self.clock.time += 0.001
        sampling = SamplingParams(max_tokens=max_tokens, **params)
        self.core.inbox.put(AddRequest(req, list(prompt), sampling, self.clock.time))
        self.outputs[req] = []

    def _emit(self, message: StepOutputs) -> None:
        for output in message.outputs:
            self.outputs[output.request_id] += output.token_ids
            if output.finish_reason is not None:
                assert output.request_id not in self.finished, "finished twice"
                self.finished[output.request_id] = output

    def run(self, max_steps: int = 10_000) -> int:
        """Step until idle; the number of steps."""
        for steps in range(max_steps):
            if not self.core.step():
                return steps
        raise AssertionError("the engine never became idle")
