"""The import stack, `cli, http, bench -> engine -> model, memory -> what all share`, read from the source."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import tfserve

ROOT = Path(tfserve.__file__).parent
ENGINE = {"engine", "engine.frontend", "engine.core", "engine.scheduling", "engine.simulation"}
MEMORY = {"memory", "memory.storage", "memory.transfers"}
ALLOWED = {
    "cli": {"cli", "http", "bench", "model", "base", *ENGINE},
    "http": {"http", "model", "base", "engine", "engine.frontend", "engine.scheduling"},
    "bench": {"bench", "model", "base", *ENGINE},
    "engine": {"engine", "engine.frontend", "engine.scheduling", "model", "base"},
    "engine.frontend": {"engine.frontend", "engine.core", "engine.scheduling", "model", "base"},
    "engine.core": {"engine.core", "engine.scheduling", "model", "base", *MEMORY},
    "engine.simulation": {"engine.simulation", "engine.core", "engine.scheduling", "base", *MEMORY},
    "engine.scheduling": {"engine.scheduling", "memory", "model", "base"},
    "model": {"model", "base"},
    "memory": {"memory", "base"},
    "memory.storage": {"memory.storage", "base"},
    "memory.transfers": {"memory.transfers", "memory.storage", "base"},
    "base": {"base"},
}
"""From which rooms each one imports. A package that is not named here belongs to the one it lies in."""

TORCH_FREE = [
    "tfserve",
    "tfserve.plan",
    "tfserve.types",
    "tfserve.settings",
    "tfserve.config",
    "tfserve.cli",
    "tfserve.engine.engine",
    "tfserve.engine.scheduling.scheduler",
    "tfserve.engine.core.loop",
    "tfserve.engine.scheduling.policies",
    "tfserve.memory.block_pool",
    "tfserve.memory.kv_manager",
    "tfserve.http.server",
    "tfserve.model.text.tokenizer",
]


def room_of(module: str) -> str:
    """The room a dotted module name belongs to: 'cli' for users' doors, 'base' for what all share."""
    parts = module.split(".")[1:]
    if parts and parts[0] in {"cli", "generate", "__main__", "__init__"}:
        return "cli"
    rooms = (".".join(parts[:length]) for length in (2, 1))
    return next((room for room in rooms if room in ALLOWED and (ROOT / room.replace(".", "/")).is_dir()), "base")


def imports_of(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
    return {name for name in names if name.startswith("tfserve.")}


@pytest.mark.parametrize("path", sorted(ROOT.rglob("*.py")), ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_down_the_stack(path):
    module = ".".join(("tfserve", *path.relative_to(ROOT).with_suffix("").parts))
    upward = {name for name in imports_of(path) if room_of(name) not in ALLOWED[room_of(module)]}
    assert not upward


def test_no_file_is_two_nouns():
    assert [str(path) for path in ROOT.rglob("*.py") if len(path.read_text().splitlines()) > 400] == []


def test_what_the_http_process_and_the_policies_import_is_torch_free():
    code = (
        f"import sys\nfor name in {TORCH_FREE}: __import__(name)\n"
        "from tfserve import Engine, EngineConfig, SamplingParams\n"
        "print({'torch', 'transformers'} & {*sys.modules})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
