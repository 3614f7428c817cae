"""When each token of one repeat of a burst came: a file small enough to keep, which plots.py draws."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from pathlib import Path

import msgspec
import numpy as np

from tfserve.bench.client import RequestRecord
from tfserve.bench.scoring import token_times
from tfserve.engine.scheduling.qos import Served


class Stream(msgspec.Struct, frozen=True):
    """One answer, in whole milliseconds: when it was asked for, and from each token to the one before (or that)."""

    sent_ms: int
    rate: float | None
    gaps_ms: list[int]

    @classmethod
    def of(cls, record: RequestRecord) -> Stream:
        """What of a record is kept."""
        sent_ms = round(1000 * record.sent_s)
        token_ms = [round(1000 * when) for when in token_times(record)]
        gaps_ms = [later - sooner for sooner, later in zip([sent_ms, *token_ms], token_ms, strict=False)]
        return cls(sent_ms, record.rate, gaps_ms)

    def served(self) -> Served:
        """The answer as qos sees it."""
        token_s = (self.sent_ms + np.cumsum(np.array(self.gaps_ms, np.int64))) / 1000
        return Served(self.sent_ms / 1000, math.nan if self.rate is None else self.rate, token_s)


class KeptCell(msgspec.Struct, frozen=True):
    """The answers of one policy in one repeat, in the order of the prompts."""

    policy: str
    repeat: int
    streams: list[Stream]


class TimelineFile:
    """A JSON file of cells, one a policy: about 4 bytes a token."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def read(self) -> list[KeptCell]:
        """What the file holds; nothing if there is none."""
        if not self._path.exists():
            return []
        return msgspec.json.decode(self._path.read_bytes(), type=list[KeptCell])

    def add(self, policy: str, repeat: int, records: Sequence[RequestRecord]) -> None:
        """Keep a cell, in place of an older one of this policy; a run killed meanwhile leaves the file as it was."""
        cell = KeptCell(policy, repeat, [Stream.of(record) for record in records])
        cells = [*(kept for kept in self.read() if kept.policy != policy), cell]
        self._path.parent.mkdir(parents=True, exist_ok=True)
        partial = self._path.with_suffix(".partial")
        # A line a cell: a diff shows which cells are new.
        partial.write_bytes(b"[\n" + b",\n".join(msgspec.json.encode(each) for each in cells) + b"\n]\n")
        os.replace(partial, self._path)
