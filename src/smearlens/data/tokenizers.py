"""Tokenizers that need no download: characters, bytes and GPT-2's byte-level BPE.

Contains the protocol that the library asks of a tokenizer and three classes that keep it. Leaves
out training a vocabulary.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cache
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Int, Int64
from torch import Tensor

from smearlens._explain import explained
from smearlens.data.corpora import EMBEDDED_FILES, read_text

END_OF_TEXT = "<|endoftext|>"


@runtime_checkable
class Tokenizer(Protocol):
    """What the library asks of a tokenizer."""

    @property
    def d_vocab(self) -> int:
        """Number of tokens: ids are `0 .. d_vocab - 1`."""
        ...

    def encode(self, text: str) -> Int64[Tensor, " pos"]:
        """Ids of a text."""
        ...

    def decode(self, tokens: Int[Tensor, " pos"] | Sequence[int]) -> str:
        """Text of a sequence of ids."""
        ...

    def tokens(self, tokens: Int[Tensor, " pos"] | Sequence[int]) -> list[str]:
        """One printable piece per id, for pictures: space `·`, newline `↵`, tab `⇥`."""
        ...


@explained
class CharTokenizer:
    r"""The distinct characters of a text, sorted; the id of a character is its rank.

    >>> tokenizer = CharTokenizer("to be")
    >>> tokenizer.characters, tokenizer.encode("bet").tolist(), tokenizer.decode([2, 3])
    (' beot', [1, 2, 4], 'eo')

    `CharTokenizer(tokenizer.characters)` is the same tokenizer: that string is all to be saved.

    Args:
        text: every character of it becomes a token

    Raises:
        ValueError: if the text is empty
    """

    def __init__(self, text: str):
        if not text:
            raise ValueError("text is empty: a vocabulary needs at least one character")
        self.characters = "".join(sorted(set(text)))
        self._codes = _code_points(self.characters)

    def __repr__(self) -> str:
        return f"CharTokenizer({self.d_vocab} characters)"

    @property
    def d_vocab(self) -> int:
        """Number of characters."""
        return len(self.characters)

    def encode(self, text: str) -> Int64[Tensor, " pos"]:
        """Ids of a text.

        Raises:
            ValueError: if a character is not in the vocabulary; the message names the first one
        """
        codes = _code_points(text)
        ids = np.searchsorted(self._codes, codes).clip(max=self.d_vocab - 1)
        unknown = self._codes[ids] != codes
        if unknown.any():
            position = int(unknown.argmax())
            raise ValueError(
                f"text[{position}] is {text[position]!r}, which is not among the {self.d_vocab} "
                "characters of this tokenizer: remove it, or build the tokenizer from a text that "
                "contains it"
            )
        return torch.from_numpy(ids)

    def decode(self, tokens: Int[Tensor, " pos"] | Sequence[int]) -> str:
        """Text of a sequence of ids."""
        codes = self._codes[_checked_ids(tokens, self.d_vocab)]
        return codes.tobytes().decode("utf-32-le", "surrogatepass")

    def tokens(self, tokens: Int[Tensor, " pos"] | Sequence[int]) -> list[str]:
        """One printable piece per id, for pictures."""
        return [_printable(character) for character in self.decode(tokens)]


@explained
class ByteTokenizer:
    r"""The 256 bytes of UTF-8: no text is unknown, a non-ASCII character takes several tokens.

    >>> ByteTokenizer().encode("né").tolist(), ByteTokenizer().tokens([110, 195, 169])
    ([110, 195, 169], ['n', '\\xc3', '\\xa9'])
    """

    d_vocab = 256

    def encode(self, text: str) -> Int64[Tensor, " pos"]:
        """Ids of a text, one per byte of its UTF-8 form.

        Raises:
            ValueError: for half a surrogate pair, which has no such form; the message says where
        """
        return torch.from_numpy(np.frombuffer(_utf8(text), np.uint8).astype(np.int64))

    def decode(self, tokens: Int[Tensor, " pos"] | Sequence[int]) -> str:
        """Text of a sequence of bytes; bytes that are no UTF-8 become U+FFFD."""
        return _checked_ids(tokens, 256).astype(np.uint8).tobytes().decode(errors="replace")

    def tokens(self, tokens: Int[Tensor, " pos"] | Sequence[int]) -> list[str]:
        r"""One printable piece per byte, for pictures; a part of a character as `\xc3`."""
        return [_printable_bytes(bytes((i,))) for i in _checked_ids(tokens, 256).tolist()]


@explained
class GPT2Tokenizer:
    """GPT-2's byte-level BPE, 50,257 tokens. `gpt2_tokenizer()` returns a shared one.

    The vocabulary is derived from the merges: 256 bytes, one entry per merge in order, then the end
    of text. `<|endoftext|>` in a text is that one token, 50256.

    Source:
        Radford et al. 2019, "Language Models are Unsupervised Multitask Learners"
    """

    def __init__(self):
        import tokenizers

        merges = _read_merges()
        characters = _byte_characters()
        pieces = [*characters.values(), *(a + b for a, b in merges), END_OF_TEXT]
        self.vocabulary = {piece: i for i, piece in enumerate(pieces)}
        self._bytes = {character: byte for byte, character in characters.items()}
        self._pieces = pieces
        backend: Any = tokenizers.Tokenizer(tokenizers.models.BPE(self.vocabulary, merges))
        backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = tokenizers.decoders.ByteLevel()
        backend.add_special_tokens([END_OF_TEXT])
        self._backend = backend

    def __repr__(self) -> str:
        return f"GPT2Tokenizer({self.d_vocab} tokens)"

    @property
    def d_vocab(self) -> int:
        """Number of tokens."""
        return len(self._pieces)

    @property
    def end_of_text(self) -> int:
        """Id of `<|endoftext|>`."""
        return self.d_vocab - 1

    def encode(self, text: str) -> Int64[Tensor, " pos"]:
        """Ids of a text; no start token is added. A long text is encoded on all cores.

        Raises:
            ValueError: for half a surrogate pair; the message says where
        """
        try:
            encodings = self._backend.encode_batch_fast(_split_at_spaces(text, 10_000))
        except (TypeError, UnicodeError):
            _utf8(text)  # says which character it was
            raise
        return torch.tensor([i for e in encodings for i in e.ids], dtype=torch.int64)

    def decode(self, tokens: Int[Tensor, " pos"] | Sequence[int]) -> str:
        """Text of a sequence of ids; bytes that are no UTF-8 become U+FFFD."""
        ids = _checked_ids(tokens, self.d_vocab).tolist()
        return self._backend.decode(ids, skip_special_tokens=False)

    def tokens(self, tokens: Int[Tensor, " pos"] | Sequence[int]) -> list[str]:
        r"""One printable piece per id, for pictures; a part of a character as `\xc3`."""
        pieces = (self._pieces[i] for i in _checked_ids(tokens, self.d_vocab).tolist())
        return [_printable_bytes(bytes(self._bytes[c] for c in piece)) for piece in pieces]


@cache
def gpt2_tokenizer() -> GPT2Tokenizer:
    """GPT-2's tokenizer, built on the first call from the merges in the package.

    >>> gpt2_tokenizer().encode("Hello world").tolist(), gpt2_tokenizer().tokens([15496, 995])
    ([15496, 995], ['Hello', '·world'])
    """
    return GPT2Tokenizer()


def _read_merges() -> list[tuple[str, str]]:
    text = read_text(EMBEDDED_FILES / "gpt2_merges.txt.gz")
    pairs = (line.split(" ") for line in text.splitlines()[1:])  # the first line is a version
    return [(left, right) for left, right in pairs]


def _byte_characters() -> dict[int, str]:
    """Byte → the character that stands for it in GPT-2's vocabulary, in the order of the ids.

    Visible Latin-1 characters stand for themselves and come first; the other 68 bytes are written
    with the characters from U+0100 on.
    """
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in visible]
    return {byte: chr(byte) for byte in visible} | {
        byte: chr(0x100 + i) for i, byte in enumerate(hidden)
    }


def _split_at_spaces(text: str, size: int) -> list[str]:
    """Parts of `size` characters or a little more, cut before a single space between two words.

    GPT-2 never merges across such a place: the parts, which can be encoded at the same time, encode
    to what the whole encodes to.
    """
    cut, parts, start = re.compile(r"\S(?= \S)"), [], 0
    while start < len(text):
        found = cut.search(text, start + size)
        stop = found.end() if found else len(text)
        parts.append(text[start:stop])
        start = stop
    return parts


def _utf8(text: str) -> bytes:
    """The text in UTF-8, or a ValueError about the first character that has no such form."""
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"text[{error.start}] is {text[error.start]!r}, half of a surrogate pair and no "
            "character: read the text with errors='replace', or remove it"
        ) from error


def _code_points(text: str) -> np.ndarray:
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.dtype("<u4"))


def _checked_ids(tokens: Int[Tensor, " pos"] | Sequence[int], d_vocab: int) -> np.ndarray:
    ids = tokens.detach().cpu().numpy() if isinstance(tokens, Tensor) else np.asarray(tokens)
    if ids.ndim != 1:
        raise ValueError(
            f"tokens must be one sequence, got shape {ids.shape}: take them row by row"
        )
    if ids.size and ids.dtype.kind not in "iu":
        raise TypeError(f"tokens must be integers, got {ids.dtype}")
    ids = ids.astype(np.int64)
    outside = (ids < 0) | (ids >= d_vocab)
    if outside.any():
        position = int(outside.argmax())
        raise ValueError(
            f"tokens[{position}] is {ids[position]}, outside the vocabulary 0..{d_vocab - 1}: "
            "was it made by another tokenizer?"
        )
    return ids


def _printable(piece: str) -> str:
    piece = piece.replace(" ", "·").replace("\n", "↵").replace("\t", "⇥")
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in piece)


def _printable_bytes(piece: bytes) -> str:
    try:
        return _printable(piece.decode())
    except UnicodeDecodeError:
        return "".join(f"\\x{byte:02x}" for byte in piece)
