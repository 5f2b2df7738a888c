"""The command line: parses, calls, prints. No logic.

Results go to stdout, progress to stderr. Exit codes: 0 done; 1 failed, as does the audit of a model
with findings; 2 wrong usage; 130 stopped by Ctrl-C; 141 nobody reads the output.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

import smearlens
from smearlens.experiments.engines import Engine


@dataclass(frozen=True, kw_only=True)
class Compare:
    """Train, measure and judge: convolution, smeared keys and attention on repeats and on text.

    Writes OUT/report.html, OUT/result.json, tables and figures. Repeating the command continues
    where it stopped.
    """

    out: Path = Path("runs/compare")  # folder of the study
    quick: bool = False  # few seeds and updates: to see it work, not to be convinced
    seeds: int | None = None  # independent runs of every model; default 3, quick 2
    steps: int | None = None  # updates per model on repeated tokens; default 1200, quick 500
    text_steps: int | None = None  # updates per model on tiny Shakespeare; default 500, quick 100
    jobs: int = 2  # runs at a time; results do not depend on it
    engine: Engine = "processes"  # where they run; ray: the cluster of RAY_ADDRESS, or this machine
    force: bool = False  # delete what OUT holds of an earlier study and start over


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """Run a study by name (a wrong name lists them): verdicts, tables and a report.

    Writes OUT/report.html, OUT/result.json, tables and figures. Repeating the command continues
    where it stopped.
    """

    name: Annotated[str, tyro.conf.Positional]  # of the study
    out: Path | None = None  # folder of the study; default runs/NAME
    quick: bool = False  # few seeds and updates: to see it work, not to be convinced
    seeds: int | None = None  # independent runs of every model; default: the study's own
    steps: int | None = None  # updates per model; default: the study's own
    data: str | None = None  # folder of the text, for a study that takes one
    jobs: int = 2  # runs at a time; results do not depend on it
    engine: Engine = "processes"  # where they run; ray: the cluster of RAY_ADDRESS, or this machine
    force: bool = False  # delete what OUT holds of an earlier study and start over


@dataclass(frozen=True, kw_only=True)
class Audit:
    """Check a saved model: does it read the future, does it beat what cannot be beaten?

    Exits with 1 if something is wrong. Of an encoder-decoder, the decoder is audited, given a
    source of random tokens.
    """

    checkpoint: Annotated[str, tyro.conf.Positional]  # folder with config.json, or a shipped name
    floor_steps: int = 0  # also train a copy for so many updates on independent tokens
    json: bool = False  # print plain numbers instead of the summary


@dataclass(frozen=True, kw_only=True)
class Analyze:
    """Scores of every head and kernel of a saved model, no encoder-decoder, on repeated tokens."""

    checkpoint: Annotated[str, tyro.conf.Positional]  # folder with config.json, or a shipped name
    period: tuple[int, int] = (8, 20)  # shortest and longest period of the repeats, in tokens
    length: int = 48  # tokens per example
    examples: int = 64  # number of examples
    seed: int = 0  # of the examples
    json: bool = False  # print plain numbers instead of the tables


@dataclass(frozen=True, kw_only=True)
class Train:
    """Train one model on repeated tokens or on a text, into a folder that resumes."""

    out: Path  # folder of the run
    model: str = "ConvAttn"  # class: AttnAttn, CharGPT, ConvAttn or Mamba
    preset: str = "cpu"  # named configuration of that class
    data: str = "repeats"  # "repeats", a corpus name (tiny-shakespeare), or a text file
    steps: int = 1000  # updates
    lr: float = 3e-3  # highest learning rate
    batch_size: int = 32  # sequences per update
    seed: int = 0  # of weights, data order and dropout
    checkpoint_every: int = 500  # updates between checkpoints


@dataclass(frozen=True, kw_only=True)
class Claims:
    """List the registered claims, or the verdicts of a finished study."""

    result: Annotated[Path | None, tyro.conf.Positional] = None  # a result.json


def main(arguments: list[str] | None = None) -> None:
    """Run one subcommand; ends the process with its exit code unless that is 0."""
    words = sys.argv[1:] if arguments is None else arguments
    command = None
    try:
        if words == ["--version"]:
            said, code = f"smearlens {smearlens.__version__}", 0
        else:
            command = _parsed(words)
            said, code = _carried_out(command)
        if said:
            print(said, flush=True)
    except KeyboardInterrupt:
        resumes = isinstance(command, (Compare, Experiment, Train))
        more = "; the same command continues from here" if resumes else ""
        print(f"stopped{more}", file=sys.stderr)
        code = 130
    except OSError as error:  # of printing, be it help
        code = 141 if isinstance(error, BrokenPipeError) else 1
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what is left to flush
        if code == 1:
            print(f"{type(error).__name__}: {error}", file=sys.stderr)
    if code:
        sys.exit(code)


def _parsed(words: list[str]) -> object:
    commands_by_name: dict[str, Callable[..., object]] = {
        "compare": Compare, "experiment": Experiment, "train": Train, "analyze": Analyze,
        "audit": Audit, "claims": Claims,
    }  # fmt: skip
    return tyro.extras.subcommand_cli_from_dict(
        commands_by_name,
        prog="smearlens",
        description="Hook, measure and test how sequence models look back. Of which version: "
        "smearlens --version.",
        args=words,
    )


def _carried_out(command: object) -> tuple[str, int]:
    """What a command has to say, and its exit code."""
    from smearlens.experiments import commands

    try:
        return commands.run(command)
    except Exception as error:
        if (why := commands.explanation(error)) is None:
            raise
        print(why, file=sys.stderr)
        return "", 1
