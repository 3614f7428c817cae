"""Table: numpy columns with one dense row per request. Torch-free."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from tfserve.arrays import RowIndex
from tfserve.types import RequestId

_FIRST_CAPACITY = 64


class Table:
    """Rows [0, len) are live, in no particular order: a removed row's place is taken by the last one.

    So every column of all live requests is a slice, and nothing loops over requests. `defaults` gives each column's
    dtype and the value that a new row starts with.
    """

    def __init__(self, defaults: Mapping[str, tuple[type, float]]) -> None:
        self._defaults = dict(defaults)
        self._columns: dict[str, npt.NDArray[Any]] = {
            name: np.full(_FIRST_CAPACITY, default, dtype) for name, (dtype, default) in defaults.items()
        }
        self._ids: list[RequestId] = []
        self._row_of: dict[RequestId, int] = {}
        self._ids_now: tuple[RequestId, ...] | None = None

    def __len__(self) -> int:
        return len(self._ids)

    def __contains__(self, req: object) -> bool:
        return req in self._row_of

    def __getitem__(self, name: str) -> npt.NDArray[Any]:
        """The live part of a column; writing to it writes to the table. Valid until the next `add` or `remove`."""
        return self._columns[name][: len(self._ids)]

    @property
    def ids(self) -> tuple[RequestId, ...]:
        """Who each row belongs to, in row order."""
        if self._ids_now is None:
            self._ids_now = tuple(self._ids)
        return self._ids_now

    def row(self, req: RequestId) -> int:
        """The row of one request; KeyError if it has none."""
        return self._row_of[req]

    def rows(self, reqs: Iterable[RequestId]) -> RowIndex:
        """The rows of several requests, in their order; KeyError if one has none."""
        return np.fromiter(map(self._row_of.__getitem__, reqs), np.intp)

    def add(self, req: RequestId, **values: float) -> int:
        """Give `req` a row with these values, and defaults elsewhere; returns it. ValueError if it has one."""
        if req in self._row_of:
            raise ValueError(f"request {req} is in the table already")
        row = len(self._ids)
        if row == len(next(iter(self._columns.values()))):
            self._columns = {name: np.concatenate([c, np.empty_like(c)]) for name, c in self._columns.items()}
        for name, (_, default) in self._defaults.items():
            self._columns[name][row] = values.get(name, default)
        self._ids.append(req)
        self._ids_now = None
        self._row_of[req] = row
        return row

    def remove(self, req: RequestId) -> None:
        """Drop a row and move the last one into its place."""
        row = self._row_of.pop(req)
        last = len(self._ids) - 1
        moved = self._ids.pop()
        self._ids_now = None
        if row != last:
            for column in self._columns.values():
                column[row] = column[last]
            self._ids[row] = moved
            self._row_of[moved] = row
