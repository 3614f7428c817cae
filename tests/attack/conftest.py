"""Attacks on the HTTP side use its servers with a fake engine."""

from tests.http.conftest import start

__all__ = ["start"]
