"""A load from kept int8 weights is the load that made them; a stale, damaged or unwritable cache only costs time."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.model.test_parity import run
from tests.scripted import scripted_engine, write_scripted_model
from tfserve.errors import ModelError
from tfserve.model.decoder import Decoder
from tfserve.model.layers.smoothquant import Smoother
from tfserve.model.loading.cache_dir import cache_dir
from tfserve.model.loading.config import load_model_config
from tfserve.model.loading.loader import load_model

IDS = torch.randint(0, 512, (40,), generator=torch.Generator().manual_seed(3))


def load(path: Path, kept: Path) -> Decoder:
    config = load_model_config(path)
    return load_model(
        path, config, dtype="float32", device="cpu", quantization="int8", progress=False, quantized_dir=kept
    )


def logits(path: Path, kept: Path) -> Tensor:
    return run(load(path, kept), IDS, [40])


@pytest.fixture
def llama(tiny_llama3: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_llama3, tmp_path / "model"))


@pytest.fixture
def smoothed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by one for each layer that is quantised from the checkpoint."""
    layers: list[int] = []
    original = Smoother.smooth_layer
    monkeypatch.setattr(Smoother, "smooth_layer", lambda self, weights: (layers.append(1), original(self, weights)))
    return layers


@pytest.mark.parametrize("name", ["tiny_llama3", "tiny_qwen25", "tiny_qwen3"])
def test_the_second_load_gives_the_same_bits(
    name: str, tmp_path: Path, smoothed: list[int], request: pytest.FixtureRequest
) -> None:
    path = request.getfixturevalue(name)
    first = logits(path, tmp_path / "int8")
    smoothed.clear()
    assert torch.equal(logits(path, tmp_path / "int8"), first)
    assert not smoothed
    assert len(list((tmp_path / "int8").iterdir())) == 1


def rewrite(file: Path, data: bytes) -> None:
    """Other contents of the same size, with the times of those before."""
    before = file.stat()
    assert len(data) == before.st_size
    file.write_bytes(data)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))


def test_other_weights_of_the_same_size_and_time_are_quantised_again(
    llama: Path, tmp_path: Path, smoothed: list[int]
) -> None:
    load(llama, tmp_path / "int8")
    smoothed.clear()
    weights = llama / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1  # one bit of a float
    rewrite(weights, bytes(data))
    load(llama, tmp_path / "int8")
    assert smoothed


def test_a_checkpoint_that_was_only_touched_is_not(llama: Path, tmp_path: Path, smoothed: list[int]) -> None:
    load(llama, tmp_path / "int8")
    smoothed.clear()
    os.utime(llama / "model.safetensors")
    load(llama, tmp_path / "int8")
    assert not smoothed


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-100])


def zero_the_end(file: Path) -> None:
    data = file.read_bytes()
    rewrite(file, data[: len(data) // 2] + bytes(len(data) - len(data) // 2))


def flip_a_bit(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    rewrite(file, bytes(data))


@pytest.mark.parametrize("harm", [truncate, zero_the_end, flip_a_bit, lambda file: file.write_bytes(b"")])
def test_a_damaged_cache_is_said_and_made_again(
    harm: Callable[[Path], None], llama: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, smoothed: list[int]
) -> None:
    kept = tmp_path / "int8"
    first = logits(llama, kept)
    harm(next(kept.iterdir()))
    smoothed.clear()
    with caplog.at_level(logging.WARNING):
        assert torch.equal(logits(llama, kept), first)
    assert "quantising again" in caplog.text
    assert smoothed
    smoothed.clear()
    load(llama, kept)
    assert not smoothed


def test_a_cache_that_cannot_be_written_is_a_warning(
    llama: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("not a directory")
    with caplog.at_level(logging.WARNING):
        load(llama, blocked)
    assert "cannot keep the int8 weights" in caplog.text


def test_a_cache_that_cannot_be_looked_at_is_a_warning(
    llama: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "int8").mkdir()
    named = llama.rename(tmp_path / ("m" * 240))  # too long for the name of the kept file
    with caplog.at_level(logging.WARNING):
        load(named, tmp_path / "int8")
    assert "cannot read" in caplog.text


def test_what_was_abandoned_goes_and_what_is_being_written_stays(llama: Path, tmp_path: Path) -> None:
    kept = tmp_path / "int8"
    kept.mkdir()
    old, new = kept / "other-1.7.part", kept / "other-2.7.part"
    for part in (old, new):
        part.write_bytes(b"half")
    os.utime(old, (0, 0))
    load(llama, kept)
    assert not old.exists()
    assert new.exists()


def test_files_beside_the_checkpoint_are_not_read_whole(llama: Path, tmp_path: Path, smoothed: list[int]) -> None:
    load(llama, tmp_path / "int8")
    smoothed.clear()
    (llama / "consolidated.safetensors").write_bytes(b"another form of the weights")
    with (llama / "corpus.json").open("wb") as file:
        file.truncate(2**40)
    load(llama, tmp_path / "int8")
    assert not smoothed


def test_a_user_without_a_home_has_no_place_for_files(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TFSERVE_CACHE", "~no-such-user/cache")
    with pytest.raises(ModelError, match="TFSERVE_CACHE"):
        cache_dir()
    with scripted_engine(write_scripted_model(tmp_path), "hello", quantization="int8") as engine:
        assert engine.generate("x")[0].text == "hello"
