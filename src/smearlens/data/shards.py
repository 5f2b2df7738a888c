"""Corpora larger than memory: text files tokenized into a folder of shards, read as one sequence.

`index.json` lists the token files with their counts and sha256, and how far the text was read; it
is replaced after every shard, so that a killed call goes on from there. Leaves out the token files
themselves (token_files.py) and batches (batches.py, which take a `ShardedTokens` as tokens).
"""

from __future__ import annotations

import gzip
import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int64, Integer
from torch import Tensor

from smearlens._files import write_atomically
from smearlens.data.corpora import CorpusError
from smearlens.data.token_files import TokenFile, open_token_file, write_token_file
from smearlens.data.tokenizers import Tokenizer

_FORMAT, _INDEX = "smearlens shards 1", "index.json"
_Position = tuple[int, int]  # number of the text file, bytes of it that have been tokenized


class ShardedTokens:
    """One sequence of tokens over several arrays: what is indexed is read, and nothing else.

    It is indexed as a NumPy array of one axis is, by a number, a slice or an array of numbers of
    any shape, and gives new NumPy arrays; `TokenBatches` and `text_loss` take it as tokens.

    >>> tokens = ShardedTokens([np.array([5, 6, 7]), np.array([8]), np.array([9, 10])])
    >>> len(tokens), tokens[1:5].tolist(), tokens[np.array([[2, 3], [-1, 0]])].tolist()
    (6, [6, 7, 8, 9], [[7, 8], [10, 5]])

    Args:
        parts: the arrays, in order, in memory or mapped from files

    Raises:
        ValueError: if there are none, one is empty, or they differ in dtype
    """

    ndim = 1

    def __init__(self, parts: Sequence[Integer[np.ndarray, " _"]]):
        lengths = [len(part) for part in parts]
        if not lengths or not all(lengths) or len({part.dtype for part in parts}) > 1:
            given = [f"{part.dtype}[{len(part)}]" for part in parts]
            raise ValueError(f"parts must be arrays of one dtype, none of them empty, got {given}")
        self.parts, self.dtype = tuple(parts), parts[0].dtype
        self._starts = np.cumsum([0, *lengths])

    def __repr__(self) -> str:
        return f"ShardedTokens({len(self):,} tokens in {len(self.parts)} parts)"

    def __len__(self) -> int:
        return int(self._starts[-1])

    @property
    def shape(self) -> tuple[int]:
        """The number of tokens, as NumPy writes it."""
        return (len(self),)

    def __getitem__(self, index: Any) -> Any:
        """Tokens at `index`; an IndexError outside of the sequence."""
        if isinstance(index, slice):
            start, stop, step = index.indices(len(self))
            return self._slice(start, stop) if step == 1 else self[np.arange(start, stop, step)]
        at = np.asarray(index)
        if at.dtype.kind not in "iu":
            raise IndexError(
                f"the index must be an integer, a slice or integers, got {index!r:.60}"
            )
        if at.size and not -len(self) <= at.min() <= at.max() < len(self):
            raise IndexError(f"index {at.min()}..{at.max()} is outside of {len(self)} tokens")
        at = np.where(at < 0, at + len(self), at)
        owner = np.searchsorted(self._starts, at, side="right") - 1
        found = np.empty(at.shape, self.dtype)
        for n in np.unique(owner):
            here = owner == n
            found[here] = self.parts[n][at[here] - self._starts[n]]
        return found if found.ndim else found[()]

    def _slice(self, start: int, stop: int) -> Integer[np.ndarray, " _"]:
        bounds = zip(self.parts, self._starts[:-1].tolist(), strict=True)
        cut = [part[max(start - first, 0) : max(stop - first, 0)] for part, first in bounds]
        return np.concatenate(cut)


def write_shards(
    folder: str | Path,
    sources: Sequence[str | Path],
    tokenizer: Tokenizer,
    *,
    shard_tokens: int = 2**26,
    piece_bytes: int = 2**20,
) -> ShardedTokens:
    """Tokenize text files into `folder`; the same call again goes on where it was killed.

    Texts are read in pieces of at most `piece_bytes`; no more than one is in memory. Pieces end at
    a newline between two characters that are no space, where GPT-2's tokenizer has a seam as well:
    the tokens are those of the whole text. Only where a piece has no such newline is it cut at its
    last newline, or its last character.

    Args:
        folder: made if it is not there
        sources: UTF-8 text files, plain or `.gz`, one after the other
        tokenizer: of the texts
        shard_tokens: a shard is closed when it has so many, at the end of a piece
        piece_bytes: of text that are tokenized at a time

    Returns:
        as `open_shards`, without reading the shards again

    Raises:
        CorpusError: if a source is missing, empty or no UTF-8, or `folder` holds another corpus
        ValueError: for a size out of range
    """
    if shard_tokens < 1 or piece_bytes < 4 or not len(sources):
        raise ValueError(
            "need a source, shard_tokens >= 1 and piece_bytes >= 4, got "
            f"{len(sources)} sources, shard_tokens={shard_tokens}, piece_bytes={piece_bytes}"
        )
    folder, paths = Path(folder), [Path(path).expanduser() for path in sources]
    index = _begin(folder, paths, tokenizer, (shard_tokens, piece_bytes))
    if index["finished"]:
        return open_shards(folder, verify=False)
    pieces = _pieces(paths, tuple(index["position"]), piece_bytes)
    for first in pieces:
        path = folder / f"{len(index['shards']):06d}.tokens"
        chunks = _Chunks(first, pieces, tokenizer, shard_tokens)
        shard = write_token_file(path, chunks, tokenizer.d_vocab)
        index["shards"].append(_entry(shard))
        index["position"] = chunks.position
        _write_index(folder, index)
    if not index["shards"]:
        raise CorpusError(f"the sources of {folder} hold no text: {[str(p) for p in paths]}")
    _write_index(folder, {**index, "finished": True})
    return open_shards(folder, verify=False)


def open_shards(folder: str | Path, *, verify: bool = True) -> ShardedTokens:
    """The tokens of a folder of `write_shards`, mapped from its files.

    Args:
        folder: with `index.json`
        verify: read every shard once to compare its sha256; counts and names are always compared

    Raises:
        CorpusError: if the folder is none, unfinished, or a shard is missing, damaged or another
    """
    folder = Path(folder)
    index = _read_index(folder)
    if not index["finished"]:
        raise CorpusError(f"{folder} was never finished: call write_shards again, as before")
    files = [open_token_file(folder / shard["file"], verify=verify) for shard in index["shards"]]
    for file, shard in zip(files, index["shards"], strict=True):
        if _entry(file) != shard:
            raise CorpusError(
                f"{file.path} is another shard than {_INDEX} lists ({_entry(file)}, expected "
                f"{shard}): restore it, or delete the folder and write it again"
            )
    return ShardedTokens([file.tokens for file in files])


class _Chunks:
    """The chunks of one shard; `position` is where the text goes on behind them."""

    def __init__(
        self,
        first: tuple[str, _Position],
        rest: Iterator[tuple[str, _Position]],
        tokenizer: Tokenizer,
        enough: int,
    ):
        self.first, self.rest, self.tokenizer, self.enough = first, rest, tokenizer, enough
        self.position = first[1]

    def __iter__(self) -> Iterator[Int64[Tensor, " _"]]:
        piece: tuple[str, _Position] | None = self.first
        n_tokens = 0
        while piece is not None:
            text, self.position = piece
            ids = self.tokenizer.encode(text)
            n_tokens += len(ids)
            yield ids
            piece = next(self.rest, None) if n_tokens < self.enough else None


def _pieces(
    paths: Sequence[Path], position: _Position, size: int
) -> Iterator[tuple[str, _Position]]:
    """Pieces of the texts from `position` on, each with the position behind it."""
    started, offset = position
    for number, path in enumerate(paths[started:], start=started):
        try:
            with path.open("rb") as plain:
                zipped = plain.read(2) == b"\x1f\x8b"
                plain.seek(0)
                file = gzip.GzipFile(fileobj=plain) if zipped else plain
                file.seek(offset)
                rest = b""
                while block := rest + file.read(size - len(rest)):
                    text, rest = _cut(block, last=len(block) < size)
                    offset += len(block) - len(rest)
                    yield text, (number, offset)
        except (OSError, EOFError, UnicodeDecodeError) as error:
            raise CorpusError(
                f"{path} cannot be read from byte {offset} on ({error}): it must be whole, and "
                "UTF-8; mend it and call write_shards again"
            ) from error
        offset = 0


def _cut(block: bytes, *, last: bool) -> tuple[str, bytes]:
    """A piece from the start of `block`, and the bytes that stay for the next one."""
    if last:
        return block.decode(), b""
    whole = len(block)
    for back in range(1, 4):  # a character has at most four bytes: is the last one cut off?
        byte = block[-back]
        if byte >= 0xC0:
            needed = 2 if byte < 0xE0 else 3 if byte < 0xF0 else 4
            whole -= back if back < needed else 0
        if byte < 0x80 or byte >= 0xC0:
            break
    text = block[:whole].decode()
    end = text.rfind("\n", 0, -1)
    while end > 0 and (text[end - 1].isspace() or text[end + 1].isspace()):
        end = text.rfind("\n", 0, end)
    if end <= 0:  # no such newline: the last one, or none
        end = text.rfind("\n")
    piece = text[: end + 1] or text
    return piece, block[len(piece.encode()) :]


def _begin(
    folder: Path, paths: Sequence[Path], tokenizer: Tokenizer, sizes: tuple[int, int]
) -> dict[str, Any]:
    """The index to go on from: a fresh one, or that of a call which was killed."""
    try:
        facts = [{"file": path.name, "bytes": path.stat().st_size} for path in paths]
    except OSError as error:
        raise CorpusError(f"{error.filename} cannot be read: {error.strerror}") from error
    text = next((text for text, _ in _pieces(paths, (0, 0), sizes[1])), "")
    made_of = {
        "format": _FORMAT,
        "d_vocab": tokenizer.d_vocab,
        "shard_tokens": sizes[0],
        "piece_bytes": sizes[1],
        "sources": facts,
        "first_piece": hashlib.sha256(tokenizer.encode(text).numpy().tobytes()).hexdigest(),
    }
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / _INDEX).exists():
        return {**made_of, "shards": [], "position": (0, 0), "finished": False}
    index = _read_index(folder)
    if changed := {k: (index.get(k), v) for k, v in made_of.items() if index.get(k) != v}:
        raise CorpusError(
            f"{folder} holds another corpus (before, now): {changed}; give another folder, or "
            "delete this one"
        )
    for path in folder.glob("*.tmp"):  # of the call that was killed
        path.unlink(missing_ok=True)
    return index


def _entry(shard: TokenFile) -> dict[str, Any]:
    return {"file": shard.path.name, "n_tokens": len(shard.tokens), "sha256": shard.sha256}


def _write_index(folder: Path, index: dict[str, Any]) -> None:
    write_atomically(folder / _INDEX, json.dumps(index, indent=1) + "\n")


def _read_index(folder: Path) -> dict[str, Any]:
    path = folder / _INDEX
    try:
        index = json.loads(path.read_text())
        if index["format"] != _FORMAT or {"shards", "position", "finished"} - index.keys():
            raise ValueError(f"format {index['format']!r}, keys {sorted(index)}")
        return index
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CorpusError(
            f"{path} is no index of shards ({error}): restore it, or delete the folder and write "
            "it again"
        ) from error
