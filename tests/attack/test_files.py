"""Files that no honest tool writes: a hostile model is an error that names the file, a full disk ends no engine."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.attack.hostile_models import directories, gguf_harms, import_file, load_directory, write_tiny_checkpoint
from tests.model.gguf.tiny_gguf import GgufRecipe, tiny_model, write_gguf
from tests.scripted import scripted_engine, write_scripted_model
from tfserve.errors import ConfigError, ModelError
from tfserve.types import SamplingParams

QUICK = (
    *("config num_hidden_layers=1000000000", "config vocab_size=1000000000000", "config hidden_size=1000000000"),
    *("config max_position_embeddings=2147483647", "config head_dim=1000000000", "config num_attention_heads=1000000"),
    *("mistral sliding_window=0", "mistral sliding_window='many'", "qwen3 head_dim=1000000000", "qwen3 head_dim=3"),
    *("config.json deep object", "config.json device", "tokenizer.json pipe", "tokenizer_config.json pipe"),
    *(
        "generation_config.json wide",
        "chat_template.jinja pipe",
        "chat_template.jinja sparse",
        "model.safetensors pipe",
    ),
    *("weight_map '../other.safetensors'", "weight_map '/dev/zero'", "weight_map 'below/other.safetensors'"),
    *("header length 100000000", "header deep", "no vocabulary", "vocab.json pipe"),
    *("normalizer grows little by little", "normalizer grows at once", "normalizer grows before"),
)
QUICK_GGUF = (
    *("block_count 4294967295", "array length 4294967295", "string length 9223372036854775808", "nested arrays"),
    *(
        "kv_count 18446744073709551615",
        "tensor_count 4294967295",
        "tensor offset 64",
        "tensor offset 9223372036854775808",
    ),
    *("tensor size 9223372036854775808", "bytes", "cut at 2000"),
)

SCRIPT, LONG = "the " * 400, SamplingParams(max_tokens=1000)
"""So many steps that the trace's buffer is written out twice."""


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_checkpoint(tmp_path_factory.mktemp("whole"))


@pytest.fixture(scope="module")
def whole_gguf(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("gguf") / "whole.gguf"
    write_gguf(GgufRecipe(tiny_model("llama")), path)
    return path.read_bytes()


def test_the_whole_checkpoint_loads(whole: Path, tmp_path: Path) -> None:
    assert load_directory(Path(shutil.copytree(whole, tmp_path / "model"))) == "loaded"


@pytest.mark.parametrize("name", QUICK)
def test_a_hostile_directory_is_a_model_error_that_names_it(name: str, whole: Path, tmp_path: Path) -> None:
    model_dir = Path(shutil.copytree(whole, tmp_path / "model"))
    dict(directories())[name](model_dir)
    with pytest.raises(ModelError) as caught:
        load_directory(model_dir)
    assert str(model_dir) in str(caught.value)
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize("name", QUICK_GGUF)
def test_a_hostile_gguf_file_is_a_model_error_that_names_it(name: str, whole_gguf: bytes, tmp_path: Path) -> None:
    file = tmp_path / "file.gguf"
    file.write_bytes(dict(gguf_harms(whole_gguf))[name])
    with pytest.raises(ModelError, match=r"file\.gguf"):
        import_file(file)
    assert list(tmp_path.iterdir()) == [file]


@pytest.mark.slow
def test_every_hostile_model_loads_or_is_an_error_within_bounds() -> None:
    command = [sys.executable, "-m", "tests.attack.hostile_models"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=900, check=False)
    assert result.returncode == 0, result.stdout + result.stderr[-2000:]


def test_a_link_to_a_file_is_a_file(whole: Path, tmp_path: Path) -> None:
    """The cache of the Hugging Face hub is made of links."""
    for path in whole.iterdir():
        (tmp_path / path.name).symlink_to(path)
    assert load_directory(tmp_path) == "loaded"


def test_a_model_name_that_no_path_can_have_is_an_error() -> None:
    for name in ("x" * 5000, "a\0b", "/dev/zero", "/proc/self/mem"):
        with pytest.raises((ModelError, ConfigError)):
            load_directory(Path(name))


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a full device")
def test_a_trace_on_a_full_disk_ends_and_the_engine_goes_on(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with scripted_engine(write_scripted_model(tmp_path), SCRIPT, step_trace="/dev/full") as engine:
        assert engine.generate("The sky", LONG)[0].finish_reason == "stop"
    assert caplog.text.count("this trace ends here") == 1


def test_a_trace_whose_reader_goes_ends_and_the_engine_goes_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    os.mkfifo(tmp_path / "trace")
    reader = os.open(tmp_path / "trace", os.O_RDONLY | os.O_NONBLOCK)
    model = write_scripted_model(tmp_path / "model")
    with scripted_engine(model, SCRIPT, step_trace=str(tmp_path / "trace")) as engine:
        os.close(reader)
        assert engine.generate("The sky", LONG)[0].finish_reason == "stop"
    assert caplog.text.count("this trace ends here") == 1
