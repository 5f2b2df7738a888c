"""A study as a grid of cells: each trains one model in its own folder and measures it once.

Running a grid again runs only what is missing; a killed cell resumes from its checkpoint. Leaves
out where the cells run (`engines`), and what they are and what is measured: those belong to the
studies.
"""

from __future__ import annotations

import json
import multiprocessing
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from smearlens._files import read_object, write_atomically
from smearlens.experiments.engines import run_elsewhere
from smearlens.experiments.threads import one_thread
from smearlens.models.base import HookedModel
from smearlens.models.families import family, load_model
from smearlens.training.checkpoint import list_checkpoints
from smearlens.training.config import TrainConfig
from smearlens.training.loop import train
from smearlens.training.tracking import Callback


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One training run of a study.

    Attributes:
        name: of the variant
        task: what it is trained on, a key of the study's tasks
        seed: of weights, data order and dropout
        model: name of the model class
        config: its configuration
        train: how it is trained
    """

    name: str
    task: str
    seed: int
    model: str
    config: Any
    train: TrainConfig

    @property
    def folder(self) -> str:
        """Name of the run's folder."""
        return f"{self.task}-{self.name}-seed{self.seed}"


@dataclass(frozen=True)
class Task:
    """What a cell is trained and measured on.

    Attributes:
        data: seed to a data source (`batch(step)`)
        evaluate: model to numbers, for the learning curve
        measure: model and cell to the numbers of the study
        callbacks: called at every step of training
        logs: of those callbacks, to be kept with the measures
        prepare: changes the fresh model before it trains, such as taking away a mask
    """

    data: Callable[[int], Any]
    evaluate: Callable[[Any], dict[str, float]]
    measure: Callable[[HookedModel, Cell], dict[str, Any]]
    callbacks: Sequence[Callback] = ()
    logs: Sequence[str] = ()
    prepare: Callable[[HookedModel], None] | None = None


def run_grid(
    cells: Sequence[Cell], tasks: Callable[[], dict[str, Task]], out: Path, *, jobs: int = 1
) -> list[dict[str, Any]]:
    """Train and measure every cell that has no `measures.json` yet; returns all measures, in order.

    Args:
        cells: the grid
        tasks: makes the tasks; an importable function, since worker processes call it too
        out: folder of the study; each cell has its own under `out/runs`
        jobs: cells at a time, where the engine (`engines.use_engine`) has several. Each cell runs
            on one thread, wherever it does, so that results do not depend on engine and number;
            what a dying worker leaves undone is done by this process

    Raises:
        ValueError: if two cells share a folder, or a `measures.json` was damaged, with its path
    """
    names = [cell.folder for cell in cells]
    if len(set(names)) != len(names):
        raise ValueError(f"two cells share a folder: {sorted(names)}")
    runs = out / "runs"
    runs.mkdir(parents=True, exist_ok=True)
    missing = [cell for cell in cells if not (runs / cell.folder / "measures.json").exists()]
    run = partial(_run_share, tasks=tasks, runs=runs)
    run_elsewhere(run, missing, jobs)
    run(cells)
    again = "delete it to measure this cell again"
    return [read_object(runs / name / "measures.json", again, "name", "seed") for name in names]


def _run_share(cells: Sequence[Cell], tasks: Callable[[], dict[str, Task]], runs: Path) -> None:
    """Run these cells one after another on one thread."""
    with one_thread():
        missing = [cell for cell in cells if not (runs / cell.folder / "measures.json").exists()]
        made = tasks() if missing else {}
        parent = multiprocessing.parent_process()
        for cell in missing:
            if parent is not None and not parent.is_alive():
                return  # the study was killed: leave nothing running behind it
            run_cell(cell, made[cell.task], runs / cell.folder)


def run_cell(cell: Cell, task: Task, folder: Path) -> dict[str, Any]:
    """Train the cell's model in `folder` (resuming), measure it, and write `measures.json` last."""
    started = time.process_time()
    cls = family(cell.model)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(cell.seed)
        model = cls(cell.config)
    if task.prepare is not None:
        task.prepare(model)
    result = train(
        model, task.data(cell.seed), cell.train,
        out=folder, evaluate=task.evaluate, callbacks=task.callbacks,
    )  # fmt: skip
    model.eval()
    measures = {
        "name": cell.name,
        "task": cell.task,
        "seed": cell.seed,
        "model": cell.model,
        "config": asdict(cell.config),
        "n_parameters": model.n_parameters,
        "steps": cell.train.steps,
        "curve": result.log("evaluation"),
        "final_train_loss": result.log("metrics")[-1]["loss"],
        **{name: result.log(name) for name in task.logs},
        **task.measure(model, cell),
    }
    seconds = f"{time.process_time() - started:.1f}\n"  # apart: measures are equal everywhere
    write_atomically(folder / "seconds.txt", seconds)
    write_atomically(folder / "measures.json", json.dumps(measures, indent=1) + "\n")
    return measures


def trained_model(folder: Path) -> HookedModel:
    """The model of a finished cell, from the last checkpoint in its folder, in eval mode."""
    return load_model(list_checkpoints(folder / "checkpoints")[-1]).eval()
