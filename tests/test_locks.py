"""The locks hold what pyproject.toml asks for, exactly, and nothing of the machine that made them."""

from __future__ import annotations

import ast
import json
import re
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tfserve.model.loading.demo import SMOLLM2

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
EXTRAS = PROJECT["project"]["optional-dependencies"]
LOCKS = {name: ROOT / "locks" / f"{name}.txt" for name in ("main", "clients")}
PYTHONS = ("3.11.0", "3.12.0", "3.13.0")
CONTENT = {
    "main": ("grammar", "gguf", "convert-tokenizer", "bench", "browser", "dev", "lock"),
    "clients": ("clients", "ray", "convert-tokenizer"),
}


def lines_of(lock):
    return [line.partition(" #")[0].strip() for line in LOCKS[lock].read_text().splitlines() if line[:1] != "#"]


def locked(lock, python):
    """Versions by package on Linux with a Python."""
    here = {"python_version": python[:4], "python_full_version": python, "sys_platform": "linux"}
    wanted = [Requirement(line) for line in lines_of(lock)]
    return [
        (canonicalize_name(each.name), str(each.specifier).removeprefix("=="))
        for each in wanted
        if each.marker is None or each.marker.evaluate(here)
    ]


@pytest.mark.parametrize("lock", LOCKS)
def test_a_line_is_one_exact_version_that_pip_takes_for_a_constraint(lock):
    for line in lines_of(lock):
        assert re.fullmatch(r"[a-z0-9-]+==[0-9][\w.]*( ; .+)?", line)
    text = LOCKS[lock].read_text()
    assert not re.search(r"https?:|file:|//|\.org|\.com|/\w+/|--", text)
    assert not re.search(r"(?m)^(torch|triton|nvidia-|cuda-)", text)


@pytest.mark.parametrize("python", PYTHONS)
@pytest.mark.parametrize("lock", LOCKS)
def test_everything_that_is_declared_is_locked_once_and_within_its_bounds(lock, python):
    pairs = locked(lock, python)
    versions = dict(pairs)
    assert len(versions) == len(pairs)
    declared = [*PROJECT["project"]["dependencies"], *PROJECT["build-system"]["requires"]]
    declared += [each for extra in CONTENT[lock] for each in EXTRAS[extra]]
    for each in map(Requirement, declared):
        if each.name not in ("torch", "tfserve"):
            assert each.specifier.contains(versions[canonicalize_name(each.name)]), each


def test_every_extra_is_in_a_lock_but_for_the_one_whose_builds_depend_on_torchs():
    assert {name for names in CONTENT.values() for name in names} == EXTRAS.keys() - {"cuda"}


def test_packages_have_a_lower_bound_and_an_upper_one_only_where_internals_are_used():
    everything = [*PROJECT["project"]["dependencies"], *(each for extra in EXTRAS.values() for each in extra)]
    for each in map(Requirement, everything):
        if each.name != "tfserve":
            operators = sorted(spec.operator for spec in each.specifier)
            assert operators == (["<", ">="] if each.name == "aiohttp" else [">="]), each


def test_what_is_not_pythons_is_exact_too():
    folder = ROOT / "tests" / "clients" / "node"
    package, lock = (json.loads((folder / name).read_text()) for name in ("package.json", "package-lock.json"))
    assert lock["packages"][""]["dependencies"] == package["dependencies"]
    for name, version in package["dependencies"].items():
        assert re.fullmatch(r"\d+\.\d+\.\d+", version)
        assert lock["packages"][f"node_modules/{name}"]["version"] == version
    assert not [name for name, each in lock["packages"].items() if "resolved" in each]
    assert re.fullmatch(r"[\w-]+==[\d.]+", SMOLLM2.requirement)


def test_the_image_is_built_with_the_lock():
    lines = (ROOT / "Dockerfile").read_text().replace("\\\n", " ").splitlines()
    installs = [line for line in lines if line.startswith("RUN") and "pip install" in line]
    assert "COPY locks/main.txt /opt/lock.txt" in lines
    assert len(installs) == 2
    assert all("/opt/lock.txt" in line for line in installs)
    assert "!locks" in (ROOT / ".dockerignore").read_text().splitlines()


def imported(folder):
    """Top-level names of all modules that the Python files in a folder import, but for the standard library's."""
    names = set()
    for path in (ROOT / folder).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                names |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                names.add(node.module.partition(".")[0])
    return names - sys.stdlib_module_names


@pytest.mark.parametrize("folder", ["tfserve", "tests"])
def test_every_package_that_is_imported_is_declared(folder):
    own = {"tfserve", "tests", "examples", "benchmarks"}
    everything = [*PROJECT["project"]["dependencies"], *PROJECT["build-system"]["requires"]]
    everything += [each for extra in EXTRAS.values() for each in extra]
    declared = {canonicalize_name(Requirement(each).name) for each in everything}
    providers = packages_distributions()
    for name in imported(folder) - own:
        assert {canonicalize_name(each) for each in providers.get(name, [name])} & declared, name
