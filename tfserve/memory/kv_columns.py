"""KVColumns: the KV counters of many requests as arrays, for schedulers that look at thousands. Torch-free."""

from __future__ import annotations

from array import array
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from tfserve.types import RequestId

IntColumn = npt.NDArray[np.int64]


class ResidencyTable:
    """The counters of all requests, as columns; a row per Residency. Row 0 is of zeros: a request without KV.

    array.array because one element is set in 30 ns, and numpy reads the whole column without a copy. `moved` says for
    each request that got or gave back a row lately which one it has now: whoever keeps an index of rows need not look
    anybody up who did not move.
    """

    def __init__(self) -> None:
        self.state = array("q", [0])
        self.num_tokens = array("q", [0])
        self.num_host_tokens = array("q", [0])
        self.num_device_blocks = array("q", [0])
        self._columns = (self.state, self.num_tokens, self.num_host_tokens, self.num_device_blocks)
        self._free: list[int] = []
        self.moved: dict[RequestId, int] = {}

    def open(self, req: RequestId) -> int:
        """A row of zeros."""
        if self._free:
            row = self._free.pop()
        else:
            for column in self._columns:
                column.append(0)
            row = len(self.state) - 1
        self.moved[req] = row
        return row

    def close(self, row: int, req: RequestId) -> None:
        """Give a row back."""
        for column in self._columns:
            column[row] = 0
        self._free.append(row)
        self.moved[req] = 0

    def gather(self, rows: npt.ArrayLike, block_size: int) -> KVColumns:
        """The counters of some rows, copied."""
        index = np.asarray(rows, dtype=np.intp)
        return KVColumns(block_size, *(np.frombuffer(column, dtype=np.int64)[index] for column in self._columns))


@dataclass(frozen=True, slots=True)
class KVColumns:
    """What a scheduler must know about many requests' KV: one array per counter, int64, in the order asked for."""

    block_size: int
    state: IntColumn
    num_tokens: IntColumn
    num_host_tokens: IntColumn
    num_device_blocks: IntColumn

    @property
    def num_blocks(self) -> IntColumn:
        """Blocks that the tokens take, on whichever tier."""
        return -(-self.num_tokens // self.block_size)

    @property
    def num_dirty_tokens(self) -> IntColumn:
        """Tokens to store before the KV could leave the device without loss."""
        return self.num_tokens - self.num_host_tokens

    @property
    def num_clean_blocks(self) -> IntColumn:
        """Of a request in state DEVICE: device blocks that a preemption frees at once; the others take a store."""
        whole = self.num_host_tokens == self.num_tokens
        return np.where(whole, self.num_blocks, self.num_host_tokens // self.block_size)

    @property
    def num_missing_blocks(self) -> IntColumn:
        """Device blocks that a resume has to find and load."""
        return self.num_blocks - self.num_device_blocks
