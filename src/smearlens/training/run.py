"""The folder of a run: its description, its lock, its logs, and where it resumes.

`config.json` says what the run is, `checkpoints/` holds its states, and each `*.jsonl` is a log
with one row a line. Leaves out what is trained, and how: `loop`.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import math
import os
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from smearlens._explain import describe
from smearlens._files import sync_folder, write_atomically
from smearlens.training.checkpoint import (
    Checkpoint,
    CheckpointError,
    list_checkpoints,
    read_checkpoint,
    remove_litter,
    versions,
)

OWN_LOGS = ("metrics", "evaluation", "timing")  # written by training itself, by nobody else
_encode = json.JSONEncoder(allow_nan=False).encode


class RunConflictError(Exception):
    """A run folder that belongs to another run, or to a process that is still at work in it."""


class Logs:
    """Rows by log name, in memory until `flush` appends them to `folder/name.jsonl`.

    Args:
        folder: of the run; None keeps everything in memory
        lengths: bytes of each log to keep, as a checkpoint recorded them; the rest is cut off
    """

    def __init__(self, folder: Path | None, lengths: Mapping[str, int]):
        self.folder = folder
        self._lines: dict[str, list[str]] = {}
        self._lengths = dict(lengths)
        for name, length in self._lengths.items():
            if folder and (file := folder / f"{name}.jsonl").stat().st_size > length:
                os.truncate(file, length)

    def write(self, name: str, row: Mapping[str, Any]) -> None:
        """Add a row of numbers and strings to log `name`; nan and inf become null.

        Raises:
            TypeError: for a row that is no dict, or a value that JSON cannot hold, naming its key
        """
        try:
            line = _encode(row)
        except (ValueError, TypeError):
            line = _encode(_finite_row(name, row))
        self._lines.setdefault(name, []).append(line + "\n")

    def write_for_callback(self, name: str, row: Mapping[str, Any]) -> None:
        """`write` as callbacks have it: not into training's own logs, nor out of the folder.

        Raises:
            ValueError: for a name that is reserved or not plain
            TypeError: as `write`
        """
        if name in OWN_LOGS:
            raise ValueError(
                f"write({name!r}, …): {list(OWN_LOGS)} are training's own logs; give the rows of a "
                "callback another name, as in 'tracking'"
            )
        if not isinstance(name, str) or not re.fullmatch(r"\w[\w.-]*", name):
            raise ValueError(
                f"write({name!r}, …): a log is named by letters, digits, '_', '-' and '.', as in "
                "'tracking'; it becomes the file tracking.jsonl in the folder of the run"
            )
        self.write(name, row)

    def flush(self, *, sync: bool = False) -> dict[str, int]:
        """Append what was written since the last flush; returns the length of each log in bytes."""
        if self.folder is None:
            return {}
        for name, lines in self._lines.items():
            if not lines and not sync:
                continue
            content = "".join(lines).encode()
            # a log that no checkpoint knows may hold rows of a process that was killed: start anew
            with open(
                self.folder / f"{name}.jsonl", "ab" if name in self._lengths else "wb"
            ) as file:
                file.write(content)
                file.flush()
                if sync:
                    os.fsync(file.fileno())
            self._lengths[name] = self._lengths.get(name, 0) + len(content)
            lines.clear()
        if sync:
            sync_folder(self.folder)
        return dict(self._lengths)

    def read(self, name: str) -> list[dict[str, Any]]:
        """All rows of log `name`, oldest first; none if nothing was ever written to it."""
        lines = list(self._lines.get(name, []))
        if self.folder is not None and (file := self.folder / f"{name}.jsonl").exists():
            lines = file.read_text().splitlines() + lines
        return [json.loads(line) for line in lines]


class RunFolder:
    """The folder `path`, made or found, and held by this process until `close`.

    Raises:
        RunConflictError: if it describes another run, holds checkpoints or logs of no run, or is in
            use
    """

    def __init__(self, path: Path, description: dict[str, Any]):
        self.path, self.checkpoints = path, path / "checkpoints"
        self.checkpoints.mkdir(parents=True, exist_ok=True)
        self._handle = os.open(path, os.O_RDONLY)
        try:
            self._lock()
            self._compare(description)
        except BaseException:
            self.close()
            raise
        remove_litter(path)
        remove_litter(self.checkpoints)

    def close(self) -> None:
        """Let another process have the folder."""
        os.close(self._handle)

    def _lock(self) -> None:
        try:
            fcntl.flock(self._handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise RunConflictError(
                f"out={self.path}: another process is training in this folder; wait for it, or "
                "give another folder"
            ) from error

    def _compare(self, description: dict[str, Any]) -> None:
        file = self.path / "config.json"
        if not file.exists():
            if list_checkpoints(self.checkpoints) or any(self.path.glob("*.jsonl")):
                raise RunConflictError(
                    f"out={self.path}: has checkpoints or logs but no config.json that says of "
                    "what; give another folder, or delete this one"
                )
            write_atomically(file, json.dumps(description, indent=2) + "\n")
            return
        try:
            found = json.loads(file.read_text())
        except ValueError as error:
            raise RunConflictError(
                f"{file}: not JSON ({error}); restore it, or delete the folder to start over"
            ) from error
        if differing := _differences(found, json.loads(json.dumps(description))):
            raise RunConflictError(
                f"out={self.path} holds another run; it differs in " + "; ".join(differing) + "; "
                "give another folder, or delete this one to start over"
            )


def last_good_checkpoint(folder: Path) -> Checkpoint | None:
    """The newest checkpoint of the run in `folder` that is intact, as are the logs up to it.

    Broken ones are passed over with a warning: a run that resumes from an earlier checkpoint takes
    longer and ends the same.

    Raises:
        CheckpointError: if there are checkpoints and none is intact
    """
    error = None
    for path in reversed(list_checkpoints(folder / "checkpoints")):
        try:
            checkpoint = read_checkpoint(path)
            for name, length in checkpoint.manifest["logs"].items():
                _require_log(folder / f"{name}.jsonl", length)
        except CheckpointError as problem:
            error = error or problem
            warnings.warn(f"passed over a broken checkpoint: {problem}", stacklevel=2)
            continue
        _compare_versions(checkpoint)
        return checkpoint
    if error is None:
        return None
    raise CheckpointError(
        error.path, found=error.found, expected=error.expected,
        remedy=f"no other checkpoint is intact: delete {folder} to start over",
    )  # fmt: skip


def first_batch_sha256(batch: Mapping[str, Tensor]) -> str:
    """One fingerprint of a batch: names, types, shapes and values."""
    digest = hashlib.sha256()
    for name, tensor in sorted(batch.items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)} ".encode())
        digest.update(repr(tensor.tolist()).encode())
    return digest.hexdigest()


def _require_log(file: Path, length: int) -> None:
    found = file.stat().st_size if file.exists() else 0
    if found < length:
        raise CheckpointError(
            file, found=f"{found} bytes", expected=f"at least the {length} of the last checkpoint"
        )


def _compare_versions(checkpoint: Checkpoint) -> None:
    then, now = checkpoint.manifest["versions"], versions()
    changed = [f"{key} {then.get(key)} -> {now[key]}" for key in now if then.get(key) != now[key]]
    if changed:
        warnings.warn(
            f"resuming {checkpoint.path} under other conditions ({', '.join(changed)}): the run "
            "goes on, and may differ in the last digits from one that was never interrupted",
            stacklevel=3,
        )


def _differences(found: Any, given: Any, where: str = "") -> list[str]:
    """`name: found here, given now` for every leaf in which two JSON values differ."""
    if isinstance(found, dict) and isinstance(given, dict):
        return [
            line
            for key in sorted(found.keys() | given.keys())
            for line in _differences(found.get(key), given.get(key), f"{where}.{key}".lstrip("."))
        ]
    return [] if found == given else [f"{where}: {found!r} there, {given!r} given"]


def _finite_row(name: str, row: Any) -> dict[str, Any]:
    """The row with null for nan and inf; a TypeError about what JSON cannot hold all the same."""
    if not isinstance(row, Mapping):
        raise TypeError(f"a row of log {name!r} must be a dict, got {describe(row)}")
    finite = {key: _finite(value) for key, value in row.items()}
    for key, value in finite.items():
        try:
            _encode({key: value})
        except (ValueError, TypeError) as error:
            raise TypeError(
                f"row[{key!r}] of log {name!r} is {describe(value)}, which JSON cannot hold; pass "
                "strings and numbers, as in float(x), or lists of finite ones, as in x.tolist()"
            ) from error
    return finite


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
