"""`python -m tests.http.serve_fake LOADER KEY=VALUE...`: `serve` in a process of its own, with a fake engine."""

from __future__ import annotations

import logging
import sys

from tests.http import fakes
from tfserve.config import load_config
from tfserve.http.server import serve

if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, stream=sys.stderr)
    loader, *settings = sys.argv[1:]
    overrides = dict(setting.split("=", 1) for setting in settings)
    sys.exit(serve(load_config(None, {"model": "models/tiny", **overrides}), getattr(fakes, loader)))
