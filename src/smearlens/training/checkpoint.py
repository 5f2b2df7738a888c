"""Checkpoints: written whole or not at all, read only if every byte is as it was written.

A checkpoint is a folder `step-000500` with `model.safetensors` (and, for a model of this library,
the `config.json` with which `load_model` opens the folder), `trainer.pt` (optimiser, schedule,
random states; no code can hide in it) and `manifest.json`, written last: step, sha256 and size of
each file, versions, lengths of the logs, and a seal over itself. Leaves out the run around it, its
logs and the choice of where to resume (`run`), and the random states (`randomness`).
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import platform
import re
import shutil
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from smearlens._files import sync_folder, write_atomically
from smearlens.models.base import HookedModel
from smearlens.models.files import save_folder

SCHEMA = 1  # of manifest.json and trainer.pt
WEIGHTS, TRAINER, MANIFEST = "model.safetensors", "trainer.pt", "manifest.json"
KEYS = {"schema", "step", "files", "versions", "random_states", "logs"}  # at least, in a manifest


class CheckpointError(Exception):
    """A checkpoint that cannot be used.

    Attributes:
        path: the file or folder
        found: what is wrong with it
        expected: what should be there
        remedy: what to do
    """

    def __init__(self, path: Path, found: str, expected: str, remedy: str | None = None):
        super().__init__(path, found, expected, remedy)
        self.path, self.found, self.expected = path, found, expected
        self.remedy = remedy or "delete this checkpoint: training goes on from the one before it"

    def __str__(self) -> str:
        return f"{self.path}: {self.found}; expected {self.expected}; {self.remedy}"


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A checkpoint that has been read and found intact."""

    path: Path
    step: int  # updates made
    weights: dict[str, Tensor]
    trainer: dict[str, Any]  # as given to `write_checkpoint`
    manifest: dict[str, Any]


def write_checkpoint(
    parent: Path, model: nn.Module, trainer: dict[str, Any], *, step: int, **facts: Any
) -> Path:
    """Save `model` and `trainer` as `parent/step-…`; a kill at any moment leaves no part of it.

    Args:
        parent: an existing folder
        model: its state_dict is saved
        trainer: tensors, numbers, strings and containers of them, with the key "random_states"
        step: updates made so far
        **facts: JSON values to add to the manifest; `logs` maps each log file to its length

    Returns:
        the checkpoint's folder
    """
    target = parent / f"step-{step:06d}"
    temporary = parent / f".{target.name}.{os.getpid()}.tmp"
    temporary.mkdir()
    try:
        _write_weights(temporary, model)
        buffer = io.BytesIO()
        torch.save(trainer, buffer)
        write_atomically(temporary / TRAINER, buffer.getvalue())
        written = sorted(temporary.iterdir())
        manifest = {
            "schema": SCHEMA,
            "step": step,
            "files": {file.name: _fingerprint(file.read_bytes()) for file in written},
            "versions": versions(),
            "random_states": sorted(trainer["random_states"][0]),
            "logs": {},
            **facts,
        }
        write_atomically(temporary / MANIFEST, _sealed(manifest))
        if target.exists():
            _discard(target)  # one that was broken, and is now made again
        temporary.rename(target)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    sync_folder(parent)
    return target


def read_checkpoint(path: Path | str) -> Checkpoint:
    """Read a checkpoint, refusing it unless every file is complete and unaltered.

    Raises:
        CheckpointError: with path, finding, expectation and remedy
    """
    path = Path(path)
    manifest = read_manifest(path)
    content = {name: _intact(path / name, fact) for name, fact in manifest["files"].items()}
    weights = _weights(path / WEIGHTS, content[WEIGHTS])
    trainer = _trainer(path / TRAINER, content[TRAINER])
    step = manifest["step"]
    return Checkpoint(path=path, step=step, weights=weights, trainer=trainer, manifest=manifest)


def read_manifest(path: Path | str) -> dict[str, Any]:
    """The manifest of the checkpoint at `path`, its seal and outline checked.

    Raises:
        CheckpointError: as `read_checkpoint`
    """
    path = Path(path)
    if not path.is_dir():
        found = "is a file" if path.exists() else "no such folder"
        raise CheckpointError(
            path, found=found, expected="a folder step-…", remedy="check the path"
        )
    file = path / MANIFEST
    try:
        text = _read(file).decode()
        manifest = json.loads(text)
        schema = manifest["schema"]
    except (ValueError, TypeError, KeyError) as error:
        raise CheckpointError(
            file, found=f"not a manifest ({error!r})", expected="a JSON object with its schema"
        ) from error
    if schema != SCHEMA:
        raise CheckpointError(
            file, found=f"schema {schema!r}", expected=f"schema {SCHEMA}",
            remedy="read it with the version of smearlens that wrote it",
        )  # fmt: skip
    manifest.pop("seal", None)
    if _sealed(manifest) != text:
        raise CheckpointError(file, found="altered since it was written", expected="its own seal")
    if KEYS - manifest.keys() or {WEIGHTS, TRAINER} - manifest["files"].keys():
        raise CheckpointError(
            file,
            found=f"keys {sorted(manifest)}",
            expected=f"{sorted(KEYS)}, files with both parts",
        )
    if path.name != f"step-{manifest['step']:06d}":
        raise CheckpointError(
            path, found=f"holds step {manifest['step']}", expected="a folder of that name",
            remedy="give the folder its old name back",
        )  # fmt: skip
    return manifest


def load_weights(model: nn.Module, checkpoint: Checkpoint) -> None:
    """Copy the weights into `model`, which must have exactly these tensors, all finite.

    Raises:
        CheckpointError: for a missing, unexpected, misshapen or non-finite tensor
    """
    file = checkpoint.path / WEIGHTS
    own = {name: (t.shape, t.dtype) for name, t in model.state_dict().items()}
    given = {name: (t.shape, t.dtype) for name, t in checkpoint.weights.items()}
    wrong = sorted(name for name in own.keys() | given.keys() if own.get(name) != given.get(name))
    if wrong:
        name = wrong[0]
        raise CheckpointError(
            file,
            found=f"{name!r} is {given.get(name, 'missing')} ({len(wrong)} such tensors)",
            expected=f"{own.get(name, 'no such tensor')}",
            remedy="build the model with the configuration it was trained with",
        )
    for name, tensor in checkpoint.weights.items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise CheckpointError(
                file, found=f"{name!r} holds nan or inf", expected="finite weights"
            )
    model.load_state_dict(checkpoint.weights, strict=True)


def list_checkpoints(parent: Path) -> list[Path]:
    """The checkpoint folders in `parent`, oldest first, unread."""
    found = [path for path in parent.glob("step-*") if re.fullmatch(r"step-\d{6,}", path.name)]
    return sorted(found, key=lambda path: int(path.name[5:]))


def prune_checkpoints(parent: Path, keep: int | None) -> None:
    """Remove all but the `keep` newest checkpoints, once the newest manifest reads well."""
    paths = list_checkpoints(parent)
    read_manifest(paths[-1])
    for path in paths[:-keep] if keep else []:
        _discard(path)


def remove_litter(folder: Path) -> None:
    """Remove what a killed process left half-written in `folder`."""
    for kind in (".step-*.tmp", ".config.json.*.tmp"):  # and nothing of anybody else
        for path in folder.glob(kind):
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def versions() -> dict[str, Any]:
    """What besides the configuration decides the last digits of a run."""
    return {**_packages(), "threads": torch.get_num_threads()}


@cache
def _packages() -> dict[str, str]:
    names = ("smearlens", "torch", "numpy", "safetensors")
    return {"python": platform.python_version(), **{name: version(name) for name in names}}


def _write_weights(folder: Path, model: nn.Module) -> None:
    if isinstance(model, HookedModel):
        save_folder(model, folder, checked=False)  # a run resumes with any dtypes; nan: `nonfinite`
        return
    from safetensors.torch import save

    weights = {name: t.detach().clone().contiguous() for name, t in model.state_dict().items()}
    write_atomically(folder / WEIGHTS, save(weights))  # clones, so that tied tensors pass too


def _weights(file: Path, content: bytes) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        return load(content)
    except SafetensorError as error:
        raise CheckpointError(file, found=str(error), expected="a safetensors file") from error


def _trainer(file: Path, content: bytes) -> dict[str, Any]:
    try:
        trainer = torch.load(io.BytesIO(content), weights_only=True, map_location="cpu")
    except Exception as error:  # the unpickler's own errors have no common class
        first = str(error).split("\n")[0]
        raise CheckpointError(
            file, found=f"refused by torch.load ({first})", expected="tensors and plain values only"
        ) from error
    if not isinstance(trainer, dict) or "random_states" not in trainer:
        raise CheckpointError(file, found="no trainer state", expected="a dict with random_states")
    return trainer


def _intact(file: Path, fact: dict[str, Any]) -> bytes:
    content = _read(file)
    found = _fingerprint(content)
    for key, unit in (("bytes", "bytes"), ("sha256", "as sha256")):
        if found[key] != fact[key]:
            raise CheckpointError(
                file, found=f"{found[key]} {unit}", expected=f"{fact[key]} {unit}"
            )
    return content


def _read(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise CheckpointError(
            file, found=f"cannot be read ({error.strerror})", expected="a complete checkpoint"
        ) from error


def _fingerprint(content: bytes) -> dict[str, Any]:
    return {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def _sealed(manifest: dict[str, Any]) -> str:
    seal = hashlib.sha256(json.dumps(manifest).encode()).hexdigest()
    return json.dumps({**manifest, "seal": seal}, indent=2) + "\n"


def _discard(path: Path) -> None:
    """Remove a checkpoint: it stops being one in a single step, then its files go."""
    away = path.with_name(f".{path.name}.{os.getpid()}.old.tmp")
    shutil.rmtree(away, ignore_errors=True)
    path.rename(away)
    shutil.rmtree(away)
