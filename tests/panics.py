"""What a Rust library raises when it panics."""

from __future__ import annotations


class PanicException(BaseException):
    """As pyo3 makes it for each library: of this name, derived from BaseException."""


PanicException.__module__ = "pyo3_runtime"
