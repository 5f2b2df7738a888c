"""Files written whole or not at all, their checksums, and dataclasses as strict JSON.

Leaves out what a checkpoint or a model folder contains: `training.checkpoint`, `models.base`.
"""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import json
import os
import tempfile
import types
import typing
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TypeVar

Config = TypeVar("Config")


def write_atomically(path: Path | str, content: bytes | str) -> None:
    """Write `content` to `path` so that a reader finds the old file or the new one, never a part.

    Temporary file in the same folder, flush, fsync, mode by umask, rename, fsync of the folder.
    """
    path = Path(path)
    data = content.encode() if isinstance(content, str) else content
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def read_object(path: Path | str, remedy: str, *keys: str) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        ValueError: if it holds something else or lacks one of `keys`, with the path and `remedy`
        OSError: if it cannot be read
    """
    try:
        found = json.loads(Path(path).read_text("utf-8"))
    except ValueError as error:  # JSONDecodeError and UnicodeDecodeError among them
        raise ValueError(f"{path}: not JSON ({error}); {remedy}") from error
    if not isinstance(found, dict) or (missing := [key for key in keys if key not in found]):
        lack = f"no {missing}" if isinstance(found, dict) else type(found).__name__
        raise ValueError(f"{path}: found {lack}, expected an object with {list(keys)}; {remedy}")
    return found


def sync_folder(folder: Path | str) -> None:
    """Make the names in `folder` durable."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sha256(path: Path | str) -> str:
    """Hexadecimal sha256 of a file, read in blocks."""
    with open(path, "rb") as file:
        return (
            hashlib.file_digest(file, "sha256").hexdigest()
            if hasattr(hashlib, "file_digest")
            else hashlib.sha256(file.read()).hexdigest()
        )


def nearest(name: str, known: Iterable[str], count: int = 3) -> list[str]:
    """The `count` names of `known` that look most like `name`, best first."""
    return difflib.get_close_matches(name, list(known), n=count, cutoff=0.3)


def to_json(config: Any) -> str:
    """A dataclass instance as indented JSON; tuples become lists."""
    return json.dumps(dataclasses.asdict(config), indent=2) + "\n"


def from_dict(cls: type[Config], given: Any, where: str = "") -> Config:
    """Build dataclass `cls` from a dictionary, strictly.

    Raises:
        ValueError: for something else than a dictionary, an unknown key (with the nearest field), a
            missing one, or a wrong type
    """
    where = where or cls.__name__
    if not isinstance(given, dict):
        raise ValueError(f"{where}: expected an object, got {type(given).__name__}")
    fields = {f.name: f for f in dataclasses.fields(cls)}  # pyrefly: ignore[bad-argument-type]
    for key in given:
        if key not in fields:
            raise ValueError(
                f"{where}: unknown key {key!r}; nearest: {nearest(str(key), fields)}; "
                f"known: {sorted(fields)}"
            )
    missing = [
        f.name
        for f in fields.values()
        if f.name not in given
        and f.default is dataclasses.MISSING
        and f.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise ValueError(f"{where}: missing {missing}; add them to the file")
    hints = typing.get_type_hints(cls)
    return cls(
        **{key: _convert(hints[key], value, f"{where}.{key}") for key, value in given.items()}
    )


def from_json(cls: type[Config], text: str, where: str = "") -> Config:
    """`from_dict` of a JSON text."""
    try:
        given = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{where or cls.__name__}: not JSON ({error}); restore the file"
        ) from error
    return from_dict(cls, given, where)


def _convert(hint: Any, value: Any, where: str) -> Any:
    """`value` as the type `hint` asks, or a ValueError that names the field."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        for option in arguments:
            try:
                return _convert(option, value, where)
            except ValueError:
                continue
    elif origin is typing.Literal:
        if value in arguments:
            return value
    elif origin is tuple and isinstance(value, (list, tuple)):
        inner = arguments[:1] * len(value) if arguments[-1:] == (Ellipsis,) else arguments
        if len(inner) == len(value):
            return tuple(_convert(t, v, where) for t, v in zip(inner, value, strict=True))
    elif dataclasses.is_dataclass(hint) and isinstance(value, dict):
        return from_dict(hint, value, where)
    elif hint is typing.Any:
        return value
    elif hint is tuple and isinstance(value, (list, tuple)):
        return tuple(value)
    elif origin is list and isinstance(value, list):
        return [_convert(arguments[0], item, where) for item in value]
    elif origin is dict and isinstance(value, dict) and arguments[0] is str:
        return {key: _convert(arguments[1], item, where) for key, item in value.items()}
    elif hint is type(None):
        if value is None:
            return None
    elif hint is float:
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            return float(value)
    elif isinstance(hint, type) and type(value) is hint:
        return value
    expected = hint.__name__ if isinstance(hint, type) else hint
    raise ValueError(f"{where}: expected {expected}, got {value!r}")


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
