"""Texts: tiny Shakespeare from the package, known corpora by name, any text file by path.

A known corpus is fetched unless the cache of `datasets` has it. Leaves out tokens and batches.
"""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import http.client
import io
import json
import os
import socket
import threading
import urllib.request
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlsplit

from smearlens._explain import explained


class CorpusError(ValueError):
    """A data file is missing, cut off, damaged or out of reach; the message says what to do."""


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """The text of one split, and where it came from."""

    name: str
    split: str
    text: str = field(repr=False)
    source: str  # path or address
    sha256: str  # of `text` in UTF-8
    note: str  # which part of the source the text is


class _HubRecipe(NamedTuple):
    repository: str
    config: str | None
    folder: str  # of its Arrow files, below the cache of `datasets`
    sha256: Mapping[str, str | None]  # split → sha256 of its text, where one is published
    blank: str = ""  # the text that the row "" stands for
    separator: str = ""  # between two rows


EMBEDDED_FILES = Path(__file__).with_name("files")
_EMBEDDED = "tiny-shakespeare"
_EMBEDDED_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
_EMBEDDED_CUTS = {"train": (0, 90), "validation": (90, 100), "all": (0, 100)}  # percent
_CUTS = {"train": (0, 90), "validation": (90, 95), "test": (95, 100), "all": (0, 100)}
_ZIP_HOST = "http://mattmahoney.net/dc"
_ZIPPED = {  # sha256 of the text
    "enwik8": "2b49720ec4d78c3c9fabaee6e4179a5e997302b3a70029f30f2d582218c024a8",
    "text8": "6e890197040d37d85beb962ae1f041ff1d9a9ca8d20c7d99c85027eebf51dca7",
}
_WIKITEXT_SHA256 = {
    "train": "6707892fa3788b5ab9ed78ab5ff37d9fe825f6011a2ad4fcd6a6d467f0e7da57",
    "validation": "4cd0f6876d07a413aa911261ff6d363c72d757d47f0fdd6015702014c89cb9c7",
    "test": "173c87a53759e0201f33e0ccf978e510c2042d7f2cb78229d9a50d79b9e7dd08",
}
_WIKITEXT = "Salesforce/wikitext", "wikitext-2-raw-v1", "*wikitext/wikitext-2-raw-v1"
_STORIES = "roneneldan/TinyStories", None, "roneneldan___tiny_stories/*"
_HUB = {
    "wikitext-2-raw": _HubRecipe(*_WIKITEXT, _WIKITEXT_SHA256, blank=" \n"),
    "tinystories": _HubRecipe(
        *_STORIES, {"train": None, "validation": None}, separator="<|endoftext|>"
    ),
}
_REMEDY = "fetch it again with load_corpus({!r}, ..., rebuild=True)"
CORPORA = (_EMBEDDED, *_HUB, *_ZIPPED)


@explained
def load_corpus(
    name_or_path: str | Path,
    split: str = "train",
    *,
    max_chars: int | None = None,
    rebuild: bool = False,
) -> Corpus:
    """Text of one split of a corpus.

    | corpus | splits | text |
    |---|---|---|
    | `tiny-shakespeare` | train 90 %, validation 10 %, all | in the package |
    | `wikitext-2-raw` | train, validation, test | the original file |
    | `tinystories` | train, validation | stories joined by `<|endoftext|>` |
    | `enwik8`, `text8` | train 90 %, validation 5 %, test 5 %, all | 90M, 5M, 5M bytes |
    | a path | as `enwik8` | UTF-8, plain, `.gz` or `.zip` |

    Percentages are of the bytes, rounded down to whole characters. Figures for a part of enwik8 or
    text8, given by path, are not comparable with those for the whole.

    >>> corpus = load_corpus("tiny-shakespeare")
    >>> len(corpus.text), corpus.text[:14], corpus.note
    (1003854, 'First Citizen:', 'characters 0..1003854 of 1115394')

    Args:
        name_or_path: a name of `CORPORA`, else a path (`./enwik8` is a file of that name)
        split: `train`, `validation`, `test` or `all`, as the table allows
        max_chars: keep only so many characters from the start of the split
        rebuild: fetch a corpus again although it is in the cache

    Raises:
        ValueError: for an unknown name or split
        CorpusError: for a damaged file and, within a second, for a corpus that is out of reach
    """
    name, path = str(name_or_path), Path(name_or_path).expanduser()
    if max_chars is not None and max_chars < 1:
        raise ValueError(f"max_chars must be at least 1, or None for the whole, got {max_chars}")
    if rebuild and name not in (*_HUB, *_ZIPPED):
        raise ValueError(f"rebuild=True is for a corpus that is fetched, not for {name!r}")
    if name not in CORPORA and not path.is_file():
        raise ValueError(f"{name!r} is neither a file nor one of {', '.join(CORPORA)}")
    cuts = _EMBEDDED_CUTS if name == _EMBEDDED else _CUTS
    allowed = _HUB[name].sha256 if name in _HUB else cuts
    if split not in allowed:
        raise ValueError(f"{name} has no split {split!r}; it has {', '.join(allowed)}")
    if name in _HUB:
        text, source, note = _hub_text(name, split, max_chars, rebuild)
    else:
        raw, source = _whole_file(name, path, rebuild)
        text, note = _cut(raw, cuts[split], source)
    if max_chars is not None and len(text) > max_chars:
        text, note = text[:max_chars], f"first {max_chars} characters of {note}"
    sha256 = hashlib.sha256(text.encode()).hexdigest()
    return Corpus(name=name, split=split, text=text, source=source, sha256=sha256, note=note)


def read_text(path: str | Path) -> str:
    """A whole UTF-8 text file, plain, `.gz` or `.zip`; a `CorpusError` if it is damaged."""
    return _decode(_unpack(Path(path).expanduser()), str(path))


def _whole_file(name: str, path: Path, rebuild: bool) -> tuple[bytes, str]:
    """The unpacked, verified bytes of a corpus that is one file, and its source."""
    if name == _EMBEDDED:
        path = EMBEDDED_FILES / "tinyshakespeare.txt.gz"
        return _unpack(path, "reinstall smearlens", _EMBEDDED_SHA256), path.name
    if name in _ZIPPED:
        source, path = f"{_ZIP_HOST}/{name}.zip", _cache_folder() / f"smearlens/{name}.zip"
        if rebuild or not path.is_file():
            _download(name, source, path)
        return _unpack(path, _REMEDY.format(name), _ZIPPED[name]), source
    return _unpack(path), str(path)


def _unpack(path: Path, remedy: str = "fetch it again", sha256: str | None = None) -> bytes:
    try:
        raw = path.read_bytes()
        if raw.startswith(b"\x1f\x8b"):
            raw = gzip.decompress(raw)
        elif raw.startswith(b"PK\x03\x04"):
            with zipfile.ZipFile(io.BytesIO(raw)) as archive:
                if len(archive.namelist()) != 1:
                    raise ValueError(f"a zip of {len(archive.namelist())} files, expected one")
                raw = archive.read(archive.namelist()[0])
        _verify(raw, sha256)
    except (OSError, EOFError, ValueError, zlib.error, zipfile.BadZipFile) as error:
        raise CorpusError(f"{path} is missing, cut off or damaged ({error}): {remedy}") from error
    return raw


def _verify(raw: bytes, sha256: str | None) -> None:
    if not raw:
        raise ValueError("it is empty")
    if sha256 is not None and (found := hashlib.sha256(raw).hexdigest()) != sha256:
        raise ValueError(f"its sha256 is {found}, expected {sha256}")


def _decode(raw: bytes, source: str) -> str:
    try:
        return raw.decode()
    except UnicodeDecodeError as error:
        raise CorpusError(f"{source} is not UTF-8 ({error}): convert it with iconv") from error


def _cut(raw: bytes, percent: tuple[int, int], source: str) -> tuple[str, str]:
    """The part of a text between two percentages of its bytes, and a note that says so."""
    text = _decode(raw, source)
    start, stop = (len(raw[: len(raw) * p // 100].decode(errors="ignore")) for p in percent)
    if start == stop:
        raise CorpusError(f"{source} has {len(raw)} bytes: too short for this split, use 'all'")
    return text[start:stop], f"characters {start}..{stop} of {len(text)}"


def _cache_folder() -> Path:
    """Where `datasets` keeps its files, without the second its import takes."""
    home = os.environ.get("HF_HOME", os.environ.get("XDG_CACHE_HOME", "~/.cache") + "/huggingface")
    return Path(os.environ.get("HF_DATASETS_CACHE", f"{home}/datasets")).expanduser()


def _hub_text(name: str, split: str, max_chars: int | None, rebuild: bool) -> tuple[str, str, str]:
    """Text of a split of a data set of the Hub, its source, and a note."""
    recipe, parts, size = _HUB[name], [], 0
    paths = [] if rebuild else _cached_files(recipe, split)
    paths = paths or _fetch_rows(name, recipe, split, rebuild)
    try:
        for row in _read_rows(paths, split):
            parts.append(row or recipe.blank)
            if max_chars is not None and (size := size + len(parts[-1])) >= max_chars:
                break
        text = recipe.separator.join(parts)
        _verify(text.encode(), recipe.sha256[split] if max_chars is None else None)
    except (OSError, KeyError, ValueError) as error:  # pyarrow's errors are among these
        failed = f"{paths[0]} in the cache is damaged ({error})"
        raise CorpusError(f"{failed}: {_REMEDY.format(name)}") from error
    return text, recipe.repository, f"{len(parts)} rows"


def _cached_files(recipe: _HubRecipe, split: str) -> list[Path]:
    """Arrow files of a split in the newest complete build: config/version/hash/*.arrow."""
    found = _cache_folder().glob(f"{recipe.folder}/*/*/*-{split}*.arrow")
    complete = [path for path in found if path.parent.suffix != ".incomplete"]
    newest = max((path.parent for path in complete), key=os.path.getmtime, default=None)
    return sorted(path for path in complete if path.parent == newest)


def _read_rows(paths: list[Path], split: str) -> Iterator[str]:
    import pyarrow

    n_rows = 0
    for path in paths:
        with pyarrow.memory_map(str(path)) as source, pyarrow.ipc.open_stream(source) as stream:
            for batch in stream:
                n_rows += batch.num_rows
                yield from batch.column("text").to_pylist()
    info = json.loads(paths[0].with_name("dataset_info.json").read_text())
    if n_rows != (expected := info["splits"][split]["num_examples"]):
        raise ValueError(f"{n_rows} rows, expected {expected}")


def _fetch_rows(name: str, recipe: _HubRecipe, split: str, rebuild: bool) -> list[Path]:
    _check_reachable(name, os.environ.get("HF_ENDPOINT", "https://huggingface.co"))
    import datasets.exceptions

    mode, dataset = "force_redownload" if rebuild else None, (recipe.repository, recipe.config)
    try:
        rows = datasets.load_dataset(*dataset, split=split, download_mode=mode)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        failed = f"{recipe.repository} could not be fetched into {_cache_folder()}"
        raise CorpusError(f"{failed} ({error}): {_REMEDY.format(name)}") from error
    return [Path(file["filename"]) for file in rows.cache_files]


def _download(name: str, address: str, path: Path) -> None:
    _check_reachable(name, address)
    partial = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with urllib.request.urlopen(address, timeout=10) as response:
            partial.write_bytes(response.read())
        partial.replace(path)
    except (OSError, http.client.HTTPException) as error:
        raise CorpusError(f"{address} could not be fetched to {path}: {error}") from error
    finally:
        partial.unlink(missing_ok=True)


def _check_reachable(name: str, address: str) -> None:
    """Raise within a second, with the ways out, when there is no network or it is switched off."""
    values = [os.environ.get(name, "") for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE")]
    off = any(value.upper() in ("1", "ON", "YES", "TRUE") for value in values)
    if not off and _answers(address, seconds=0.5):
        return
    reason = "is switched off by HF_HUB_OFFLINE" if off else "gets no answer"
    raise CorpusError(
        f"{name} must be fetched from {address}, which {reason} (cache: {_cache_folder()}). "
        "Three ways out: give the path of a copy, load_corpus('path/to/file'); fill the cache on a "
        f"machine with a network, by load_corpus({name!r}) there, and point HF_DATASETS_CACHE to "
        f"it; or take the embedded corpus, load_corpus({_EMBEDDED!r})"
    )


def _answers(address: str, seconds: float) -> bool:
    """Whether a host, or the proxy before it, answers in time, the look-up of its name included."""
    url = urlsplit(urllib.request.getproxies().get(urlsplit(address).scheme, address))
    port, reached = url.port or (443 if url.scheme == "https" else 80), threading.Event()

    def connect() -> None:
        with contextlib.suppress(OSError), socket.create_connection((url.hostname, port), seconds):
            reached.set()

    (thread := threading.Thread(target=connect, daemon=True)).start()
    thread.join(seconds)
    return reached.is_set()
