"""Calibration: measures a few steps of made-up requests at start, so that the CostModel knows the machine."""

from __future__ import annotations

from collections.abc import Sequence

from tfserve.config import EngineConfig
from tfserve.engine.scheduling.batch import sample_of
from tfserve.engine.scheduling.cost_model import CostModel, StepSample
from tfserve.plan import BlockId, Clock, Runner, SeqStep, SlotId, SlotInit, StepId, StepPlan
from tfserve.types import SamplingParams

_MAX_S = 0.5
"""No optional step starts after this long, counted from the end of the first step, which is the warm-up."""

_NEEDED = 5
"""Steps that always run: the warm-up, decodes of several rows and of one, prompts of two sizes."""

_ROWS = 8
_PROMPT = 4
_CHUNK = 64

_GROWTH = 4
_COMPUTE_BOUND = 3.0
"""A prompt that takes this many times as long as one token shows what its tokens cost; a GPU hides short ones."""


def calibrate(
    cost: CostModel,
    runner: Runner,
    clock: Clock,
    config: EngineConfig,
    *,
    num_blocks: int,
    block_size: int,
    max_model_len: int,
) -> None:
    """Run prompts, decodes of one and of several rows, and growing chunks until they are compute bound; free the rows.

    The steps write to the first blocks of the device pool, which are still free. With too few blocks, fewer steps run.
    """
    rows = min(_ROWS, config.max_num_seqs, num_blocks - 1, config.max_num_batched_tokens // _PROMPT)
    # Every row stays inside one block.
    chunk = min(_CHUNK, block_size - _PROMPT - 3, config.max_num_batched_tokens, max_model_len - _PROMPT - 3)
    if rows < 1 or chunk < 1:
        return
    bench = _Bench(runner, clock)
    bench.run_short(rows, chunk)
    start = _PROMPT + 1 + chunk
    room = min((num_blocks - rows) * block_size, max_model_len) - start - 1
    most = config.max_num_batched_tokens
    bench.run_growing(rows - 1, start, room, n=_GROWTH * chunk, most=most, block_size=block_size)
    runner.launch(StepPlan(StepId(-1), (), 0, (), tuple(SlotId(row) for row in range(rows)))).result()
    cost.calibrate(bench.samples)


class _Bench:
    """Runs steps one after the other and keeps what they took, without the first one."""

    def __init__(self, runner: Runner, clock: Clock) -> None:
        self.samples: list[StepSample] = []
        self._runner = runner
        self._clock = clock
        self._end_s = float("inf")

    def run_short(self, rows: int, chunk: int) -> None:
        """Enter `rows` requests; decode all of them and one of them; two chunks of a prompt, at most `chunk` tokens."""
        every = range(rows)
        one = [_decode(0, _PROMPT + 2)]
        steps = [
            ([_prompt(row, 0, _PROMPT) for row in every], 0),
            ([_decode(row, _PROMPT) for row in every], rows),
            (one, 1),
            # The cost of prompts has two parts: a constant per step with prompts, and a cost per token.
            ([_prompt(rows - 1, _PROMPT + 1, -(-chunk // _GROWTH))], 0),
            ([_prompt(rows - 1, _PROMPT + 1, chunk)], 0),
            ([_decode(row, _PROMPT + 1) for row in every], rows),
            (one, 1),
        ]
        entered = tuple(
            SlotInit(SlotId(row), f"calibration-{row}", SamplingParams(temperature=0), 0, (0,) * _PROMPT, _PROMPT)
            for row in every
        )
        warm_up, *others = steps
        self._launch(*warm_up, entered)
        self._end_s = self._clock.now() + _MAX_S
        for number, (seqs, n_decode) in enumerate(others, 1):
            if number < _NEEDED or self._clock.now() <= self._end_s:
                self.samples.append(self._launch(seqs, n_decode))

    def run_growing(self, row: int, start: int, room: int, *, n: int, most: int, block_size: int) -> None:
        """Chunks of a row's prompt from token `start` on, until one is compute bound."""
        n = min(n, room, most)
        grown = False
        while n > 0 and self._clock.now() < self._end_s and not (grown and _is_compute_bound(self.samples)):
            grown = True
            blocks = range(-(-start // block_size), -(-(start + n) // block_size))
            chunk = _prompt(row, start, n, tuple(BlockId(row + 1 + index) for index in blocks))
            self.samples.append(self._launch([chunk], 0))
            start, room = start + n, room - n
            n = min(_GROWTH * n, room, most)

    def _launch(self, seqs: Sequence[SeqStep], n_decode: int, entered: tuple[SlotInit, ...] = ()) -> StepSample:
        plan = StepPlan(StepId(-1), tuple(seqs), n_decode, entered)
        return sample_of(plan.seqs, n_decode, self._runner.launch(plan).result().device_s)


def _is_compute_bound(samples: Sequence[StepSample]) -> bool:
    """True if the longest prompt step takes much longer than the shortest decode step."""
    decode_s = min((sample.seconds for sample in samples if sample.n_decode), default=0.0)
    prompt_s = max((sample.seconds for sample in samples if sample.n_prefill), default=0.0)
    return prompt_s > _COMPUTE_BOUND * decode_s


def _prompt(row: int, start: int, n: int, blocks: tuple[BlockId, ...] = ()) -> SeqStep:
    if start == 0:
        blocks = (BlockId(row + 1),)
    return SeqStep(f"calibration-{row}", SlotId(row), start, n, True, (0,) * n, blocks)


def _decode(row: int, start: int) -> SeqStep:
    return SeqStep(f"calibration-{row}", SlotId(row), start, 1, True, (0,), ())
