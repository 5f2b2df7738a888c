"""Token files: ids on disk, mapped into memory, written whole or not at all.

Leaves out batches (batches.py) and corpora of several files (shards.py).
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from jaxtyping import Int, Integer
from torch import Tensor

from smearlens._explain import describe
from smearlens.data.corpora import CorpusError

_FORMAT = "smearlens tokens 1"
_HEADER_BYTES = 256  # a line of JSON, padded with spaces; the tokens follow


@dataclass(frozen=True, eq=False)
class TokenFile:
    """Tokens on disk, mapped into memory: only what is indexed is read."""

    path: Path
    tokens: Integer[np.ndarray, " n_tokens"] = field(repr=False)
    d_vocab: int
    sha256: str  # of the tokens


def write_token_file(
    path: str | Path, chunks: Iterable[Int[Tensor, " _"]], d_vocab: int
) -> TokenFile:
    """Write chunks of token ids, one after the other, as uint16, or uint32 if d_vocab > 65,536.

    The file appears whole or not at all: a temporary neighbour is written, synced and renamed.

    Raises:
        ValueError: if an id is not in `0 .. d_vocab - 1`, or there is none at all
    """
    if not 1 <= d_vocab <= 2**32:
        raise ValueError(f"d_vocab must be in 1..2**32, got {d_vocab}")
    path, dtype = Path(path), "<u2" if d_vocab <= 2**16 else "<u4"
    partial = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    digest, n_tokens = hashlib.sha256(), 0
    try:
        with partial.open("wb") as file:
            file.write(b" " * _HEADER_BYTES)
            for chunk in chunks:
                raw = _packed(chunk, d_vocab, dtype)
                file.write(raw)
                digest.update(raw)
                n_tokens += len(chunk)
            if not n_tokens:
                raise ValueError("chunks hold no token: nothing to write")
            header = {"format": _FORMAT, "dtype": dtype, "n_tokens": n_tokens, "d_vocab": d_vocab}
            header["sha256"] = digest.hexdigest()
            file.seek(0)
            file.write(json.dumps(header).encode().ljust(_HEADER_BYTES - 1) + b"\n")
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    return open_token_file(path, verify=False)


def open_token_file(path: str | Path, *, verify: bool = True) -> TokenFile:
    """Open a file of `write_token_file`; `verify` reads it once to compare its sha256.

    Raises:
        CorpusError: if the file is missing, something else, cut off or damaged
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            header = json.loads(file.read(_HEADER_BYTES))
        dtype, n_tokens = np.dtype(header["dtype"]), header["n_tokens"]
        found, expected = path.stat().st_size, _HEADER_BYTES + n_tokens * dtype.itemsize
        if header["format"] != _FORMAT or found != expected:
            raise ValueError(f"{header['format']} of {found} bytes, expected {expected}")
        tokens = np.memmap(path, dtype, mode="r", offset=_HEADER_BYTES)
        if verify and hashlib.sha256(tokens.data).hexdigest() != header["sha256"]:
            raise ValueError(f"its sha256 is not {header['sha256']}")
        return TokenFile(path, tokens, header["d_vocab"], header["sha256"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CorpusError(f"{path} is no whole token file ({error}): write it again") from error


def _packed(chunk: Int[Tensor, " _"], d_vocab: int, dtype: str) -> bytes:
    if not isinstance(chunk, Tensor) or chunk.ndim != 1 or "int" not in str(chunk.dtype):
        raise ValueError(f"chunks must be int tensors of one axis, got {describe(chunk)}")
    if len(chunk) and not 0 <= int(chunk.min()) <= int(chunk.max()) < d_vocab:
        ids = f"{int(chunk.min())}..{int(chunk.max())}"
        raise ValueError(f"chunks hold ids {ids}, outside the vocabulary 0..{d_vocab - 1}")
    return chunk.cpu().numpy().astype(dtype).tobytes()
