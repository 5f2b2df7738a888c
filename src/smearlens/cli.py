"""The command line: parses, calls, prints. No logic.

Results go to stdout, progress to stderr. Exit codes: 0 done, 1 failed, 2 wrong usage.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro

from smearlens.experiments.engines import Engine


@dataclass(frozen=True, kw_only=True)
class Compare:
    """Train, measure and judge: convolution, smeared keys and attention on repeats and on text.

    Writes OUT/report.html, OUT/result.json, tables and figures. Repeating the command continues
    where it stopped.
    """

    out: Path = Path("runs/compare")  # folder of the study
    quick: bool = False  # 2 seeds and few updates: to see it work, not to be convinced
    seeds: int = 3  # independent runs of every model
    steps: int = 1200  # updates per model on repeated tokens
    text_steps: int = 500  # updates per model on tiny Shakespeare
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
    """Check a saved model: does it read the future, does it beat what cannot be beaten?"""

    checkpoint: Annotated[str, tyro.conf.Positional]  # folder with config.json, or a shipped name
    floor_steps: int = 0  # also train a copy for so many updates on independent tokens
    json: bool = False  # print plain numbers instead of the summary


@dataclass(frozen=True, kw_only=True)
class Analyze:
    """Scores of every head of a saved model on repeated tokens."""

    checkpoint: Annotated[str, tyro.conf.Positional]  # folder with config.json, or a shipped name
    period: tuple[int, int] = (8, 20)  # shortest and longest period of the repeats, in tokens
    length: int = 48  # tokens per example
    examples: int = 64  # number of examples
    seed: int = 0  # of the examples


@dataclass(frozen=True, kw_only=True)
class Train:
    """Train one model on repeated tokens or on a text, into a folder that resumes."""

    out: Path  # folder of the run
    model: str = "ConvAttn"  # class: ConvAttn or AttnAttn
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

    result: Path | None = field(default=None)  # a result.json


def main(arguments: list[str] | None = None) -> None:
    """Run one subcommand; ends the process with its exit code."""
    commands_by_name: dict[str, Callable[..., object]] = {
        "compare": Compare, "experiment": Experiment, "train": Train, "analyze": Analyze,
        "audit": Audit, "claims": Claims,
    }  # fmt: skip
    command = tyro.extras.subcommand_cli_from_dict(
        commands_by_name,
        prog="smearlens",
        description="Hook, measure and test how sequence models look back.",
        args=arguments,
    )
    from smearlens.experiments import commands

    try:
        if said := commands.run(command):
            print(said)
    except KeyboardInterrupt:
        print("stopped; the same command continues from here", file=sys.stderr)
        sys.exit(1)
    except Exception as error:
        if not commands.is_expected(error):
            raise
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        sys.exit(1)
