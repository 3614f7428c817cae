"""Names of the arrays that a scheduling pass computes with: one element per request, or per row of the table."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Mask = npt.NDArray[np.bool_]

RowIndex = npt.NDArray[np.intp]
"""Rows of a table, to index its columns with."""
