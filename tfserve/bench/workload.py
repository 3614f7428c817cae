"""The workload of a benchmark: arrival times, prompts, lengths and reading rates, all functions of a seed."""

from __future__ import annotations

import itertools
import math
import random
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec

from tfserve.engine.scheduling.token_buffer import AUTO, NAMED_RATES
from tfserve.errors import NOT_JSON, TfserveError
from tfserve.misfit import why_not_json

# English words, each one token after a space in the common BPE vocabularies: a prompt's number of tokens is its number
# of words plus the template's tokens.
_WORD_LIST = """
time year people way day man thing woman life child world school state family student group country problem hand part
place case week company system program question work government number night point home water room mother area money
story fact month lot right study book eye job word business issue side kind head house service friend father power hour
game line end member law car city community name president team minute idea body information back parent face others
level office door health person art war history party result change morning reason research girl guy moment air teacher
"""
WORDS = tuple(_WORD_LIST.split())

BUNDLED_PROMPTS = Path(__file__).with_name("data") / "prompts.jsonl"
"""500 real prompts with the lengths of reference answers; licences and sources are in SOURCES.md beside it."""

Rate = float | str | None
"""Value of `consumption_rate`: tokens/s or a name; None sends nothing."""


class Work(msgspec.Struct, frozen=True):
    """One request to send: its prompt, the limit of the answer and the reader's rate."""

    prompt: str
    max_tokens: int
    rate: Rate = None


class PromptRow(msgspec.Struct, frozen=True):
    """A row of a prompts file. `max_tokens` overrides the command line, `ref_output_tokens` is the reference's length,
    `prompt_tokens` that of the prompt by some tokenizer.
    """

    prompt: str
    max_tokens: int | None = None
    ref_output_tokens: int | None = None
    prompt_tokens: int | None = None


class Lengths(msgspec.Struct, frozen=True):
    """The limit of answers: `default` tokens; with `clamp` the length of the reference answer, between two bounds."""

    default: int
    clamp: tuple[int, int] | None = None

    def of(self, row: PromptRow) -> int:
        """max_tokens of one row: its own, else its reference's, else the default."""
        if row.max_tokens is not None:
            return row.max_tokens
        if self.clamp is None:
            return self.default
        low, high = self.clamp
        return min(max(row.ref_output_tokens or self.default, low), high)


def parse_request_rate(text: str) -> float:
    """Requests per second from "2.5", or infinity from "inf" or "burst". Raises ValueError for anything else."""
    rate = math.inf if text in {"inf", "burst"} else _number(text)
    if not rate > 0:
        raise ValueError(f"a rate must be a number above 0, got {text}")
    return rate


def parse_positive(text: str, name: str = "number") -> float:
    """A finite number above 0. Raises ValueError with `name`."""
    value = _number(text)
    if not 0 < value < math.inf:
        raise ValueError(f"a {name} must be a finite number above 0, got {text}")
    return value


def _number(text: str) -> float:
    """The number in a text; NaN, which is outside all bounds, for any other text."""
    try:
        return float(text)
    except ValueError:
        return math.nan


def parse_rate(text: str) -> float | str:
    """A reading rate: tokens/s above 0, or the name of one. Raises ValueError."""
    return text if text == AUTO or text in NAMED_RATES else parse_positive(text, "rate")


def parse_rate_mix(text: str) -> dict[float | str, float]:
    """Rates and their shares from "8:0.4,16:0.6". Raises ValueError unless the shares are above 0 and add up to 1."""
    mix: dict[float | str, float] = {}
    for part in text.split(","):
        rate, _, share = part.partition(":")
        mix[parse_rate(rate)] = _number(share)
    if not min(mix.values()) > 0 or not math.isclose(sum(mix.values()), 1.0, abs_tol=1e-6):
        raise ValueError(f"shares must be above 0 and add up to 1, got {text}")
    return mix


def parse_clamp(text: str) -> tuple[int, int]:
    """Bounds from "96:256". Raises ValueError unless 1 <= low <= high."""
    bounds = re.fullmatch(r"(\d+):(\d+)", text)
    low, high = map(int, bounds.groups()) if bounds else (0, 0)
    if not 1 <= low <= high:
        raise ValueError(f"needs two integers LOW:HIGH with 1 <= low <= high, got {text}")
    return low, high


def mixed_rates(mix: dict[float | str, float], count: int, seed: int) -> list[float | str]:
    """A rate for each of `count` requests: as close to the shares as possible, in an order by the seed."""
    edges = [round(count * share) for share in itertools.accumulate(mix.values())]
    counts = [end - begin for begin, end in itertools.pairwise([0, *edges[:-1], count])]
    rates = [rate for rate, times in zip(mix, counts, strict=True) for _ in range(times)]
    random.Random(seed).shuffle(rates)
    return rates


def arrival_times(rate: float, count: int, seed: int) -> list[float]:
    """When each of `count` requests arrives, in seconds: a Poisson process from 0, or all at 0 for an infinite rate."""
    if math.isinf(rate):
        return [0.0] * count
    rng = random.Random(seed)
    gaps = (rng.expovariate(rate) for _ in range(count - 1))
    return list(itertools.accumulate(gaps, initial=0.0))


def random_prompt(num_words: int, rng: random.Random) -> str:
    """Text of exactly `num_words` random common words, so that a prefix cache has no effect."""
    return " ".join(rng.choices(WORDS, k=num_words))


def read_prompts(path: Path, count: int, seed: int) -> list[PromptRow]:
    """`count` rows drawn from a JSON-lines file with a "prompt" field; no row repeats before all were drawn.

    Raises TfserveError naming the line that is not such a row.
    """
    rows = read_rows(path)
    random.Random(seed).shuffle(rows)
    return list(itertools.islice(itertools.cycle(rows), count))


def read_rows(path: Path) -> list[PromptRow]:
    """All rows of a JSON-lines file of prompts, in order. Raises TfserveError."""
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        known = "give a .jsonl file, prompts or random"
        raise TfserveError(f"--dataset: cannot read {path}: {error.strerror}; {known}") from None
    rows = [_row(line, f"{path}:{number}") for number, line in enumerate(lines, 1) if line.strip()]
    if not rows:
        raise TfserveError(f"--dataset: {path} holds no rows; give a file with one JSON object a line")
    return rows


def write_rows(path: Path, rows: Sequence[PromptRow]) -> None:
    """Write a file that `read_rows` reads."""
    path.write_bytes(b"".join(msgspec.json.encode(_given(row)) + b"\n" for row in rows))


def _given(row: PromptRow) -> dict[str, Any]:
    return {name: value for name, value in msgspec.structs.asdict(row).items() if value is not None}


def _row(line: bytes, where: str) -> PromptRow:
    try:
        row = msgspec.json.decode(line, type=PromptRow)
    except NOT_JSON:
        reason = why_not_json(line, PromptRow)
        raise TfserveError(
            f'--dataset: {where} must be a JSON object with a non-empty text "prompt": {reason}'
        ) from None
    if not row.prompt or (row.max_tokens is not None and row.max_tokens < 1):
        raise TfserveError(f'--dataset: {where} needs a non-empty text "prompt", and "max_tokens", if any, above 0')
    return row


class PromptSize(msgspec.Struct, frozen=True):
    """The server's tokens for a prompt of random words: `fixed` for the template and `per_word` for each word."""

    fixed: float
    per_word: float

    @classmethod
    def from_two(cls, small: tuple[int, int], large: tuple[int, int]) -> PromptSize:
        """From two measured (words, prompt tokens). Raises TfserveError if more words do not give more tokens."""
        per_word = (large[1] - small[1]) / (large[0] - small[0])
        if per_word <= 0:
            raise TfserveError(
                f"the server counted {small[1]} tokens for {small[0]} words but {large[1]} for {large[0]}: "
                "it cuts prompts or miscounts; use --dataset FILE"
            )
        return cls(fixed=small[1] - per_word * small[0], per_word=per_word)

    def words_for(self, num_tokens: int) -> int:
        """Number of words for a prompt of about `num_tokens` tokens. Raises TfserveError if the template has more."""
        words = round((num_tokens - self.fixed) / self.per_word)
        if words < 1:
            raise TfserveError(
                f"--input-len {num_tokens}: the server adds {self.fixed:.0f} tokens of its own to every prompt; "
                "ask for more, or use --endpoint completions"
            )
        return words
