"""A runner without a model, whose tokens depend on every token before them and whose KV is checked slot by slot.

And transfers over those slots, which move them when the test says so.
"""

from __future__ import annotations

import zlib
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from tests.copy_queues import CopyQueues
from tests.scheduler_settings import scheduler_config
from tfserve.engine.core.loop import EngineCore
from tfserve.engine.scheduling.assembly import KVMemory, make_scheduler
from tfserve.engine.scheduling.cost_model import CostModel
from tfserve.engine.scheduling.grammar_gate import GrammarGate
from tfserve.messages import AddRequest, StepOutputs, StreamStates
from tfserve.plan import NULL_BLOCK, Ack, Clock, Copy, Direction, SlotInit, StepId, StepPlan, StepResult
from tfserve.types import ONE_TENANT, SamplingParams

VOCAB = 1000
EOS = 0
STEP_S = 0.02


def next_token(tokens: list[int]) -> int:
    """The fake model's next token after `tokens`; never the end of sequence."""
    return 1 + zlib.crc32(repr(tokens).encode()) % (VOCAB - 1)


def expected_output(prompt: list[int], n: int) -> list[int]:
    tokens = list(prompt)
    for _ in range(n):
        tokens.append(next_token(tokens))
    return tokens[len(prompt) :]


class WrongPlanError(BaseException):
    """A plan that no runner could run; not an Exception, which the core would take for a failed step."""


@dataclass
class FakeInFlight:
    runner: FakeRunner
    step: StepId

    def result(self) -> StepResult:
        self.runner.run_until(self.step)
        outcome = self.runner.outcomes.pop(self.step)
        if isinstance(outcome, BaseException):
            raise outcome
        return outcome


@dataclass
class FakeRow:
    init: SlotInit
    blocks: list[int] = field(default_factory=list)
    last: int = 0


class FakeRunner:
    """Stores each token in its KV slot and reads them all back before it answers, as attention would.

    As late as it can: a step runs when its result is asked for. `plans` are those launched; `log` says what was
    launched and asked for, in order.
    """

    def __init__(self, block_size: int, max_num_batched_tokens: int) -> None:
        self.block_size = block_size
        self.max_num_batched_tokens = max_num_batched_tokens
        self.slots: dict[tuple[int, int], int] = {}
        self.rows: dict[int, FakeRow] = {}
        self.plans: list[StepPlan] = []
        self.fail_on: set[int] = set()
        self.failure: BaseException = RuntimeError("planned failure")
        self.queue: deque[StepPlan] = deque()
        self.outcomes: dict[StepId, StepResult | BaseException] = {}
        self.log: list[tuple[str, int]] = []
        self.closed = False
        self.not_finite: dict[int, str] = {}  # by step: the request with logits that are not finite

    def launch(self, plan: StepPlan) -> FakeInFlight:
        self.plans.append(plan)
        self.queue.append(plan)
        self.log.append(("launch", plan.step))
        return FakeInFlight(self, plan.step)

    def close(self) -> None:
        self.closed = True

    def run_until(self, step: StepId) -> None:
        self.log.append(("result", step))
        while self.queue and self.queue[0].step <= step:
            plan = self.queue.popleft()
            try:
                self.outcomes[plan.step] = self._step(plan)
            except (AssertionError, LookupError) as error:
                raise WrongPlanError(plan) from error

    def _step(self, plan: StepPlan) -> StepResult | BaseException:
        for row in plan.released_slots:
            del self.rows[row]
        for entry in plan.entered:
            assert entry.slot not in self.rows, "a row was given twice"
            self.rows[entry.slot] = FakeRow(entry, list(entry.blocks))
        for seq in plan.seqs:
            row = self.rows[seq.slot]
            assert row.init.req == seq.req
            row.blocks += seq.new_blocks
            assert NULL_BLOCK not in row.blocks
        if plan.step in self.fail_on:
            self._scrub(plan)
            return self.failure
        assert plan.num_tokens <= self.max_num_batched_tokens
        tokens = [self._run(seq) for seq in plan.seqs]
        sampled = tuple(t for t in tokens if t is not None)
        bad = self.not_finite.get(plan.step)
        failed = tuple((seq.req, "logits are not finite") for seq in plan.seqs if seq.sample and seq.req == bad)
        return StepResult(plan.step, sampled, (None,) * len(sampled), 0.0, failed=failed)

    def _scrub(self, plan: StepPlan) -> None:
        for seq in plan.seqs:
            for block in self.rows[seq.slot].blocks:
                self.slots |= {(block, place): 0 for place in range(self.block_size)}

    def _run(self, seq) -> int | None:
        row = self.rows[seq.slot]
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


class FakeTransfers(CopyQueues):
    """Moves slots between the runner's device blocks and a host dictionary.

    `speeds` says how many copies of each direction move at each turn, over and over: 0 keeps them waiting. A turn is
    every `submit` (before the step runs) and every `poll` (after it). The copies numbered in `fail` come to nothing;
    `bps` is what the acknowledgements say of the link, at a byte per token. With `honour_steps` off, no copy waits for
    a step: the control of the tests that say it must.
    """

    def __init__(self, runner: FakeRunner, speeds: Sequence[int] = (4,), fail: set[int] = frozenset(), bps=1e6):
        super().__init__()
        self.bps = bps
        self.device = runner.slots
        self.host: dict[tuple[int, int], int] = {}
        self.speeds = speeds
        self.fail = fail
        self.turns = 0
        self.acks: list[Ack] = []
        self.honour_steps = True
        self.closed = False
        self.moved = dict.fromkeys(Direction, 0)

    def submit(self, copies: Sequence[Copy]) -> None:
        super().submit(copies)
        self.turn()

    def poll(self) -> list[Ack]:
        self.turn()
        acks, self.acks = self.acks, []
        return acks

    def close(self) -> None:
        self.closed = True

    def turn(self) -> None:
        speed = self.speeds[self.turns % len(self.speeds)]
        self.turns += 1
        for queue in self.queues.values():
            for _ in range(speed):
                if queue and self._ready(queue[0]):
                    self._move(queue.popleft())

    def _ready(self, copy: Copy) -> bool:
        return (self.step_has_passed(copy) or not self.honour_steps) and self.copies_have_ended(copy)

    def _move(self, copy: Copy) -> None:
        ok = copy.id not in self.fail
        store = copy.direction is Direction.STORE
        for token in range(copy.start, copy.start + copy.num_tokens):
            dev, host = (copy.device_block, token), (copy.host_block, token)
            if store:
                self.host[host] = self.device.get(dev, -1) if ok else -1
            else:
                self.device[dev] = self.host[host] if ok else -1
        self.moved[copy.direction] += copy.num_tokens
        self.pending.discard(copy.id)
        self.acks.append(Ack(copy.id, ok, copy.num_tokens if ok else 0, 0.0, copy.num_tokens / self.bps))


class FakeClock:
    """Time that moves only in `wait`, or when a test sets it."""

    def __init__(self) -> None:
        self.time = 0.0

    def now(self) -> float:
        return self.time

    def wait(self, until: float | None) -> None:
        self.time = self.time if until is None else max(self.time, until)

    def notify(self) -> None:
        pass


class FakeEngine:
    """A core with the fake runner, stepped by hand; collects what each request got. Serves in order unless told."""

    pipeline_depth = 1

    def __init__(
        self,
        num_blocks: int = 64,
        block_size: int = 4,
        max_num_seqs: int = 4,
        max_num_batched_tokens: int = 16,
        tokenizer=None,
        num_host_blocks: int = 0,
        speeds: Sequence[int] = (4,),
        fail_copies: set[int] = frozenset(),
        bps: float = 1e6,
        policy: str = "fcfs-chunked",
        gate: Callable[[Clock], GrammarGate] | None = None,
        **scheduler,
    ) -> None:
        config = scheduler_config(policy=policy, **scheduler)
        self.clock = FakeClock()
        self.runner = FakeRunner(block_size, max_num_batched_tokens)
        self.transfers = FakeTransfers(self.runner, speeds, fail_copies, bps) if num_host_blocks else None
        self.scheduler = make_scheduler(
            config,
            KVMemory(block_size, num_blocks, num_host_blocks),
            CostModel(kv_bytes_per_token=1, max_num_seqs=max_num_seqs, store_bps=bps, load_bps=bps),
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_batched_tokens,
            transfers=self.transfers,
            gate=None if gate is None else gate(self.clock),
        )
        self.kv = self.scheduler.kv
        self.messages: list[StepOutputs | StreamStates] = []
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
            pipeline_depth=self.pipeline_depth,
            debug_checks=True,
        )

    def add(
        self, req: str, prompt: list[int], max_tokens: int, rate=None, priority: int = 0, tenant=ONE_TENANT, **params
    ) -> None:
        self.clock.time += 0.001
        sampling = SamplingParams(max_tokens=max_tokens, **params)
        self.core.inbox.put(AddRequest(req, list(prompt), sampling, self.clock.time, rate, priority, tenant=tenant))
        self.outputs[req] = []

    def _emit(self, message: StepOutputs | StreamStates) -> None:
        self.messages.append(message)
        if isinstance(message, StreamStates):
            return
        for output in message.outputs:
            self.outputs[output.request_id] += output.token_ids
            if output.finish_reason is not None:
                assert output.request_id not in self.finished, "finished twice"
                self.finished[output.request_id] = output

    def step(self) -> bool:
        """One turn of the loop, and the time it takes; False if nothing ran."""
        ran = self.core.step()
        self.clock.time += STEP_S if ran else 0.0
        return ran

    def run(self, max_steps: int = 10_000) -> int:
        """Step until all have finished, asleep whenever the loop would be; the number of steps."""
        for steps in range(max_steps):
            if self.step():
                continue
            if not self.scheduler.has_work:
                return steps
            under_way = self.scheduler.offload.is_busy
            assert under_way or self.scheduler.wake_s is not None, "the loop would sleep for ever"
            if under_way:
                self.clock.time += 0.002
            else:
                self.core.sleep()
        raise AssertionError("the engine never became idle")

    def drain(self) -> None:
        """Let the remaining copies end."""
        while self.scheduler.offload.is_busy:
            self.core.step()

    def all_free(self) -> bool:
        host_free = self.kv.num_free_host_blocks == max(0, self.kv.num_host_blocks - 1)
        return self.kv.num_free_blocks == self.kv.num_blocks - 1 and host_free
