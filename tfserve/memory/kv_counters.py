"""KVCounters: the columns that the KV manager writes, and schedulers read whole. Torch-free."""

from __future__ import annotations

from typing import Protocol

from tfserve.types import RequestId


class IntColumn(Protocol):
    """Integers, one for each row."""

    def __getitem__(self, row: int, /) -> int:
        """The number in a row."""
        ...

    def __setitem__(self, row: int, number: int, /) -> None:
        """Write the number of a row."""
        ...


class RowRef(Protocol):
    """Where a request's row is: the table keeps `index` true when rows move."""

    @property
    def index(self) -> int:
        """The row, now."""
        ...


class KVCounters(Protocol):
    """A table with a row for each live request, zeros at first. KVCacheManager alone writes these columns.

    A request has its row before it gets KV, and keeps it until all of its KV is released.
    """

    @property
    def num_computed(self) -> IntColumn:
        """Tokens that have KV, or room for it in the step being planned."""
        ...

    @property
    def host_tokens(self) -> IntColumn:
        """Tokens [0, this) are on the host and acknowledged."""
        ...

    @property
    def device_blocks(self) -> IntColumn:
        """Device blocks held, those with a load under way included."""
        ...

    def ref(self, req: RequestId) -> RowRef:
        """The row of a live request; KeyError if it has none."""
        ...
