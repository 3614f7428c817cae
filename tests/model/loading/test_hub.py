from __future__ import annotations

import shlex
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError, RepositoryNotFoundError

from tfserve.errors import DownloadError, ModelError
from tfserve.model.loading.hub import resolve_model


def test_a_local_directory_is_itself(tmp_path: Path) -> None:
    assert resolve_model(str(tmp_path)) == tmp_path


def test_a_missing_path_says_what_could_be_given(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"no directory .*nowhere; give a checkpoint directory, a hub id .* or 'demo'"):
        resolve_model(str(tmp_path / "nowhere"))


def test_a_file_is_not_a_model(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(ModelError, match="is a file; give the directory"):
        resolve_model(str(tmp_path / "model.safetensors"))


def test_a_demo_model_that_cannot_be_had_names_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TFSERVE_CACHE", str(tmp_path))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(DownloadError, match="run `tfserve demo-model`"):
        resolve_model("demo")


@pytest.mark.parametrize("name", ["some-org/no such model", "some-org/not-downloaded"])
def test_a_hub_failure_names_the_model_and_the_way_out(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ModelError, match=rf"hub did not give the model '{name}' \(.+\).*give its directory"):
        resolve_model(name)


@pytest.mark.parametrize("name", ["model.gguf", "MODEL.GGUF", "."])
def test_gguf_is_not_served_and_the_message_says_what_converts_it(tmp_path, name):
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    (tmp_path / "MODEL.GGUF").write_bytes(b"GGUF")
    with pytest.raises(ModelError, match=r"`tfserve import-gguf .*(model\.gguf|MODEL\.GGUF) DIRECTORY`"):
        resolve_model(str(tmp_path / name))


def test_the_command_that_converts_a_file_can_be_given_to_a_shell(tmp_path):
    file = tmp_path / "my model; a.gguf"
    file.touch()
    for name in (file, tmp_path):
        with pytest.raises(ModelError) as caught:
            resolve_model(str(name))
        assert shlex.split(str(caught.value).split("`")[1])[2] == str(file)


def test_a_checkpoint_beside_a_gguf_file_is_served(tmp_path):
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    (tmp_path / "config.json").write_text("{}")
    assert resolve_model(str(tmp_path)) == tmp_path


class Absent(RepositoryNotFoundError):
    """The hub's error for an unknown name; the real one needs a response."""

    def __init__(self) -> None:
        Exception.__init__(self, "no such model")


@pytest.mark.parametrize(
    ("failure", "kind"),
    [
        (ConnectionError("no route"), DownloadError),
        (TimeoutError(), DownloadError),
        (LocalEntryNotFoundError("offline"), DownloadError),
        (HFValidationError("no name"), ModelError),
        (Absent(), ModelError),
    ],
    ids=lambda value: value.__name__ if isinstance(value, type) else type(value).__name__,
)
def test_a_hub_that_is_away_may_be_back_and_a_name_it_does_not_have_will_not(monkeypatch, failure, kind):
    def snapshot_download(*_, **__):
        raise failure

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    with pytest.raises(ModelError) as caught:
        resolve_model("org/name")
    assert type(caught.value) is kind
