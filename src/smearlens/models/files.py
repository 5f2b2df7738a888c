"""The files of a saved model: `model.safetensors` and `config.json`, written whole, read strictly.

Works for any class with a `config` and a `config_class`. Leaves out which classes there are
(`models.base`).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor

from smearlens._files import from_dict, sha256, write_atomically

SCHEMA = 1  # of config.json
SHIPPED = Path(__file__).parent / "pretrained"


class ModelFileError(Exception):
    """A saved model that cannot be loaded: names the file, what was found, expected, a remedy."""


def save_folder(model: Any, folder: Path, *, checked: bool = True) -> None:
    """Write the weights of `model`, then `config.json` with their sha256.

    Args:
        model: what to save
        folder: made if there is none
        checked: whether weights that `load_folder` would refuse are refused here, before anything
            is written

    Raises:
        TypeError: for a model that another one is saved for
        ValueError: for weights of several dtypes, or not finite
    """
    from safetensors.torch import save

    if model.save_instead:
        raise TypeError(f"a {type(model).__name__} is not saved: save {model.save_instead}")
    weights = {name: t.detach().clone() for name, t in model.state_dict().items()}  # untied
    masks = {name for name, _ in model.named_buffers()}
    if checked and (found := _unloadable(weights, masks)):
        raise ValueError(
            f"this {type(model).__name__} is not saved, it could not be loaded again: {found}; "
            "model.to(torch.float32) makes the dtypes one, what is not finite must be trained again"
        )
    config = json.loads(json.dumps(asdict(model.config)))
    if checked and from_dict(type(model).config_class, config) != model.config:
        raise ValueError(
            f"this {type(model).__name__} is not saved: its configuration is another one when it "
            f"has been written as JSON and read again: {model.config}"
        )
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / "model.safetensors", save(weights))
    description = {
        "schema": SCHEMA,
        "model": type(model).__name__,
        "config": asdict(model.config),
        "sha256": sha256(folder / "model.safetensors"),
    }
    sealed = {**description, "seal": seal(description)}
    write_atomically(folder / "config.json", json.dumps(sealed, indent=2) + "\n")


def seal(description: dict[str, Any]) -> str:
    """The sha256 of a description: whatever is altered in `config.json` later is noticed."""
    content = {key: description[key] for key in ("schema", "model", "config", "sha256")}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def load_folder(cls: Any, folder: Path) -> Any:
    """Build the model that `folder` describes and fill it with its weights, checking everything."""
    description = read_description(folder)
    if description["model"] != cls.__name__:
        raise ModelFileError(
            f"{folder / 'config.json'}: found a model of class {description['model']}, expected "
            f"{cls.__name__}; use {description['model']}.from_pretrained, or load_model for any"
        )
    weights = folder / "model.safetensors"
    if not weights.is_file():
        found = "not a file" if weights.exists() else "missing"
        raise ModelFileError(f"{weights}: {found}; save the model again with save_pretrained")
    found = sha256(weights)
    if found != description["sha256"]:
        raise ModelFileError(
            f"{weights}: sha256 is {found}, config.json expects {description['sha256']}; "
            "the file was altered or cut off: fetch or save it again"
        )
    try:
        config = from_dict(cls.config_class, description["config"], str(folder / "config.json"))
        _require_seal(description, folder / "config.json")
        model = cls(config)
    except ValueError as error:
        raise ModelFileError(
            f"{folder / 'config.json'}: {error}; restore it or save the model again"
        ) from error
    state = read_weights(weights, {name for name, _ in model.named_buffers()})
    model.to(next(t.dtype for t in state.values() if t.is_floating_point()))
    _require_dtypes(state, model.state_dict(), weights)
    try:
        model.load_state_dict(state, strict=True)
    except RuntimeError as error:
        raise ModelFileError(
            f"{weights}: does not fit config.json, which expects other weights ({error}); "
            "save the model again with save_pretrained"
        ) from error
    return model.eval()


def _require_dtypes(found: dict[str, Tensor], expected: dict[str, Tensor], path: Path) -> None:
    """Raise if a tensor is of another dtype than the model's, a counter of floats for example."""
    for name, tensor in expected.items():
        if name in found and found[name].dtype != tensor.dtype:
            raise ModelFileError(
                f"{path}: found {name} in {found[name].dtype}, expected {tensor.dtype}; fetch or "
                "save the file again"
            )


def upload(model: Any, repository: str, *, private: bool, token: str | None) -> str:
    """Put a saved model and its card on the Hugging Face hub; returns the address."""
    import tempfile

    from huggingface_hub import HfApi

    api = HfApi(token=token)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        save_folder(model, folder)
        write_atomically(folder / "README.md", model_card(model))
        address = api.create_repo(repository, private=private, exist_ok=True)
        api.upload_folder(folder_path=folder, repo_id=repository)
    return str(address)


def model_card(model: Any) -> str:
    """A short model card: class, sizes, hooks, and how to load it."""
    name = type(model).__name__
    rows = "\n".join(f"| `{key}` | {value} |" for key, value in asdict(model.config).items())
    return (
        f"---\nlibrary_name: smearlens\ntags: [smearlens, mechanistic-interpretability]\n---\n\n"
        f"# {name}, {model.n_parameters:,} parameters\n\n"
        f"```python\nfrom smearlens import {name}\n\n"
        f'model = {name}.from_pretrained("this repository")\n```\n\n'
        f"{len(model.hook_dict)} hook points; `list(model.hook_dict)` names them.\n\n"
        f"| setting | value |\n|---|---|\n{rows}\n"
    )


def find_folder(name: str | Path) -> Path:
    """The folder a name stands for; the network is asked only for `owner/name`."""
    given, text = Path(name).expanduser(), str(name)
    for folder in (given, SHIPPED / text):
        if (folder / "config.json").is_file():
            return folder
    shipped = sorted(p.name for p in SHIPPED.glob("*") if p.is_dir())
    local = isinstance(name, Path) or text.startswith((".", "/", "~")) or text.count("/") != 1
    if local or given.exists() or given.parent.exists():
        found = sorted(p.name for p in given.iterdir()) if given.is_dir() else "no such folder"
        raise ModelFileError(
            f"{text}: expected a folder with config.json and model.safetensors, found {found}; "
            f"write one with save_pretrained, or name a model that ships with the package "
            f"{shipped} or, as owner/name, one on the hub"
        )
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(text, allow_patterns=["config.json", "model.safetensors"]))
    except Exception as error:
        raise ModelFileError(
            f"{text}: no local folder, and could not be fetched from the hub ({error}); "
            f"shipped with the package: {shipped}"
        ) from error


def read_description(folder: Path) -> dict[str, Any]:
    """The contents of `config.json`, its outline checked."""
    path = folder / "config.json"
    try:
        found = json.loads(path.read_text())
        if found["schema"] != SCHEMA:
            raise ModelFileError(
                f"{path}: found schema {found['schema']!r}, expected {SCHEMA}; update smearlens, "
                "or save the model again with save_pretrained"
            )
        if unknown := sorted(set(found) - {"schema", "model", "config", "sha256", "seal"}):
            raise ValueError(f"unknown key {unknown[0]!r}")
        description = {key: found[key] for key in ("schema", "model", "config", "sha256")}
        description["seal"] = found.get("seal")
        if not all(isinstance(description[key], str) for key in ("model", "sha256")):
            raise TypeError("model and sha256 must be strings")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelFileError(
            f"{path}: found no model description ({error!r}), expected an object with schema, "
            "model, config, sha256; restore it or save the model again with save_pretrained"
        ) from error
    return description


def _require_seal(description: dict[str, Any], path: Path) -> None:
    """Raise if something in `config.json` is not as it was written; older files have no seal."""
    if description["seal"] not in (None, seal(description)):
        raise ModelFileError(
            f"{path}: found contents that were altered since they were written, expected its own "
            "seal; fetch or save it again, or, if the edit is meant, take the seal out of the file"
        )


def read_weights(path: Path, masks: Collection[str] = ()) -> dict[str, Tensor]:
    """The tensors of a safetensors file: those of floats of one dtype, and finite.

    Args:
        path: the file
        masks: names of buffers, which may hold -inf to hide keys
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    remedy = "train the model again, or fetch or save the file again"
    try:
        state = load_file(path)
    except SafetensorError as error:
        raise ModelFileError(f"{path}: not a safetensors file ({error}); {remedy}") from error
    if found := _unloadable(state, masks):
        raise ModelFileError(f"{path}: {found}; {remedy}")
    return state


def _unloadable(state: dict[str, Tensor], masks: Collection[str]) -> str:
    """What keeps these weights from being loaded; nothing if they are finite and of one dtype."""
    dtypes = {tensor.dtype for tensor in state.values() if tensor.is_floating_point()}
    if len(dtypes) != 1:  # counters and masks (integers, booleans) are kept as they are
        found = sorted(str(tensor.dtype) for tensor in state.values())
        return f"found weights of {sorted(set(found))}, expected one floating dtype"
    for name, tensor in state.items():
        hidden = tensor.isneginf() if name in masks and tensor.is_floating_point() else False
        if not (tensor.isfinite() | hidden).all():
            return f"found a value in {name} that is not finite, expected none"
    return ""
