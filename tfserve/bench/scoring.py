"""Scores a client's records with engine.qos, from the arrival of each token and the reading rate."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import msgspec
import numpy as np

from tfserve.bench.client import RequestRecord
from tfserve.engine.scheduling.qos import QosReport, Served, qos, score
from tfserve.engine.scheduling.token_buffer import AUTO, NAMED_RATES
from tfserve.errors import TfserveError

QOS_TAU_TOKENS = 10.0
QOS_ALPHA = 0.05
QOS_TTFT_PENALTY = 1.0
QOS_STALL_PENALTY = 1.0
"""Parameters of the QoS number, for which the paper gives no values. A token loses weight from 10 unread ones on, and
all of it at 30. A second of waiting, for the first or a later token, costs one token."""


class Quality(msgspec.Struct, frozen=True):
    """Scores of a run, and the QoS number with the parameters above."""

    report: QosReport
    qos: float


def score_rate(rate: float | str | None, override: float | None) -> float | None:
    """The rate in tokens/s for a request's score: `override`, else the rate it was sent with, or None.

    Raises TfserveError for "auto", because the server decides its value.
    """
    if override is not None:
        return override
    if rate == AUTO:
        raise TfserveError("--rate auto is the server's choice: say with --score-rate at how many tokens/s to score it")
    return NAMED_RATES[rate] if isinstance(rate, str) else rate


def token_times(record: RequestRecord) -> list[float]:
    """Arrival times of all output tokens, in order; empty if there was no chunk.

    Tokens without a chunk of their own are spread evenly over the chunks, because their chunk is unknown.
    """
    if not record.chunks:
        return []
    arrived = [when for when, tokens in record.chunks for _ in range(tokens)] or [record.chunks[0][0]]
    n = record.num_tokens
    return [arrived[index * len(arrived) // n] for index in range(n)]


def served(record: RequestRecord) -> Served:
    """The record for engine.qos. Its clock starts when the request is sent; a request without a rate has no reader."""
    rate = math.nan if record.rate is None else record.rate
    return Served(record.sent_s, rate, np.array(token_times(record), np.float64))


def quality(records: Sequence[RequestRecord]) -> Quality | None:
    """Scores of the completed requests; None if one of them has no reading rate."""
    completed = [record for record in records if record.error is None]
    if not completed or any(record.rate is None for record in completed):
        return None
    requests = [served(record) for record in completed]
    number = qos(
        requests,
        tau=QOS_TAU_TOKENS,
        alpha=QOS_ALPHA,
        ttft_penalty=QOS_TTFT_PENALTY,
        stall_penalty=QOS_STALL_PENALTY,
    )
    return Quality(score(requests), number)


def quality_by_rate(records: Sequence[RequestRecord]) -> dict[str, Quality]:
    """The same for each class of readers, slowest first; empty if there is only one class."""
    if quality(records) is None:
        return {}
    by_rate = sorted((record for record in records if record.error is None), key=lambda record: record.rate or 0.0)
    classes = {rate: list(group) for rate, group in itertools.groupby(by_rate, lambda record: record.rate)}
    if len(classes) < 2:
        return {}
    scored = {f"{rate:g}": quality(group) for rate, group in classes.items()}
    return {name: each for name, each in scored.items() if each is not None}
