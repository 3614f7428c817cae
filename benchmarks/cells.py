"""Results of a long run, saved after each cell, so that a killed run can continue."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

Cell = dict[str, Any]


class Store:
    """A JSON file of cells, each one policy in one repeat. The requests of a cell go to `records`, if given."""

    def __init__(self, path: Path, records: Path | None = None) -> None:
        self._path = path
        self._records = records
        self._head: dict[str, Any] = {}
        self._cells: list[Cell] = []

    def open(self, settings: dict[str, Any], environment: dict[str, Any]) -> None:
        """Start, or continue with the cells in the file. Raises SystemExit if they have other settings."""
        settings = json.loads(json.dumps(settings))
        self._head = {"settings": settings, "environment": environment}
        if not self._path.exists():
            return
        found = json.loads(self._path.read_text())
        differing = [key for key in settings if found["settings"].get(key) != settings[key]]
        if differing:
            was = {key: found["settings"].get(key) for key in differing}
            raise SystemExit(f"{self._path} holds a run with other settings ({was}); choose another --output")
        self._head, self._cells = {key: found[key] for key in ("settings", "environment")}, found["cells"]

    def has(self, policy: str, repeat: int) -> bool:
        return any((cell["policy"], cell["repeat"]) == (policy, repeat) for cell in self._cells)

    def get(self, policy: str, repeat: int) -> Cell:
        """One cell. Raises KeyError."""
        for cell in self._cells:
            if (cell["policy"], cell["repeat"]) == (policy, repeat):
                return cell
        raise KeyError((policy, repeat))

    def cells(self) -> list[Cell]:
        return list(self._cells)

    def add(self, policy: str, repeat: int, result: Cell) -> None:
        """Keep a cell, on disk too; a run killed meanwhile leaves the file as it was."""
        result = dict(result)
        requests = result.pop("requests")
        if self._records is not None:
            self._records.mkdir(parents=True, exist_ok=True)
            (self._records / f"{policy}-{repeat}.json").write_text(json.dumps(requests))
        lengths = [
            [request["prompt_tokens"] or 0, request["output_tokens"] or 0, request["rate"]] for request in requests
        ]
        self._cells.append({"policy": policy, "repeat": repeat, **result, "lengths": lengths})
        self._path.parent.mkdir(parents=True, exist_ok=True)
        partial = self._path.with_suffix(".partial")
        # A line a cell: a diff shows which cells are new.
        cells = ",\n".join(json.dumps(cell) for cell in self._cells)
        partial.write_text(f'{json.dumps(self._head, indent=1)[:-2]},\n "cells": [\n{cells}\n]}}\n')
        os.replace(partial, self._path)
