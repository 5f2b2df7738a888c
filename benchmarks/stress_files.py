"""Files that are not as they were written: every one is refused, with path, finding and remedy.

    python benchmarks/stress_files.py --flips 200

Contains single bits flipped in checkpoints and saved models of every family, broken files and
folders of many kinds, weights that do not fit, damaged data files, and damaged files of a study.
Leaves out files that a kill left behind: `stress_saves`.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import json
import os
import pickle
import random
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from campaign import Campaign, script
from safetensors.torch import load_file, save_file
from stress_calls import FAMILIES, model
from stress_input import on_purpose, unchecked

from smearlens import ConvAttnConfig
from smearlens.data.corpora import CorpusError, load_corpus
from smearlens.data.pig_latin import read_pairs
from smearlens.data.tokenizers import CharTokenizer
from smearlens.experiments.commands import claims
from smearlens.experiments.grid import run_grid
from smearlens.experiments.study import open_study, seconds_in_cells
from smearlens.models.families import load_model
from smearlens.models.files import ModelFileError
from smearlens.training import checkpoint as checkpoints
from smearlens.training.checkpoint import CheckpointError
from smearlens.training.run import RunConflictError, RunFolder

Damage = Callable[[Path], object]


class Bomb:
    """A pickle that would run code."""

    def __reduce__(self) -> tuple:
        return os.mkdir, ("/tmp/code-was-run",)


def make_checkpoint(name: str, parent: Path) -> Path:
    given = model(name)
    optimizer = torch.optim.AdamW(given.parameters())
    parent.mkdir(parents=True)
    given_to = {"updater": optimizer.state_dict(), "random_states": [{"torch": torch.ones(3)}]}
    return checkpoints.write_checkpoint(parent, given, given_to, step=7)


def make_model(name: str, parent: Path) -> Path:
    parent.mkdir(parents=True)
    model(name).save_pretrained(parent / "model")
    return parent / "model"


def read_checkpoint(name: str, path: Path) -> object:
    """Read, and put into a model: every check there is."""
    found = checkpoints.read_checkpoint(path)
    checkpoints.load_weights(model(name), found)
    return found


def explained(error: Exception, path: Path) -> str:
    """What is missing in the message of a refusal; nothing if it is complete."""
    text = str(error)
    lacking = [] if text.startswith(str(path)) else ["the path first"]
    if isinstance(error, CheckpointError):
        parts = {"found": error.found, "expected": error.expected, "remedy": error.remedy}
        lacking += [name for name, part in parts.items() if not part or part not in text]
    elif ";" not in text and "expected" not in text:
        lacking.append("what is expected or to be done")
    return f"message lacks {', '.join(lacking)}: {text:.120}" if lacking else ""


def refused(read: Callable[[], object], kind: type[Exception], path: Path) -> str:
    """How a read of a damaged file went wrong; nothing if it was refused as it should be."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            read()
    except kind as error:
        return explained(error, path)
    except Exception as error:
        return f"{type(error).__name__}: {error!s:.120}"
    return "accepted"


SUBJECTS: dict[str, tuple[Callable, Callable, type[Exception]]] = {
    "checkpoint": (make_checkpoint, read_checkpoint, CheckpointError),
    "saved model": (make_model, lambda name, path: load_model(path), ModelFileError),
}


def flips(count: int, subject: str, root: Path, draw: random.Random) -> Campaign:
    """Flip single bits, file by file in turn, over all families."""
    make, read, kind = SUBJECTS[subject]
    found = Campaign(
        claim=f"A flipped bit is noticed: {subject}",
        tried="one random bit flipped in one file, the files of every family in turn, then read",
        target="every flip refused with path, finding, expectation and remedy",
        counts=dict.fromkeys(("flips", "detected", "files"), 0),
    )
    with found.timed():
        for number, name in enumerate(FAMILIES):
            path = make(name, root / f"{subject} {name}".replace(" ", "-"))
            files = sorted(path.iterdir())
            found.count("files", len(files))
            for turn in range(count * number // 5, count * (number + 1) // 5):
                file = files[turn % len(files)]
                good = file.read_bytes()
                bad, bit = bytearray(good), draw.randrange(8 * len(good))
                bad[bit // 8] ^= 1 << bit % 8
                file.write_bytes(bad)
                wrong = refused(lambda n=name, p=path: read(n, p), kind, path)
                file.write_bytes(good)
                found.count("flips")
                found.count("detected", wrong != "accepted")
                found.expect(not wrong, f"{name} {file.name} bit {bit}: {wrong}")
            read(name, path)  # intact, it reads
    return found


def edit_weights(change: Callable[[dict[str, Any]], object]) -> Damage:
    """Change tensors, and make every checksum fit: what only a look at the weights can find."""

    def damage(path: Path) -> None:
        tensors = load_file(path / "model.safetensors")
        change(tensors)
        save_file(tensors, path / "model.safetensors")
        content = (path / "model.safetensors").read_bytes()
        config = json.loads((path / "config.json").read_text())
        config["sha256"] = hashlib.sha256(content).hexdigest()
        config.pop("seal", None)
        (path / "config.json").write_text(json.dumps(config))
        if (path / "manifest.json").exists():
            manifest = json.loads((path / "manifest.json").read_text())
            del manifest["seal"]
            for name in ("model.safetensors", "config.json"):
                manifest["files"][name] = checkpoints._fingerprint((path / name).read_bytes())
            (path / "manifest.json").write_text(checkpoints._sealed(manifest))

    return damage


def first(tensors: dict[str, Any]) -> str:
    return sorted(tensors)[0]


WEIGHTS: dict[str, Damage] = {  # loaded strictly: nothing is filled in, nothing is left over
    "a tensor missing": edit_weights(lambda t: t.pop(first(t))),
    "a tensor too many": edit_weights(lambda t: t.update(odd=torch.ones(2))),
    "a tensor of another shape": edit_weights(lambda t: t.update({first(t): torch.ones(3, 2)})),
    "a tensor of integers": edit_weights(lambda t: t.update({first(t): t[first(t)].int()})),
    "nan in a tensor": edit_weights(lambda t: t[first(t)].view(-1)[:1].fill_(torch.nan)),
    "inf in a tensor": edit_weights(lambda t: t[first(t)].view(-1)[-1:].fill_(-torch.inf)),
    "another name": edit_weights(lambda t: t.update(odd=t.pop(first(t)))),
    "no tensors": edit_weights(dict.clear),
}


def damages(file: str) -> Iterator[tuple[str, Damage]]:
    """Ways to break one file of a folder."""
    yield "missing", lambda p: (p / file).unlink()
    yield "empty", lambda p: (p / file).write_bytes(b"")
    yield "cut in half", lambda p: (p / file).write_bytes(
        (p / file).read_bytes()[: (p / file).stat().st_size // 2]
    )  # fmt: skip
    yield "its end cut off", lambda p: (p / file).write_bytes((p / file).read_bytes()[:-3])
    yield "a byte too many", lambda p: (p / file).write_bytes((p / file).read_bytes() + b"\0")
    yield "zeros", lambda p: (p / file).write_bytes(bytes((p / file).stat().st_size))
    yield "not text", lambda p: (p / file).write_bytes(b"\xff\xfe\x00\x80" * 9)
    yield "a pickle", lambda p: (p / file).write_bytes(pickle.dumps(Bomb()))
    yield "a folder", lambda p: ((p / file).unlink(), (p / file).mkdir())
    yield "another JSON", lambda p: (p / file).write_text('{"a": [1, 2]}')
    yield "a list", lambda p: (p / file).write_text("[]")
    yield (
        "another file",
        lambda p: shutil.copy(next(f for f in sorted(p.iterdir()) if f.name != file), p / file),
    )


def broken(subject: str, root: Path, names: Iterable[str] = FAMILIES) -> Campaign:
    """Break files and folders in every way, family by family."""
    make, read, kind = SUBJECTS[subject]
    found = Campaign(
        claim=f"A broken file is refused: {subject}",
        tried="every file of it missing, empty, cut, padded, zeroed, replaced by a pickle, a "
        "folder, another file or another JSON; the folder missing, renamed, or a file",
        target="at least 12 kinds; every one refused with path, finding, expectation and remedy; "
        "no code run",
    )
    whole: list[tuple[str, Damage]] = [
        ("folder missing", shutil.rmtree),
        ("a file in its place", lambda p: (shutil.rmtree(p), p.write_text(""))),
        ("folder empty", lambda p: [file.unlink() for file in p.iterdir()]),
    ]
    with found.timed():
        for name in names:
            source = make(name, root / f"{subject} {name}".replace(" ", "-"))
            files = sorted(file.name for file in source.iterdir())
            kinds = whole + [(f"{f} {what}", do) for f in files for what, do in damages(f)]
            found.counts["kinds"] = len(kinds)
            for what, damage in kinds:
                path = root / "broken" / source.name
                shutil.rmtree(path.parent, ignore_errors=True)
                shutil.copytree(source, path)
                damage(path)
                found.count("reads")
                wrong = refused(lambda n=name, p=path: read(n, p), kind, path)
                found.expect(not wrong, f"{name}: {what}: {wrong}")
        found.expect(not Path("/tmp/code-was-run").exists(), "code in a pickle was run")
    return found


def misfits(root: Path, names: Iterable[str] = FAMILIES) -> Campaign:
    """Weights that are intact files, and do not fit."""
    found = Campaign(
        claim="Weights are loaded strictly",
        tried="tensors missing, too many, renamed, misshapen, of integers, nan, inf, none at all, "
        "with every checksum made to fit, in checkpoints and saved models of every family",
        target="every one refused with path, finding, expectation and remedy",
    )
    with found.timed():
        for subject, (make, read, kind) in SUBJECTS.items():
            for name in names:
                source = make(name, root / f"{subject} {name}".replace(" ", "-"))
                for what, damage in WEIGHTS.items():
                    path = root / "misfit" / source.name
                    shutil.rmtree(path.parent, ignore_errors=True)
                    shutil.copytree(source, path)
                    damage(path)
                    found.count("reads")
                    wrong = refused(lambda n=name, p=path, r=read: r(n, p), kind, path)
                    found.expect(not wrong, f"{subject} {name}: {what}: {wrong}")
    return found


def data_files(root: Path) -> Campaign:
    """Texts and word pairs that cannot be read."""
    found = Campaign(
        claim="A broken data file is refused",
        tried="texts and files of word pairs: missing, empty, a folder, not UTF-8, a cut and an "
        "altered .gz, a broken .zip, a line of one word, a line of three",
        target="every one refused by an error of this library that begins with or names the path",
    )
    root.mkdir(parents=True, exist_ok=True)
    packed = gzip.compress(b"team eamtay\n" * 400)
    contents = {
        "empty.txt": b"", "latin1.txt": b"caf\xe9 af\xe9cay\n" * 30, "cut.gz": packed[:-12],
        "altered.gz": packed[:20] + bytes([packed[20] ^ 8]) + packed[21:],
        "broken.zip": b"PK\x03\x04" + bytes(40),
    }  # fmt: skip
    pairs = {"one-word.txt": b"team\n", "three.txt": b"team eamtay x\n", "blank.txt": b"\n \n"}
    with found.timed():
        for name, content in {**contents, **pairs}.items():
            (root / name).write_bytes(content)
        (root / "folder.txt").mkdir()
        reads: list[tuple[str, Callable[[Path], object]]] = [
            *((name, load_corpus) for name in [*contents, "folder.txt", "missing.txt"]),
            *((name, read_pairs) for name in [*contents, *pairs, "folder.txt", "missing.txt"]),
        ]
        for name, read in reads:
            found.count("reads")
            try:
                read(root / name)
                wrong = "accepted"
            except (CorpusError, ValueError, FileNotFoundError) as error:
                named = name in str(error) and len(str(error)) > len(str(root / name)) + 10
                foreign = type(error) is not CorpusError and type(error) is not ValueError
                wrong = f"{error!r}" if foreign or not named else ""
            except Exception as error:
                wrong = f"{error!r:.120}"
            found.expect(not wrong, f"{read.__name__} of {name}: {wrong}")
        found.expect(CharTokenizer("ab").encode("ba").tolist() == [1, 0], "the tokenizer is broken")
    return found


def study_files(root: Path) -> Campaign:
    """What a study and a run do with damaged files of their own."""
    found = Campaign(
        claim="A broken file of a study is refused",
        tried="study.json, result.json, measures and time of a cell, config.json of a run: empty, "
        "cut, not text, a list, another JSON; read by the calls that continue or judge",
        target="every one refused by an error of this library that names the path and a way out",
    )
    config = ConvAttnConfig(d_vocab=11, d_model=12, n_heads=3)
    cell = SimpleNamespace(folder="cell")
    readers: dict[str, Callable[[], object]] = {
        "study.json": lambda: open_study(root, config),
        "result.json": lambda: claims(SimpleNamespace(result=root / "result.json")),
        "runs/cell/seconds.txt": lambda: seconds_in_cells([cell], root),  # pyrefly: ignore
        "runs/cell/measures.json": lambda: run_grid([cell], dict, root),  # pyrefly: ignore
        "run/config.json": lambda: RunFolder(root / "run", {"train": {"steps": 3}}).close(),
    }
    contents = {
        "empty": b"", "cut": b'{"a": [1, 2', "not text": b"\xff\xfe\x00\x80", "a list": b"[1, 2]",
        "another JSON": b'{"a": [1, 2]}', "a number and more": b"12.5.1",
    }  # fmt: skip
    with found.timed(), unchecked():  # a stand-in for a cell will do
        for name, read in readers.items():
            file = root / name
            file.parent.mkdir(parents=True, exist_ok=True)
            for what, content in contents.items():
                file.write_bytes(content)
                found.count("reads")
                try:
                    read()
                    wrong = "accepted"
                except (ValueError, RunConflictError) as error:
                    named = str(root) in str(error) and ";" in str(error)
                    wrong = "" if named and on_purpose(error) else f"{error!r:.150}"
                except Exception as error:
                    wrong = f"{error!r:.150}"
                found.expect(not wrong, f"{name}: {what}: {wrong}")
    return found


def main(flip_count: int = 200, seed: int = 2) -> Iterable[Campaign]:
    draw = random.Random(seed)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        for subject in SUBJECTS:
            yield flips(flip_count, subject, root / "flips", draw)
            yield broken(subject, root / "whole")
        yield misfits(root / "fit")
        yield data_files(root / "data")
        yield study_files(root / "study")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--flips", type=int, default=200, help="per kind of folder")
    given = parser.parse_args()
    script(lambda: main(given.flips))
