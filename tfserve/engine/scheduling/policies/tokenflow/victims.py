"""Victims: the requests that one pass may evict for others. Torch-free."""

from __future__ import annotations

from typing import Literal

import numpy as np

from tfserve.arrays import Floats, Ints, Mask, RowIndex

Way = Literal["affords", "survives"]


class Victims:
    """Residents that may be evicted, least loss first, one element each.

    Lists, because they are looked at one by one. `can_go` says which ones afford a switch, and which survive one with
    the margin that admission asks for. `left` are the indices of those still there. `max_headroom` is a bound for those
    that can go, and for all: it only falls.
    """

    def __init__(
        self,
        rows: RowIndex,
        headroom: Floats,
        gain: Floats,
        need: Ints,
        *,
        has_reader: Mask,
        affords: Mask,
        survives: Mask,
    ) -> None:
        self.rows: list[int] = rows.tolist()
        self.headroom: list[float] = headroom.tolist()
        self.gain: list[float] = gain.tolist()
        self.need: list[int] = need.tolist()
        self.has_reader: list[bool] = has_reader.tolist()
        self.can_go: dict[Way, list[bool]] = {"affords": affords.tolist(), "survives": survives.tolist()}
        self.left = list(range(len(rows)))
        self.max_headroom: dict[Way | None, float] = {}
        self._bound("affords")
        self._bound("survives")

    def make_room(
        self,
        blocks: int,
        slots: int,
        headroom: float,
        *,
        for_reader: bool,
        way: Way,
        min_unread_s: float,
        starvation_gap_s: float,
    ) -> list[int]:
        """The first of those left that together free `blocks` and `slots`; empty if there are too few.

        A victim must have `min_unread_s` to read, and be able to go; or be better off by `starvation_gap_s`. A request
        without a reader only displaces requests that have one: between two without, a switch gains nothing for either.
        """
        min_unread_s -= 1e-9
        if self.max_headroom[None] - headroom < starvation_gap_s and self.max_headroom[way] < min_unread_s:
            return []
        can_go, headrooms, need = self.can_go[way], self.headroom, self.need
        chosen: list[int] = []
        for index in self.left:
            if not for_reader and not self.has_reader[index]:
                continue
            has = headrooms[index]
            if has - headroom >= starvation_gap_s or (has >= min_unread_s and can_go[index]):
                chosen.append(index)
                blocks -= need[index]
                slots -= 1
                if blocks <= 0 and slots <= 0:
                    return chosen
        self._bound(way)
        return []

    def _bound(self, way: Way) -> None:
        can_go, headrooms = self.can_go[way], self.headroom
        self.max_headroom[None] = max((headrooms[index] for index in self.left), default=-np.inf)
        self.max_headroom[way] = max((headrooms[index] for index in self.left if can_go[index]), default=-np.inf)
