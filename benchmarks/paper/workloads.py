"""The workloads of the experiments: arrivals, lengths and rates, all functions of a seed."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any, Literal

import msgspec
import numpy as np
import numpy.typing as npt

from tfserve.arrays import Floats, Ints
from tfserve.engine.simulation.engine import SimRequest
from tfserve.errors import TfserveError

_SIGMA = 0.2
"""Standard deviation of normal lengths, as a share of their mean."""

_MIN_TOKENS = 16


class Burst(msgspec.Struct, frozen=True, tag=True):
    """All arrive at once."""

    count: int


class Poisson(msgspec.Struct, frozen=True, tag=True):
    """`count` arrivals at `per_s` a second, the first at 0."""

    count: int
    per_s: float


class Trace(msgspec.Struct, frozen=True, tag=True):
    """Arrivals and lengths of a CSV of data/, `speed` times as fast, cut to `window_s` seconds of its own time.

    Rows keep their lengths, clamped to `most_tokens` each; with `own_lengths` false the workload's replace them.
    """

    file: str
    speed: float = 1.0
    window_s: float = np.inf
    most_tokens: int = 4096
    own_lengths: bool = True


class Normal(msgspec.Struct, frozen=True, tag=True):
    """Normal lengths around these means, sigma 20 %, clamped to [16, twice the mean]."""

    prompt: int
    output: int


class Sampled(msgspec.Struct, frozen=True, tag=True):
    """Rows of a CSV of prompt and answer lengths in data/, drawn with replacement."""

    file: str = "sharegpt_lengths.csv"


class Workload(msgspec.Struct, frozen=True, kw_only=True):
    """Requests of one experiment.

    `rates` are (share, tokens/s) of the readers. `told` are the rates that requests name: "true", "blunt" (the mean for
    all), or "wrong" (off by up to a factor of two). max_tokens is `looseness` times the answer's length: above 1 the
    model stops by itself before it.
    """

    arrivals: Burst | Poisson | Trace
    lengths: Normal | Sampled
    rates: tuple[tuple[float, float], ...] = ((1.0, 20.0),)
    told: Literal["true", "blunt", "wrong"] = "true"
    looseness: float = 1.0

    @property
    def mean_rate(self) -> float:
        """Tokens/s of the average reader."""
        return sum(share * rate for share, rate in self.rates)

    def requests(self, seed: int) -> list[SimRequest]:
        """The requests, in order of arrival."""
        # A separate stream of random numbers for each property, so that a change of one does not change the others.
        arrival, length, rate, told = (np.random.default_rng([seed, question]) for question in range(4))
        arrivals, prompts, outputs = self._when_and_how_long(arrival, length)
        count = len(arrivals)
        shares = np.array([share for share, _ in self.rates])
        rates = rate.choice([value for _, value in self.rates], size=count, p=shares / shares.sum())
        told_rates = self._told(rates, told)
        return [
            SimRequest(
                arrival_s=float(arrivals[i]),
                prompt_tokens=int(prompts[i]),
                output_tokens=int(outputs[i]),
                max_tokens=round(int(outputs[i]) * self.looseness),
                rate=float(rates[i]),
                told_rate=float(told_rates[i]),
            )
            for i in range(count)
        ]

    def _when_and_how_long(
        self, arrival: np.random.Generator, length: np.random.Generator
    ) -> tuple[Floats, Ints, Ints]:
        match self.arrivals:
            case Burst(count):
                return np.zeros(count), *self._lengths(count, length)
            case Poisson(count, per_s):
                gaps = arrival.exponential(1 / per_s, count - 1)
                return np.concatenate([[0.0], np.cumsum(gaps)]), *self._lengths(count, length)
            case Trace() as trace:
                rows = read_columns(trace.file, ("arrival_s", "prompt_tokens", "output_tokens"))
                rows = rows[rows[:, 0] < trace.window_s]
                times = rows[:, 0] / trace.speed
                if not trace.own_lengths:
                    return times, *self._lengths(len(rows), length)
                prompts, outputs = np.clip(rows[:, 1:], 1, trace.most_tokens).astype(np.int64).T
                return times, prompts, outputs

    def _lengths(self, count: int, random: np.random.Generator) -> tuple[Ints, Ints]:
        if isinstance(self.lengths, Sampled):
            rows = read_columns(self.lengths.file, ("prompt_tokens", "output_tokens"))
            prompts, outputs = random.choice(rows, count).astype(np.int64).T
            return prompts, outputs
        return _normal(self.lengths.prompt, count, random), _normal(self.lengths.output, count, random)

    def _told(self, rates: Floats, random: np.random.Generator) -> Floats:
        if self.told == "blunt":
            return np.full(len(rates), self.mean_rate)
        if self.told == "wrong":
            return rates * 2.0 ** random.uniform(-1.0, 1.0, len(rates))
        return rates


def _normal(mean: int, count: int, random: np.random.Generator) -> Ints:
    values = np.rint(random.normal(mean, _SIGMA * mean, count))
    return np.clip(values, _MIN_TOKENS, 2 * mean).astype(np.int64)


def read_columns(file: str, columns: tuple[str, ...]) -> npt.NDArray[Any]:
    """These columns of a CSV in data/ as numbers, `[rows, columns]`. Raises TfserveError for invalid numbers."""
    path = Path(__file__).with_name("data") / file
    try:
        with path.open(encoding="utf-8") as lines:
            rows = [[float(row[column]) for column in columns] for row in csv.DictReader(lines)]
    except (OSError, KeyError, ValueError) as error:
        raise TfserveError(f"{file} is not a table with columns {', '.join(columns)}: {error!r}") from None
    return np.array(rows, np.float64).reshape(-1, len(columns))
