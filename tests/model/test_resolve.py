from __future__ import annotations

from pathlib import Path

import pytest

from tfserve.errors import ModelError
from tfserve.model.resolve import resolve_model


def test_a_local_directory_is_itself(tmp_path: Path) -> None:
    assert resolve_model(str(tmp_path)) == tmp_path


def test_a_missing_path_says_what_could_be_given(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"no directory .*nowhere; give a checkpoint directory, a hub id .* or 'demo'"):
        resolve_model(str(tmp_path / "nowhere"))


def test_a_file_is_not_a_model(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(ModelError, match="is a file; give the directory"):
        resolve_model(str(tmp_path / "model.safetensors"))


def test_an_unprepared_demo_model_names_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TFSERVE_CACHE", str(tmp_path))
    with pytest.raises(ModelError, match="run `tfserve demo-model`"):
        resolve_model("demo")


@pytest.mark.parametrize("name", ["some-org/no such model", "some-org/not-downloaded"])
def test_a_hub_failure_names_the_model_and_the_way_out(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ModelError, match=rf"hub did not give the model '{name}' \(.+\).*give its directory"):
        resolve_model(name)
