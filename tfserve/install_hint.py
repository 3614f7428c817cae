"""The command that adds an extra, as it works where it is read. `tfserve` on the package index is another project."""

from __future__ import annotations

import re
import shlex
import sys
from importlib.metadata import PackageNotFoundError, requires
from pathlib import Path


def install_command(extra: str) -> str:
    """The shell command that adds what `extra` needs to the Python that runs this.

    In a checkout, with paths as short as the current directory allows: `.venv/bin/python -m pip install -e '.[gguf]'`.
    Elsewhere, as after an installation from a wheel, it names the extra's packages.
    """
    root = Path(__file__).parents[1]
    here = Path.cwd()
    python = Path(sys.executable)
    if not (root / "pyproject.toml").is_file():
        return f"{shlex.quote(str(python))} -m pip install {shlex.join(requirements(extra))}"
    if python.is_relative_to(here):
        python = python.relative_to(here)
    target = f"{'.' if root == here else root}[{extra}]"
    return f"{shlex.quote(str(python))} -m pip install -e {shlex.quote(target)}"


def requirements(extra: str) -> list[str]:
    """The packages of `extra` with their versions. Only the extra's name where tfserve itself is not installed."""
    try:
        declared = [line.partition(";") for line in requires("tfserve") or []]
    except PackageNotFoundError:
        return [extra]
    marked = re.compile(rf"""extra\s*==\s*["']{re.escape(extra)}["']""")
    return [requirement.strip() for requirement, _, marker in declared if marked.search(marker)]
