"""The JavaScript client holds the same conversation; its assertions are in node/converse.mjs."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from tests.serving import Server

SCRIPT = Path(__file__).parent / "node" / "converse.mjs"
MODULES = Path(__file__).parents[2] / "build" / "node" / "node_modules"
"""Where `make test-all` installs node/package.json."""


@pytest.mark.slow
def test_javascript_openai(server: Server, tmp_path: Path) -> None:
    node = shutil.which("node")
    if node is None:
        pytest.skip("Node.js is not on this machine")
    if not (MODULES / "openai").is_dir():
        pytest.skip("the npm package openai is not installed; `make test-all` does")
    # Node looks for packages beside the script.
    (tmp_path / "node_modules").symlink_to(MODULES)
    shutil.copy(SCRIPT, tmp_path)
    command = [node, str(tmp_path / SCRIPT.name), server.url + "/v1", "key", "tiny"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.split() == ["answer", "stream", "tool", "result", "errors", "abort"]
