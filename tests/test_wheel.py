"""The wheel in an environment without a checkout of tfserve: complete, and it serves, with page and benchmark data."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import urllib.request
import venv
import zipfile
from collections.abc import Mapping
from pathlib import Path

import pytest
from transformers import Qwen2Config, Qwen2ForCausalLM

from tests.conftest import TINY, save_random
from tests.serving import Server
from tests.tokenizers import write_tiny_tokenizer

REPO = Path(__file__).parents[1]

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


def call(*command: str | Path, cwd: Path, env: Mapping[str, str] | None = None) -> str:
    done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, f"{command} ended with {done.returncode}:\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy: setuptools would leave its files in the tree, and take what an earlier build left there."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    shutil.copytree(REPO / "tfserve", source / "tfserve", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(REPO / name, source)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    call(*pip, "wheel", "--no-deps", "--wheel-dir", str(out), str(source), cwd=out)
    (built,) = out.glob("*.whl")
    return built


def test_the_wheel_carries_every_file_of_the_package(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        carried = {name for name in archive.namelist() if ".dist-info/" not in name}
    files = (path for path in (REPO / "tfserve").rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    assert carried == {path.relative_to(REPO).as_posix() for path in files}
    assert {"tfserve/py.typed", "tfserve/http/static/index.html", "tfserve/bench/data/prompts.jsonl"} <= carried


def test_the_installed_wheel_serves(wheel: Path, tmp_path: Path) -> None:
    home, away = tmp_path / "venv", tmp_path / "away"
    away.mkdir()
    venv.create(home, with_pip=False)
    python = home / "bin" / "python"
    call(sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", str(wheel), cwd=away)
    site = next((home / "lib").glob("python*")) / "site-packages"
    # torch and the rest are seen where they are; an editable tfserve there is not, because .pth files do not nest.
    (site / "others.pth").write_text("\n".join(path for path in sys.path if path.endswith("site-packages")))
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    tfserve = home / "bin" / "tfserve"
    assert "serve a model over HTTP" in call(tfserve, "--help", cwd=away, env=env)
    where = call(python, "-c", "import tfserve; print(tfserve.__file__)", cwd=away, env=env)
    assert Path(where.strip()).is_relative_to(site)

    model_dir = save_random(Qwen2ForCausalLM, Qwen2Config(**TINY, max_position_embeddings=4096), tmp_path / "tiny")
    write_tiny_tokenizer(model_dir)
    settings = ("--max-model-len", "4096", "--served-model-name", "tiny")
    with Server(model_dir, tmp_path / "log", *settings, program=(str(tfserve),), env=env) as server:
        server.wait_until_ready()
        with urllib.request.urlopen(server.url + "/", timeout=10) as page:
            sent = page.read()
        for part in ("page.css", "page.js"):
            assert (REPO / "tfserve" / "http" / "static" / part).read_bytes() in sent
        words = ("--base-url", server.url, "--dataset", "prompts", "--num-prompts", "3", "--max-tokens", "4")
        assert "3 completed" in call(tfserve, "bench", "serve", *words, cwd=away, env=env)
