from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from tfserve.engine.core.clock import RealClock
from tfserve.memory.storage.device_pool import DevicePool
from tfserve.memory.storage.kv_layout import KVLayout
from tfserve.memory.transfers.worker_transfers import TierArrays, WorkerTransfers
from tfserve.model.attention.base import PagedKV
from tfserve.model.attention.torch_backend import TorchBackend
from tfserve.model.decoder import Decoder
from tfserve.model.loading.config import load_model_config
from tfserve.model.loading.loader import load_model
from tfserve.model.runner.runner import ModelRunner
from tfserve.plan import (
    Ack,
    BlockId,
    Copy,
    CopyDeps,
    CopyId,
    Direction,
    SeqStep,
    SlotId,
    SlotInit,
    StepId,
    StepPlan,
    StepResult,
)
from tfserve.types import SamplingParams

BLOCK_SIZE = 8
MAX_MODEL_LEN = 256
TINY = ["tiny_llama3", "tiny_qwen25", "tiny_qwen3", "tiny_mistral"]


class BreakableBackend(TorchBackend):
    """The real backend, until it is told to fail."""

    broken = False

    def build(self, *args: Any) -> Any:
        if self.broken:
            raise RuntimeError("out of kernels")
        return super().build(*args)


class Driver:
    """Plays the scheduler: writes plans by hand, with blocks in shuffled order, and keeps every request's tokens."""

    def __init__(self, path: Path, num_blocks: int = 200) -> None:
        config = load_model_config(path)
        self.model: Decoder = load_model(path, config, dtype="float32", device="cpu", quantization=None, progress=False)
        layout = KVLayout.for_device(
            "cpu",
            "float32",
            num_layers=config.num_hidden_layers,
            block_size=BLOCK_SIZE,
            num_kv_heads=config.num_key_value_heads,
            head_dim=config.head_dim,
        )
        self.pool = DevicePool(layout, num_blocks, "cpu")
        self.kv = PagedKV(self.pool.layers())
        self.backend = BreakableBackend()
        self.runner = ModelRunner(self.model, self.kv, self.backend, max_num_seqs=8, max_model_len=MAX_MODEL_LEN)
        order = torch.randperm(num_blocks - 1, generator=torch.Generator().manual_seed(5)) + 1
        self.free = [BlockId(block) for block in order.tolist()]
        self.tokens: dict[int, list[int]] = {}  # by row
        self.blocks: dict[int, list[BlockId]] = {}
        self.step = 0

    def enter(self, row: int, tokens: list[int], prompt: int | None = None, **params: Any) -> SlotInit:
        self.tokens[row], self.blocks[row] = list(tokens), []
        params.setdefault("temperature", 0)
        num_prompt = len(tokens) if prompt is None else prompt
        return SlotInit(SlotId(row), f"r{row}", SamplingParams(**params), 0, tuple(tokens), num_prompt)

    def seq(self, row: int, start: int, n: int, sample: bool = True, from_host: bool = True) -> SeqStep:
        missing = -(-(start + n) // BLOCK_SIZE) - len(self.blocks[row])
        new = tuple(self.free.pop() for _ in range(missing))
        self.blocks[row] += new
        tokens = tuple(self.tokens[row][start : start + n]) if from_host else None
        return SeqStep(f"r{row}", SlotId(row), start, n, sample, tokens, new)

    def run(self, *seqs: SeqStep, n_decode: int = 0, entered: tuple = (), released: tuple = ()) -> StepResult:
        self.step += 1
        flight = self.runner.launch(StepPlan(StepId(self.step), seqs, n_decode, entered, released))
        result = flight.result()
        assert result.step == self.step
        sampling = [seq for seq in seqs if seq.sample]
        for seq, token in zip(sampling, result.tokens, strict=True):
            self.tokens[seq.slot].append(token)
        return result

    def start(self, row: int, tokens: list[int], sample: bool = True, **params: Any) -> StepResult:
        entered = (self.enter(row, tokens, **params),)
        return self.run(self.seq(row, 0, len(tokens), sample), entered=entered)

    def decode(self, *rows: int) -> StepResult:
        seqs = [self.seq(row, len(self.tokens[row]) - 1, 1, from_host=False) for row in rows]
        return self.run(*seqs, n_decode=len(rows))

    def release(self, row: int) -> None:
        self.run(released=(SlotId(row),))
        self.free[:0] = self.blocks.pop(row)


def prompt(n: int, seed: int = 0) -> list[int]:
    return torch.randint(3, 512, (n,), generator=torch.Generator().manual_seed(seed)).tolist()


@pytest.fixture(params=TINY)
def path(request: pytest.FixtureRequest) -> Path:
    return request.getfixturevalue(request.param)


@pytest.fixture
def driver(path: Path) -> Driver:
    return Driver(path)


@pytest.fixture
def reference(path: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager")


@torch.inference_mode()
def reference_logits(model: PreTrainedModel, tokens: list[int]) -> Tensor:
    return model(torch.tensor([tokens])).logits[0]


def check_greedy(driver: Driver, reference: PreTrainedModel, row: int, num_prompt: int) -> None:
    """Every generated token is the reference's most likely one (or ties with it)."""
    tokens = driver.tokens[row]
    assert len(tokens) > num_prompt
    logits = reference_logits(reference, tokens[:-1])[num_prompt - 1 :]
    chosen = logits.gather(1, torch.tensor(tokens[num_prompt:])[:, None])[:, 0]
    torch.testing.assert_close(chosen, logits.max(-1).values, atol=1e-4, rtol=0)


@pytest.mark.parametrize("chunks", [[45], [16, 16, 13], [7, 30, 1, 7]], ids=str)
def test_prefill_in_chunks_then_decode_equals_transformers(
    driver: Driver, reference: PreTrainedModel, chunks: list[int]
) -> None:
    entered = (driver.enter(0, prompt(45)),)
    start = 0
    for n in chunks:
        last = start + n == 45
        result = driver.run(driver.seq(0, start, n, sample=last), entered=entered)
        assert len(result.tokens) == last
        entered, start = (), start + n
    for _ in range(20):
        driver.decode(0)
    check_greedy(driver, reference, 0, 45)


@pytest.mark.parametrize("chunks", [[90], [20, 69, 1]], ids=str)
def test_prompt_logprobs_equal_transformers_beside_a_row_without(
    driver: Driver, reference: PreTrainedModel, chunks: list[int]
) -> None:
    driver.start(1, prompt(12, 1))
    tokens = prompt(90)
    entered = (driver.enter(0, tokens, prompt_logprobs=3),)
    scored = []
    start = 0
    for n in chunks:
        chunk = driver.seq(0, start, n, sample=start + n == 90)
        decode = driver.seq(1, len(driver.tokens[1]) - 1, 1, from_host=False)
        scored += driver.run(decode, chunk, n_decode=1, entered=entered).prompt_logprobs
        entered, start = (), start + n
    assert driver.run(driver.seq(0, 90, 1, from_host=False), n_decode=1).prompt_logprobs == ()
    assert {part.req for part in scored} == {"r0"}
    entries = [entry for part in scored for entry in part.entries]
    assert [part.start for part in scored] == [1 + sum(chunks[:i]) for i in range(len(scored))]
    assert [entry.token_id for entry in entries] == tokens[1:]
    expected = reference_logits(reference, tokens).log_softmax(-1)
    mine = torch.tensor([entry.logprob for entry in entries])
    torch.testing.assert_close(
        mine, expected[:-1].gather(1, torch.tensor(tokens[1:])[:, None])[:, 0], atol=1e-4, rtol=0
    )
    best = torch.tensor([[value for _, value in entry.top] for entry in entries])
    torch.testing.assert_close(best, expected[:-1].topk(3).values, atol=1e-4, rtol=0)


def test_logits_equal_transformers_in_a_mixed_step(driver: Driver, reference: PreTrainedModel) -> None:
    """Two decodes of unequal length, a continued prefill and a fresh prompt in one step, seen through their top 20."""
    lengths = {0: 50, 1: 3, 2: 40, 3: 21}
    entered = tuple(driver.enter(row, prompt(n, row), logprobs=20) for row, n in lengths.items())
    driver.run(driver.seq(0, 0, 50), driver.seq(1, 0, 3), driver.seq(2, 0, 17, sample=False), entered=entered)
    result = driver.run(
        driver.seq(1, 3, 1, from_host=False),
        driver.seq(0, 50, 1, from_host=False),
        driver.seq(2, 17, 23),
        driver.seq(3, 0, 21),
        n_decode=2,
    )
    assert len(result.logprobs) == 4
    for row, logprob in zip((1, 0, 2, 3), result.logprobs, strict=True):
        assert logprob is not None
        expected = reference_logits(reference, driver.tokens[row][:-1])[-1].log_softmax(-1)
        ids, values = zip(*logprob.top, strict=True)
        torch.testing.assert_close(torch.tensor(values), expected[list(ids)], atol=1e-4, rtol=0)
        assert logprob.token_id == ids[0] == driver.tokens[row][-1]


def test_batched_decode_of_unequal_lengths_equals_transformers(driver: Driver, reference: PreTrainedModel) -> None:
    lengths = [1, 7, 8, 9, 40, 100, 23, 64]
    entered = tuple(driver.enter(row, prompt(n, row)) for row, n in enumerate(lengths))
    driver.run(*(driver.seq(row, 0, n) for row, n in enumerate(lengths)), entered=entered)
    for _ in range(12):
        driver.decode(*range(8))
    for row, n in enumerate(lengths):
        check_greedy(driver, reference, row, n)


def test_a_row_that_re_enters_goes_on_with_the_same_tokens(driver: Driver) -> None:
    driver.start(0, prompt(30), repetition_penalty=1.3)
    for _ in range(25):
        driver.decode(0)
    expected = driver.tokens[0]
    driver.release(0)

    driver.start(0, prompt(30), repetition_penalty=1.3)
    for _ in range(10):
        driver.decode(0)
    tokens = driver.tokens[0]
    driver.release(0)
    # Another request uses the row meanwhile; then the request resumes in another row, in two chunks.
    driver.start(0, prompt(60, 9))
    entered = (driver.enter(5, tokens, prompt=30, repetition_penalty=1.3),)
    driver.run(driver.seq(5, 0, 32, sample=False), entered=entered)
    driver.run(driver.seq(5, 32, len(tokens) - 32))
    while len(driver.tokens[5]) < len(expected):
        driver.decode(0, 5)
    assert driver.tokens[5] == expected


def test_a_row_that_re_enters_with_its_blocks_needs_no_recompute(driver: Driver) -> None:
    driver.start(0, prompt(30))
    for _ in range(10):
        driver.decode(0)
    expected = driver.tokens[0]

    driver.release(0)
    driver.start(0, prompt(30))
    tokens, blocks = driver.tokens[0], driver.blocks[0]
    driver.run(released=(SlotId(0),))
    entry = driver.enter(3, tokens, prompt=30)
    driver.blocks[3] = blocks
    entry = SlotInit(entry.slot, entry.req, entry.params, 0, entry.token_ids, 30, tuple(blocks))
    driver.run(driver.seq(3, 30, 1), n_decode=1, entered=(entry,))
    while len(driver.tokens[3]) < len(expected):
        driver.decode(3)
    assert driver.tokens[3] == expected


def test_logits_after_a_store_and_a_load_equal_transformers(driver: Driver, reference: PreTrainedModel) -> None:
    driver.start(0, prompt(45))
    for _ in range(10):
        driver.decode(0)
    tokens, stored = driver.tokens[0], driver.blocks.pop(0)
    driver.run(released=(SlotId(0),))
    loaded = [driver.free.pop() for _ in stored]
    move_through_host(driver, stored, loaded)

    entry = driver.enter(4, tokens, prompt=45, logprobs=20)
    driver.blocks[4] = loaded
    entry = SlotInit(entry.slot, entry.req, entry.params, 0, entry.token_ids, 45, tuple(loaded))
    [logprob] = driver.run(driver.seq(4, len(tokens) - 1, 1), n_decode=1, entered=(entry,)).logprobs
    assert logprob is not None
    expected = reference_logits(reference, driver.tokens[4][:-1])[-1].log_softmax(-1)
    ids, values = zip(*logprob.top, strict=True)
    torch.testing.assert_close(torch.tensor(values), expected[list(ids)], atol=1e-4, rtol=0)


def move_through_host(driver: Driver, stored: list[BlockId], loaded: list[BlockId]) -> None:
    """Store blocks, spoil the device, and load them again into others."""
    layout, storage = driver.pool.layout, driver.pool.storage
    pages = storage.numpy().transpose(2, 0, 1, 3)
    host = np.zeros((len(stored) + 1, *pages.shape[1:]), pages.dtype)
    tiers = [TierArrays.from_pages(data, layout.num_kv_heads, layout.head_dim) for data in (pages, host)]
    transfers = WorkerTransfers(*tiers, RealClock())
    for direction, blocks in ((Direction.STORE, stored), (Direction.LOAD, loaded)):
        copies = [
            Copy(
                CopyId(100 * (direction is Direction.LOAD) + i), direction, block, BlockId(i), 0, BLOCK_SIZE, CopyDeps()
            )
            for i, block in enumerate(blocks, 1)
        ]
        transfers.submit(copies)
        acks: list[Ack] = []
        while len(acks) < len(copies):
            acks += transfers.poll()
        assert all(ack.ok for ack in acks)
        if direction is Direction.STORE:
            storage.fill_(torch.nan)
            for page in (page for layer in driver.kv.layers for page in layer):
                page[loaded] = 0  # what a block holds beyond its tokens is finite
    transfers.close()


def test_a_failed_step_raises_from_result_and_others_go_on(driver: Driver, reference: PreTrainedModel) -> None:
    driver.start(0, prompt(20))
    entered = (driver.enter(1, prompt(9, 1)),)
    driver.backend.broken = True
    flight = driver.runner.launch(StepPlan(StepId(99), (driver.seq(1, 0, 9),), 0, entered))
    with pytest.raises(RuntimeError, match="out of kernels"):
        flight.result()
    driver.backend.broken = False
    driver.release(1)

    entered = (driver.enter(1, prompt(33, 2)),)
    driver.run(driver.seq(0, 20, 1, from_host=False), driver.seq(1, 0, 33), n_decode=1, entered=entered)
    for _ in range(5):
        driver.decode(1, 0)
    check_greedy(driver, reference, 0, 20)
    check_greedy(driver, reference, 1, 33)


def test_a_sequence_without_room_for_its_tokens_is_refused_before_anything_is_written(tiny_llama3: Path) -> None:
    driver = Driver(tiny_llama3)
    entered = (driver.enter(0, prompt(9)),)
    seq = SeqStep("r0", SlotId(0), 0, 9, True, tuple(prompt(9)), (BlockId(1),))
    with pytest.raises(ValueError, match="r0: 1 blocks for 9 tokens"):
        driver.run(seq, entered=entered)
    assert not any(pages.any() for layer in driver.kv.layers for pages in layer)


def test_a_step_without_sequences_produces_nothing(tiny_llama3: Path) -> None:
    result = Driver(tiny_llama3).run(released=(SlotId(3),))
    assert result.tokens == ()
    assert result.device_s == 0


def test_device_time_is_measured(tiny_llama3: Path) -> None:
    driver = Driver(tiny_llama3)
    result = driver.start(0, prompt(20), sample=False)
    assert result.tokens == ()
    assert result.device_s > 0


def test_a_row_with_nan_fails_alone_and_leaves_finite_kv(driver: Driver, reference: PreTrainedModel) -> None:
    for row in range(3):
        driver.start(row, prompt(12, row), logprobs=2 if row == 2 else None)
    for keys, values in driver.kv.layers:
        keys[driver.blocks[1]] = float("nan")
        values[driver.blocks[1]] = float("nan")
    result = driver.decode(0, 1, 2)
    assert [req for req, _ in result.failed] == ["r1"]
    assert "not finite" in result.failed[0][1]
    assert result.tokens[1] == 0
    assert [logprob is not None for logprob in result.logprobs] == [False, False, True]
    assert all(torch.isfinite(keys).all() and torch.isfinite(values).all() for keys, values in driver.kv.layers)
    driver.release(1)
    for _ in range(5):
        assert driver.decode(0, 2).failed == ()
    for row in (0, 2):
        check_greedy(driver, reference, row, 12)


def test_when_no_row_is_finite_every_one_is_named_but_not_the_prompt_beside_them(
    driver: Driver, reference: PreTrainedModel
) -> None:
    driver.start(0, prompt(12))
    for keys, _ in driver.kv.layers:
        keys[driver.blocks[0]] = float("nan")
    entered = (driver.enter(1, prompt(20, 1)),)
    result = driver.run(
        driver.seq(0, 12, 1, from_host=False), driver.seq(1, 0, 9, sample=False), n_decode=1, entered=entered
    )
    assert (result.tokens, [req for req, _ in result.failed]) == ((0,), ["r0"])
    driver.run(driver.seq(1, 9, 11))
    check_greedy(driver, reference, 1, 20)


def test_nan_in_one_requests_kv_does_not_reach_the_next_owner_of_its_blocks(path: Path) -> None:
    clean, driver = Driver(path), Driver(path)
    driver.start(0, prompt(20))
    for keys, values in driver.kv.layers:
        keys[driver.blocks[0]] = float("nan")
        values[driver.blocks[0]] = float("nan")
    assert [req for req, _ in driver.decode(0).failed] == ["r0"]
    driver.release(0)
    driver.free.reverse()  # the freed blocks are taken first
    for each in (clean, driver):
        each.start(1, prompt(3, seed=9))
        for _ in range(4):
            each.decode(1)
    assert driver.tokens[1] == clean.tokens[1]
