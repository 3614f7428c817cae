"""BlockPool: which KV blocks are free, who else holds one, and which free blocks lie side by side. Torch-free."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from tfserve.plan import NULL_BLOCK, BlockId

_FREE, _HELD = b"\x01", b"\x00"


class BlockPool:
    """A set of numbered blocks with reference counts; block 0 is reserved (plan.NULL_BLOCK).

    Free blocks are one byte each in a bytearray, so that finding a run of them is a substring search at C speed.
    Adjacent blocks matter: transfers move a run of neighbours as one copy.
    """

    def __init__(self, num_blocks: int) -> None:
        if num_blocks < 2:
            raise ValueError(f"a pool needs the reserved block and at least one more, got {num_blocks}")
        self.num_blocks = num_blocks
        self.num_free = num_blocks - 1
        self._free = bytearray(_FREE * num_blocks)
        self._free[NULL_BLOCK] = 0
        self._refs = [0] * num_blocks

    def allocate(self, n: int, after: BlockId | None = None, run: int = 1) -> tuple[BlockId, ...] | None:
        """Take n blocks, each with one reference; None if fewer are free (then nothing is taken).

        They follow `after` where those are free. Otherwise they start a free, aligned stretch of `run` blocks (a power
        of two), so that requests of one size sit at equal distances and each has room to grow; failing that, the first
        free run that is long enough, and last whatever is free.
        """
        if n > self.num_free:
            return None
        taken: list[BlockId] = []
        if after is not None:
            self._take_from(after + 1, n, taken)
        if len(taken) < n:
            self._take_from(self._find_run(n - len(taken), run), n, taken)
        while len(taken) < n:
            self._take_from(self._free.find(_FREE), n, taken)
        return tuple(taken)

    def retain(self, blocks: Iterable[BlockId]) -> None:
        """Add a reference to each held block (a fork shares its parent's)."""
        for block in blocks:
            if self._refs[block] == 0:
                raise ValueError(f"block {block} is free and cannot be shared")
            self._refs[block] += 1

    def free(self, blocks: Iterable[BlockId]) -> None:
        """Drop a reference to each block; those with none left become free."""
        for block in blocks:
            if self._refs[block] == 0:
                raise ValueError(f"block {block} is free already")
            self._refs[block] -= 1
            if self._refs[block] == 0:
                self._free[block] = 1
                self.num_free += 1

    def references(self, block: BlockId) -> int:
        """How many holders a block has; 0 means free (or reserved)."""
        return self._refs[block]

    def check(self, holdings: Iterable[Sequence[BlockId]]) -> None:
        """Raise AssertionError unless the holders' lists account for every block: free, reserved or referenced."""
        counts = [0] * self.num_blocks
        for blocks in holdings:
            for block in blocks:
                counts[block] += 1
        if counts != self._refs:
            wrong = [b for b in range(self.num_blocks) if counts[b] != self._refs[b]]
            raise AssertionError(f"blocks {wrong[:8]}: references disagree with their holders")
        for index in range(1, self.num_blocks):
            if bool(self._free[index]) == bool(counts[index]):
                raise AssertionError(f"block {index} is both free and held, or neither")
        if counts[NULL_BLOCK] or self._free[NULL_BLOCK]:
            raise AssertionError("the reserved block was handed out")
        if self.num_free != self._free.count(1):
            raise AssertionError(f"{self._free.count(1)} blocks are free, the pool counts {self.num_free}")

    def _take_from(self, start: int, n: int, taken: list[BlockId]) -> None:
        """Extend `taken` to at most n blocks with the free ones that stand side by side from `start`."""
        block = start
        while len(taken) < n and 0 <= block < self.num_blocks and self._free[block]:
            self._free[block] = 0
            self._refs[block] = 1
            self.num_free -= 1
            taken.append(BlockId(block))
            block += 1

    def _find_run(self, n: int, run: int) -> int:
        """Start of an aligned free stretch of `run` blocks, else of any free stretch of n, else -1."""
        # Slots begin at block 1, after the reserved one.
        pattern = _FREE * run
        if run >= n:
            slot = self._free.find(pattern, 1)
            while slot >= 0:
                aligned = 1 + -(-(slot - 1) // run) * run
                if self._free.startswith(pattern, aligned):
                    return aligned
                slot = self._free.find(pattern, aligned + 1)
        return self._free.find(_FREE * n)
