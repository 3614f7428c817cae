"""The commands that error texts name: what they install exists, by the Python that runs, from where they are read."""

from __future__ import annotations

import re
import shlex
import sys
import tomllib
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest

from tfserve import install_hint
from tfserve.install_hint import install_command, requirements

ROOT = Path(__file__).parents[1]
EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
FOLDERS = ("tfserve", "tests", "benchmarks", "examples", "docs")
WRITTEN = {".py", ".md", ".yaml", ".sh"}
TEXTS = [path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*")) if path.suffix in WRITTEN]
TEXTS += [ROOT / name for name in ("README.md", "Dockerfile", "Makefile")]


@pytest.mark.parametrize("extra", EXTRAS)
def test_in_a_checkout_it_installs_the_checkout(extra, monkeypatch, tmp_path):
    monkeypatch.chdir(ROOT)
    *python, target = shlex.split(install_command(extra))
    assert (python[1:], target) == (["-m", "pip", "install", "-e"], f".[{extra}]")
    assert (ROOT / python[0]).samefile(sys.executable)
    monkeypatch.chdir(tmp_path)
    *python, target = shlex.split(install_command(extra))
    assert (python[0], target) == (sys.executable, f"{ROOT}[{extra}]")


def test_the_python_that_runs_is_named_wherever_the_reader_is(monkeypatch, tmp_path):
    gone = tmp_path / "gone"
    gone.mkdir()
    for here in (Path(sys.executable).parent, gone):
        monkeypatch.chdir(here)
        if here == gone:
            gone.rmdir()
        # A bare name would be looked for in PATH.
        assert shlex.split(install_command("gguf"))[0] == sys.executable
    monkeypatch.chdir(ROOT)


def test_without_pip_it_is_a_command_for_uv(monkeypatch, tmp_path):
    monkeypatch.setattr(install_hint, "find_spec", lambda _: None)
    monkeypatch.chdir(tmp_path)
    command = shlex.split(install_command("gguf"))
    assert command == ["uv", "pip", "install", "-p", sys.executable, "-e", f"{ROOT}[gguf]"]


@pytest.mark.parametrize("extra", EXTRAS.keys() - {"dev"})  # which is for checkouts, and names other extras
def test_elsewhere_it_installs_the_packages_of_the_extra(extra, monkeypatch, tmp_path):
    monkeypatch.setattr(install_hint, "__file__", str(tmp_path / "site-packages" / "tfserve" / "install_hint.py"))
    command = shlex.split(install_command(extra))
    assert command[:4] == [sys.executable, "-m", "pip", "install"]
    assert command[4:] == requirements(extra)
    names = {re.split(r"[^\w.-]", each)[0] for each in command[4:]}
    assert names == {re.split(r"[^\w.-]", each)[0] for each in EXTRAS[extra]}


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_text_names_the_project_of_that_name_on_the_index_nor_an_extra_that_does_not_exist(path):
    text = path.read_text()
    assert "tfserve" + "[" not in text
    named = {name for names in re.findall(r"\.\[([\w,-]+)\]['\"]", text) for name in names.split(",")}
    assert named <= EXTRAS.keys()


def test_where_nothing_is_known_of_the_extra_no_package_of_its_name_is_named(monkeypatch, tmp_path):
    def unknown(name):
        raise PackageNotFoundError(name)

    monkeypatch.setattr(install_hint, "__file__", str(tmp_path / "tfserve" / "install_hint.py"))
    monkeypatch.setattr(install_hint, "requires", unknown)
    assert requirements("grammar") == []
    assert "pip install" not in install_command("grammar")
