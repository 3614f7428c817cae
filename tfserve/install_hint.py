"""The command that installs an extra, for this installation. `tfserve` on the package index is another project."""

from __future__ import annotations

import os
import re
import shlex
import sys
from importlib.metadata import PackageNotFoundError, requires
from importlib.util import find_spec
from pathlib import Path


def install_command(extra: str) -> str:
    """The shell command that installs `extra` for the running Python.

    In a checkout, with paths relative to the current directory: `.venv/bin/python -m pip install -e '.[gguf]'`.
    Elsewhere, for example after an installation from a wheel, it names the extra's packages.
    """
    root = Path(__file__).parents[1]
    try:
        here = Path.cwd()
    except FileNotFoundError:  # the current directory has been removed
        here = Path(os.devnull)
    python = Path(sys.executable)
    if not (root / "pyproject.toml").is_file():
        needed = requirements(extra)
        # The package index may have an unrelated package with the extra's name.
        return _pip_install(python, needed) if needed else f"install the packages that pyproject.toml has for {extra!r}"
    # A name without a slash would be looked up in PATH.
    if python.is_relative_to(here) and python.parent != here:
        python = python.relative_to(here)
    return _pip_install(python, ["-e", f"{'.' if root == here else root}[{extra}]"])


def _pip_install(python: Path, what: list[str]) -> str:
    """The command for pip, or for uv if the environment has no pip, as uv's have none."""
    command = [str(python), "-m", "pip", "install"] if find_spec("pip") else ["uv", "pip", "install", "-p", str(python)]
    return shlex.join([*command, *what])


def requirements(extra: str) -> list[str]:
    """The packages of `extra` with their versions; empty if tfserve itself is not installed."""
    try:
        declared = [line.partition(";") for line in requires("tfserve") or []]
    except PackageNotFoundError:
        return []
    marked = re.compile(rf"""extra\s*==\s*["']{re.escape(extra)}["']""")
    return [requirement.strip() for requirement, _, marker in declared if marked.search(marker)]
