"""What every study shares: its place in the registry, its folder, its result file.

A study is a module with a frozen dataclass of sizes, whose `quick()` is the same in two minutes,
and `run(config, out, *, jobs, command)`, which trains, judges, writes `result.json` and
`report.html` into `out` and returns the study; repeating it continues where it stopped. Leaves out
the grid of runs (`experiments.grid`) and the pages (`viz.report`).
"""

from __future__ import annotations

import json
import math
import platform
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import asdict
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

import smearlens
from smearlens._files import nearest, read_object, write_atomically
from smearlens.experiments.claims import Verdict
from smearlens.experiments.grid import Cell

STUDIES = {  # name on the command line -> module, name of its configuration
    "smeared-keys": ("smearlens.experiments.smeared_keys.study", "SmearedKeysConfig"),
    "mamba-induction": (
        "smearlens.experiments.state_space.mamba_induction",
        "MambaInductionConfig",
    ),
    "scans": ("smearlens.experiments.state_space.scans", "ScansConfig"),
    "pig-latin": ("smearlens.experiments.pig_latin.transformer", "PigLatinConfig"),
    "mamba-pig-latin": ("smearlens.experiments.pig_latin.mamba", "MambaPigLatinConfig"),
    "evolution": ("smearlens.experiments.evolution.study", "EvolutionConfig"),
    "long-context": ("smearlens.experiments.long_context.study", "LongContextConfig"),
}


FOLDERS = ("runs", "figures", "tables", "parts", "parity")  # that studies write into theirs
FILES = ("report.html", "result.json", "paper.json", "split-*.json", "study.json")
_starting_over: ContextVar[bool] = ContextVar("starting_over", default=False)


def study_named(name: str) -> tuple[type, Callable[..., dict[str, Any]]]:
    """Configuration class and `run` of a study."""
    if name not in STUDIES:
        raise ValueError(
            f"no study {name!r}; nearest: {nearest(name, STUDIES)}, known: {sorted(STUDIES)}"
        )
    module = import_module(STUDIES[name][0])
    return getattr(module, STUDIES[name][1]), module.run


def check_counts(config: Any, *names: str) -> None:
    """Raise a ValueError unless each of these sizes of a configuration is at least 1."""
    for name in names:
        if getattr(config, name) < 1:
            raise ValueError(f"{name} must be at least 1, got {getattr(config, name)}")


@contextmanager
def starting_over(wanted: bool) -> Iterator[None]:
    """Where a study is opened inside, delete what its folder holds of an earlier one, if `wanted`.

    That is when its configuration and its data have been found to be good, and not before.
    """
    token = _starting_over.set(wanted)
    try:
        yield
    finally:
        _starting_over.reset(token)


def open_study(out: Path, config: Any) -> None:
    """Make the folder of a study, or find that it is one of the same configuration.

    To be called when all that can be wrong with a study has been checked, such as its data.

    Raises:
        ValueError: if `out` holds a study with another configuration, naming what differs
    """
    out.mkdir(parents=True, exist_ok=True)
    path = out / "study.json"
    if _starting_over.get() and path.exists():
        _delete_study(out)
    now = json.dumps(asdict(config), indent=1, sort_keys=True) + "\n"
    if path.exists() and path.read_bytes() != now.encode():
        before = read_object(path, "restore it, or --force to start over")
        new = json.loads(now)
        changed = {k: (before.get(k), v) for k, v in new.items() if before.get(k) != v}
        raise ValueError(
            f"out={out} holds a study with another configuration (before, now): {changed}; "
            "choose another --out, or --force to start over"
        )
    write_atomically(path, now)


def _delete_study(out: Path) -> None:
    """Remove what studies write, and nothing else; the file that names the study goes last."""
    for name in FOLDERS:
        if (out / name).is_dir():
            shutil.rmtree(out / name)
    written = [path for pattern in FILES for path in out.glob(pattern)]
    for path in sorted(written, key=lambda path: path.name == "study.json"):
        path.unlink()


def write_result(
    out: Path,
    *,
    study: str,
    command: str,
    config: Any,
    recipe: str,
    verdicts: Sequence[Verdict],
    measures: Sequence[dict[str, Any]],
    cells: Sequence[Cell] = (),
    **more: Any,
) -> dict[str, Any]:
    """Write `result.json` and return its contents.

    Args:
        out: folder of the study
        study: its name in words
        command: the command line
        config: the dataclass of its sizes
        recipe: how every model was trained, in a sentence or two
        verdicts: on the claims it touches
        measures: of every run
        cells: the runs, whose time is summed up
        **more: anything else a report needs, plain numbers and text
    """
    contents = {
        "study": study,
        "command": command,
        "config": asdict(config),
        "recipe": recipe,
        "versions": {
            "smearlens": smearlens.__version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
        "cpu_seconds": round(seconds_in_cells(cells, out), 1),  # of training and measuring
        "verdicts": [verdict.to_dict() for verdict in verdicts],
        "measures": list(measures),
        **more,
    }
    write_atomically(out / "result.json", as_json(contents) + "\n")
    return contents


def as_json(value: Any, *, indent: int | None = None) -> str:
    """Plain numbers as JSON, which knows no NaN and no infinity: null instead."""

    def plain(part: Any) -> Any:
        if isinstance(part, dict):
            return {key: plain(each) for key, each in part.items()}
        if isinstance(part, (list, tuple)):
            return [plain(each) for each in part]
        return None if isinstance(part, float) and not math.isfinite(part) else part

    return json.dumps(plain(value), indent=indent, allow_nan=False)


def seconds_in_cells(cells: Sequence[Cell], out: Path) -> float:
    """Processor time of training and measuring, in whichever calls it happened."""
    return sum((_seconds(out / "runs" / cell.folder / "seconds.txt") for cell in cells), 0.0)


def _seconds(file: Path) -> float:
    try:
        return float(file.read_text())
    except ValueError as error:
        raise ValueError(
            f"{file}: expected a number of seconds ({error}); write one, such as 0, or delete the "
            "folder to run this cell again"
        ) from error
