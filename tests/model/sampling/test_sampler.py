from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import RepetitionPenaltyLogitsProcessor

from tfserve.model.sampling.sampler import Sampler
from tfserve.model.sampling.token_draw import CANDIDATES, draw, keep_thresholds, search_thresholds, uniform
from tfserve.plan import SlotId, SlotInit
from tfserve.types import SamplingParams

VOCAB = 512
EOS = 2


def slot_init(row: int, tokens: Sequence[int] = (5, 6, 7), prompt: int = 3, seed: int = 11, **params: Any) -> SlotInit:
    return SlotInit(SlotId(row), f"r{row}", SamplingParams(**params), seed, tuple(tokens), prompt, eos_token_ids=(EOS,))


def sampler_with(*rows: SlotInit, vocab_size: int = VOCAB) -> Sampler:
    sampler = Sampler(vocab_size, max(row.slot for row in rows) + 1, "cpu")
    for row in rows:
        sampler.enter(row)
    return sampler


def tokens_of(sampler: Sampler, logits: Tensor, rows: Sequence[int], positions: Sequence[int]) -> list[int]:
    tokens: list[int] = sampler.sample(logits, rows, positions).token_ids.tolist()
    return tokens


def random_logits(rows: int, vocab_size: int = VOCAB, seed: int = 0, spread: float = 3.0) -> Tensor:
    return torch.randn(rows, vocab_size, generator=torch.Generator().manual_seed(seed)) * spread


def one_row_distribution(logits: Tensor, draws: int = 4000, **params: Any) -> Tensor:
    """How often each token comes at `draws` positions of one request."""
    sampler = sampler_with(slot_init(0, **params), vocab_size=logits.shape[-1])
    batch = logits.expand(draws, -1)
    tokens = sampler.sample(batch, [0] * draws, range(3, 3 + draws)).token_ids
    return torch.bincount(tokens, minlength=logits.shape[-1]) / draws


def thresholds(weights: Tensor, top_k: float, top_p: float, min_p: float) -> Tensor:
    """keep_thresholds with the same filters for every row; 0 where there is no filter."""
    rows = len(weights)
    filters = np.full(rows, top_k, np.int64), np.full(rows, top_p), np.full(rows, min_p)
    found = keep_thresholds(weights, *filters, scratch=torch.empty_like(weights))
    return torch.zeros(rows) if found is None else found


def filtered(probs: Tensor, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0) -> Tensor:
    """The filters said plainly, one row: the distribution to draw from."""
    values, order = probs.double().sort(descending=True)
    keep = torch.ones_like(values, dtype=torch.bool)
    if top_k:
        keep &= torch.arange(len(values)) < top_k
    inside = values * keep / (values * keep).sum()
    if top_p < 1:
        keep &= inside.cumsum(0) - inside < top_p
    keep &= values >= min_p * values[0]
    keep[0] = True
    return torch.zeros_like(values).scatter(0, order, values * keep / (values * keep).sum())


@pytest.mark.parametrize("vocab_size", [97, 512, 1000])
def test_greedy_takes_the_first_of_the_highest_logits(vocab_size: int) -> None:
    logits = random_logits(8, vocab_size).round()
    sampler = sampler_with(*(slot_init(row, temperature=0) for row in range(8)), vocab_size=vocab_size)
    first = [row.index(max(row)) for row in logits.tolist()]
    assert tokens_of(sampler, logits, range(8), [3] * 8) == first


def test_a_nucleus_of_nothing_is_the_most_likely_token() -> None:
    logits = random_logits(8)
    sampler = sampler_with(*(slot_init(row, temperature=2.0, top_p=0.0) for row in range(8)))
    for position in range(3, 20):
        assert tokens_of(sampler, logits, range(8), [position] * 8) == logits.argmax(-1).tolist()


@pytest.mark.parametrize("params", [{}, {"temperature": 0.7}, {"temperature": 1.5, "top_k": 5}, {"top_p": 0.6}])
def test_tokens_come_as_often_as_their_probability_says(params: dict[str, Any]) -> None:
    logits = random_logits(1, 20, spread=1.5)
    filters = {name: value for name, value in params.items() if name != "temperature"}
    expected = filtered((logits[0] / params.get("temperature", 1)).softmax(-1), **filters)
    seen = one_row_distribution(logits, **params)
    assert (seen - expected).abs().max() < 0.03
    assert not seen[expected == 0].any()


@given(
    st.integers(0, 10_000),
    st.sampled_from([300, 3000]),
    st.floats(0.1, 20),
    st.sampled_from([0, 1, 2, 7, 250, 1500, 10_000]),
    st.sampled_from([1.0, 0.999, 0.9, 0.5, 0.01, 0.0]),
    st.sampled_from([0.0, 0.02, 0.5, 1.0]),
)
@settings(max_examples=150, deadline=None)
def test_filters_keep_exactly_the_tokens_the_definition_keeps(
    seed: int, vocab_size: int, spread: float, top_k: int, top_p: float, min_p: float
) -> None:
    logits = random_logits(2, vocab_size, seed, spread)
    weights = (logits - logits.amax(-1, keepdim=True)).exp()
    kept = weights >= thresholds(weights, top_k, top_p, min_p)[:, None]
    for row in range(2):
        # A token of no probability may count as kept: it is never drawn. Ties, all kept, are rare enough not to occur.
        assert torch.equal(kept[row] & (weights[row] > 0), filtered(weights[row], top_k, top_p, min_p) > 0)


@given(
    st.integers(0, 10_000),
    st.sampled_from([300, 3000]),
    st.floats(0.1, 20),
    st.lists(
        st.tuples(st.sampled_from([0, 1, 7, 250, 10_000]), st.sampled_from([1.0, 0.999, 0.9, 0.5, 0.01, 0.0])),
        min_size=1,
        max_size=4,
    ),
)
@settings(max_examples=100, deadline=None)
def test_a_gpu_which_cannot_look_twice_finds_the_same_thresholds(
    seed: int, vocab_size: int, spread: float, filters: list[tuple[int, float]]
) -> None:
    logits = random_logits(len(filters), vocab_size, seed, spread)
    weights = (logits - logits.amax(-1, keepdim=True)).exp()
    top_k, top_p = (np.array(column) for column in zip(*filters, strict=True))
    found = search_thresholds(weights, top_k, top_p.astype(float), torch.empty_like(weights))
    for row, (k, p) in enumerate(filters):
        kept = (weights[row] >= found[row]) & (weights[row] > 0)
        assert torch.equal(kept, filtered(weights[row], k, p) > 0)


def test_nucleus_wider_than_the_candidates_is_exact() -> None:
    weights = random_logits(3, 8 * CANDIDATES, spread=0.1).exp()
    top_p = np.array([0.9, 0.01, 0.5])
    threshold = keep_thresholds(weights, np.zeros(3, np.int64), top_p, np.zeros(3), torch.empty_like(weights))
    assert threshold is not None
    for row, share in enumerate(top_p):
        kept = weights[row][weights[row] >= threshold[row]].double()
        assert kept.sum() >= share * weights[row].double().sum() > kept.sum() - kept.min()


def test_tokens_tied_at_the_limit_all_stay() -> None:
    weights = torch.ones(1, 4 * CANDIDATES)
    assert bool((weights >= thresholds(weights, 3, 0.5, 0.0)[:, None]).all())


@given(st.integers(0, 1000), st.sampled_from([1, 96, 255, 256, 257, 1000]))
def test_draw_inverts_the_cumulative_distribution(seed: int, vocab_size: int) -> None:
    weights = random_logits(4, vocab_size, seed).softmax(-1)
    weights *= random_logits(4, vocab_size, seed + 1) > 0
    weights[:, vocab_size // 2] += 1e-6
    numbers = np.array([0.0, 0.3, 0.99, 1 - 2**-53])
    cumulative = weights.double().cumsum(-1)
    for row, token in enumerate(draw(weights, numbers).tolist()):
        target = numbers[row] * float(cumulative[row, -1])
        assert weights[row, token] > 0
        assert float(cumulative[row, token]) >= target - 1e-12
        assert float(cumulative[row, token] - weights[row, token].double()) <= target + 1e-12


def test_uniform_numbers_are_uniform_and_unrelated_between_seeds_and_positions() -> None:
    seeds, positions = np.meshgrid(np.arange(200, dtype=np.uint64), np.arange(200))
    numbers = uniform(seeds.ravel(), positions.ravel()).reshape(200, 200)
    assert len(np.unique(numbers)) == numbers.size
    histogram = np.histogram(numbers, bins=50, range=(0, 1))[0]
    assert ((histogram - 800) ** 2 / 800).sum() < 90  # chi-square, 49 degrees of freedom: p about 0.0003
    for left, right in ((numbers[1:], numbers[:-1]), (numbers[:, 1:], numbers[:, :-1])):
        assert abs(np.corrcoef(left.ravel(), right.ravel())[0, 1]) < 0.02


def test_a_row_gets_its_token_whatever_rows_surround_it() -> None:
    kinds: list[dict[str, Any]] = [
        {"temperature": 0},
        {},
        {"temperature": 0.8, "top_k": 20},
        {"top_p": 0.8, "min_p": 0.01},
        {"frequency_penalty": 1.0, "logit_bias": {3: 5.0}},
        {"repetition_penalty": 1.3, "temperature": 0.5},
        {"min_tokens": 50, "logprobs": 2},
        {"temperature": 1.3, "top_p": 0.95, "min_tokens": 2},
    ]
    rows = [slot_init(place, seed=place, **kind) for place, kind in enumerate(kinds)]
    logits = random_logits(len(rows))
    positions = [3 + 5 * place for place in range(len(rows))]
    together = tokens_of(sampler_with(*rows), logits, range(len(rows)), positions)
    order = [4, 2, 7, 0, 6, 1, 5, 3]
    shuffled = tokens_of(sampler_with(*rows), logits[order], order, [positions[place] for place in order])
    assert shuffled == [together[place] for place in order]
    sampler = sampler_with(*rows)
    alone = [tokens_of(sampler, logits[[row]], [row], [positions[row]])[0] for row in range(len(rows))]
    assert alone == together


def test_seed_and_position_alone_decide_whatever_the_row() -> None:
    logits = random_logits(1, spread=1.0)
    first, second = sampler_with(slot_init(0, seed=-5)), sampler_with(slot_init(3, seed=-5))
    runs = [tokens_of(s, logits, [row], [p])[0] for s, row in ((first, 0), (second, 3)) for p in range(3, 30)]
    assert runs[:27] == runs[27:]
    assert len(set(runs)) > 10
    other = sampler_with(slot_init(0, seed=-6))
    assert [tokens_of(other, logits, [0], [p])[0] for p in range(3, 30)] != runs[:27]


def generate(sampler: Sampler, row: int, tokens: list[int], steps: int) -> list[int]:
    for _ in range(steps):
        logits = random_logits(1, seed=len(tokens), spread=0.5)
        tokens = [*tokens, *tokens_of(sampler, logits, [row], [len(tokens)])]
    return tokens


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_preempted_request_resumes_with_identical_tokens(temperature: float) -> None:
    params: dict[str, Any] = {
        "temperature": temperature,
        "repetition_penalty": 1.5,
        "frequency_penalty": 2.0,
        "presence_penalty": 1.0,
        "logit_bias": {9: 2.0},
        "min_tokens": 30,
        "logprobs": 1,
    }
    prompt = [5, 6, 5, 7]
    whole = generate(sampler_with(slot_init(0, prompt, 4, **params)), 0, prompt, 60)
    sampler = sampler_with(slot_init(0, prompt, 4, **params), slot_init(2, [1], 1, presence_penalty=2.0))
    half = generate(sampler, 0, prompt, 25)
    sampler.release(SlotId(0))
    sampler.enter(slot_init(0, [400] * 50, 10, frequency_penalty=-2.0))
    generate(sampler, 0, [400] * 50, 5)
    sampler.enter(slot_init(1, half, 4, **params))
    assert generate(sampler, 1, half, 35) == whole


def contested_logits() -> Tensor:
    """The tokens that the next tests edit share most of the probability, so that every edit shows in the draws."""
    logits = random_logits(1, spread=1.0)
    logits[0, [3, 5, 6, 7, 9, 100, 500]] += 8
    return logits


@pytest.mark.parametrize("shift", [0, -20])
def test_repetition_penalty_equals_transformers(shift: float) -> None:
    tokens = [5, 6, 5, 9, 100]
    logits = contested_logits() + shift
    expected = RepetitionPenaltyLogitsProcessor(1.7)(torch.tensor([tokens]), logits.clone())
    assert_edited(logits, expected, slot_init(0, tokens, 3, repetition_penalty=1.7))


def test_frequency_and_presence_count_output_tokens_only() -> None:
    expected = contested_logits()
    logits = expected.clone()
    for token, count in ((9, 2), (7, 1)):
        expected[0, token] -= 0.5 * count + 0.25
    assert_edited(logits, expected, slot_init(0, [5, 6, 7, 9, 7, 9], 3, frequency_penalty=0.5, presence_penalty=0.25))


def test_logit_bias_is_added() -> None:
    expected = contested_logits()
    logits = expected.clone()
    expected[0, 3] += 4.0
    expected[0, 500] -= 100.0
    assert_edited(logits, expected, slot_init(0, logit_bias={3: 4.0, 500: -100.0}))


def assert_edited(logits: Tensor, expected: Tensor, row: SlotInit) -> None:
    """The row draws the same tokens from `logits` as a plain row of the same seed from `expected`."""
    before = logits.clone()
    positions = range(len(row.token_ids), len(row.token_ids) + 300)
    sampled = []
    for place in positions:
        edited, plain = sampler_with(row), sampler_with(slot_init(0, row.token_ids, seed=row.seed))
        sampled.append((tokens_of(edited, logits, [0], [place]), tokens_of(plain, expected, [0], [place])))
    assert all(ours == theirs for ours, theirs in sampled)
    unedited = sampler_with(slot_init(0, row.token_ids, seed=row.seed))
    assert [token for token, _ in sampled] != [tokens_of(unedited, logits, [0], [place]) for place in positions]
    assert torch.equal(logits, before)


def test_penalties_follow_sampled_tokens() -> None:
    logits = torch.zeros(1, VOCAB)
    logits[0, :4] = torch.tensor([1.0, 0.9, 0.8, 0.7])
    sampler = sampler_with(slot_init(0, temperature=0, presence_penalty=1.0))
    assert [tokens_of(sampler, logits, [0], [3 + step])[0] for step in range(4)] == [0, 1, 2, 3]


def test_min_tokens_forbids_every_way_to_end_until_it_is_reached() -> None:
    logits = torch.zeros(2, VOCAB)
    logits[:, EOS], logits[:, 40], logits[:, 8] = 9.0, 8.0, 7.0
    params: dict[str, Any] = {"temperature": 0, "stop_token_ids": (40,)}
    sampler = sampler_with(slot_init(0, min_tokens=2, **params), slot_init(1, **params))
    assert [tokens_of(sampler, logits, [0, 1], [place] * 2) for place in (3, 4, 5)] == [[8, EOS], [8, EOS], [EOS] * 2]


def test_logprobs_are_the_models_own_before_any_processing() -> None:
    logits = random_logits(3)
    sampler = sampler_with(
        slot_init(0, temperature=0.3, top_k=3, logprobs=4, logit_bias={4: 9.0}, frequency_penalty=1.0),
        slot_init(1),
        slot_init(2, temperature=0, logprobs=0),
    )
    sampled = sampler.sample(logits, [0, 1, 2], [3, 3, 3])
    expected = logits.log_softmax(-1)
    first, second, third = sampled.read().logprobs
    assert second is None
    assert first is not None
    assert third is not None
    assert first.token_id == sampled.token_ids[0]
    assert first.logprob == pytest.approx(float(expected[0, first.token_id]), abs=1e-5)
    values, tokens = expected[0].topk(4)
    assert [token for token, _ in first.top] == tokens.tolist()
    assert [value for _, value in first.top] == pytest.approx(values.tolist(), abs=1e-5)
    assert (third.token_id, third.top) == (int(logits[2].argmax()), ())


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("params", [{"temperature": 0}, {}, {"top_p": 0.9, "top_k": 4}])
def test_rows_whose_logits_are_not_finite_are_named_and_the_others_sampled(
    value: float, params: dict[str, Any]
) -> None:
    logits = random_logits(3)
    bad = logits.clone()
    bad[1, 77] = value
    rows = (slot_init(4, presence_penalty=1.0, logprobs=1), slot_init(0, **params, logprobs=1), slot_init(2))
    chosen = sampler_with(*rows).sample(bad, [4, 0, 2], [3, 3, 3]).read()
    assert [place for place, _ in chosen.failed] == [1]
    assert [logprob is not None for logprob in chosen.logprobs] == [True, False, False]
    first, last = (tokens_of(sampler_with(*rows), logits[[i]], [row], [3])[0] for i, row in ((0, 4), (2, 2)))
    assert chosen.tokens == (first, 0, last)
