"""Mamba on Pig Latin: every row of the write-up, tuned models, and a transformer on equal terms.

A word, its end and its translation are one sequence; the loss counts the translation alone. Side
variants differ in one thing from a base without any regularisation; the tuned models use dropout,
more weight decay and a shorter kernel. Leaves out what is read from trained models
(`mamba_evidence`), verdicts (`mamba_verdicts`), the report (`mamba_report`), and the speed and
precision of scans, which are a study of their own.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from smearlens.data.pig_latin import PigLatinVocabulary
from smearlens.experiments.grid import Cell, Task, run_grid
from smearlens.experiments.pig_latin import transformer as pig_latin
from smearlens.experiments.pig_latin.looks import gather
from smearlens.experiments.pig_latin.mamba_evidence import VERSION, evidence
from smearlens.experiments.pig_latin.mamba_verdicts import judge
from smearlens.experiments.pig_latin.parity import parity_runs
from smearlens.experiments.pig_latin.tables import MAMBA, fill
from smearlens.experiments.pig_latin.task import (
    describe,
    epochs_to_steps,
    load_pairs,
    pair_task,
    stored_split,
)
from smearlens.experiments.study import check_counts, open_study, write_result
from smearlens.models.mamba import MambaConfig
from smearlens.training.config import TrainConfig

PARITY_STEPS = 40  # updates per epoch of the side variants
BATCH, LARGE_BATCH = 32, 64  # pairs; of equal lengths

RECIPE = (
    "AdamW, batches of 32 pairs of equal lengths (64 on the large list), gradient norm clipped at "
    "1, cosine to 0 without warm-up, last weights; side variants without dropout and with weight "
    "decay 0.01, tuned models with dropout and weight decay 0.1; recipe chosen on another split of "
    "the small list"
)


@dataclass(frozen=True, kw_only=True)
class MambaPigLatinConfig:
    """Sizes of the study of Mamba on Pig Latin."""

    data: str | None = None  # folder of the published word pairs; None = words of tiny Shakespeare
    seeds: int = 3  # independent runs of every model
    epochs: int = 16  # of the side variants, and of the base they are compared with
    tuned_epochs: int = 40  # of the tuned Mamba on the small list
    large_epochs: int = 16  # of either family on the large list
    transformer_epochs: int = 100  # of the transformer on the small list, as in `pig-latin`
    lr: float = 3e-3  # highest learning rate
    words: int | None = None  # take only so many words of each list

    def __post_init__(self):
        check_counts(self, "seeds", "epochs", "tuned_epochs", "large_epochs", "transformer_epochs")

    def quick(self) -> MambaPigLatinConfig:
        """The same in two minutes: enough to see it work, too short to learn the task."""
        return replace(
            self, seeds=1, epochs=1, tuned_epochs=2, large_epochs=1, transformer_epochs=2,
            words=200,
        )  # fmt: skip


SIZE: dict[str, Any] = {"d_vocab": PigLatinVocabulary.d_vocab, "n_ctx": 64}
BASE: dict[str, Any] = {**SIZE, "n_layers": 2, "kernel_size": 16, "rule": "bilinear"}
SIDE: dict[str, dict[str, Any]] = {  # variant -> what differs from BASE
    "mamba rule": {"rule": "mamba"},
    "zoh": {"rule": "zoh"},
    "bilinear": {},
    "bilinear clamped": {"rule": "bilinear-clamped"},
    "mamba rule, scaled": {"rule": "mamba", "scale_delta": True},
    "zoh, scaled": {"rule": "zoh", "scale_delta": True},
    "bilinear, scaled": {"scale_delta": True},
    "A = -1, selective": {"rule": "mamba", "a": "minus-one"},
    "A = -1, constant": {"rule": "mamba", "a": "minus-one", "delta": "constant"},
    "A = -1, position": {"rule": "mamba", "a": "minus-one", "delta": "position"},
    "A learned, constant": {"rule": "mamba", "delta": "constant"},
    "A learned, position": {"rule": "mamba", "delta": "position"},
    "width 32": {"d_model": 32},
    "1 layer": {"n_layers": 1},
    "3 layers": {"n_layers": 3},
    "kernel 4": {"kernel_size": 4},
}
TUNED: dict[str, dict[str, Any]] = {
    "small": {**SIZE, "n_layers": 4, "kernel_size": 4, "rule": "bilinear", "dropout": 0.15},
    "small, kernel 16": {
        **SIZE, "n_layers": 4, "kernel_size": 16, "rule": "bilinear", "dropout": 0.15,
    },
}  # fmt: skip
LARGE: dict[str, Any] = {
    **SIZE, "n_layers": 4, "kernel_size": 4, "rule": "bilinear", "dropout": 0.1,
}  # fmt: skip


def cells(config: MambaPigLatinConfig, out: Path) -> list[Cell]:
    """The grid, longest first: the large list, the tuned models, the side variants."""
    found = []
    for seed in range(config.seeds):
        recipe = partial(_recipe, config, seed, out)
        large, tuned = recipe("large", config.large_epochs, LARGE_BATCH), config.tuned_epochs
        found += [_cell("large", "large", seed, LARGE, replace(large, weight_decay=0.1))]
        found += [
            _cell("small", name, seed, model, replace(recipe("small", tuned), weight_decay=0.1))
            for name, model in TUNED.items()
        ]
        found += pig_latin.contenders(config, seed, out)
        side = recipe("small", config.epochs)
        found += [_cell("small", n, seed, {**BASE, **diff}, side) for n, diff in SIDE.items()]
        per_epoch = side.steps // config.epochs
        plateau = replace(side, schedule="plateau", eval_every=per_epoch, final_lr_fraction=1e-3)
        found += [
            _cell("small", "plateau", seed, BASE, plateau),
            _cell("small", "rate 3e-4", seed, BASE, replace(side, lr=config.lr / 10)),
            _cell("small", "dropout", seed, {**BASE, "dropout": 0.15}, side),
        ]
    return found


def tasks(config: MambaPigLatinConfig, out: Path) -> dict[str, Task]:
    """Either list, joined for Mamba and in pairs for the transformer."""
    small, large = (stored_split(out, n, config.data, config.words) for n in ("small", "large"))
    return {
        "small": pair_task(small, batch_size=BATCH, joined=True),
        "large": pair_task(large, batch_size=LARGE_BATCH, joined=True, few=500),
        **pig_latin.pair_tasks(small, large),
    }


def run(
    config: MambaPigLatinConfig, out: Path, *, jobs: int = 1, command: str = ""
) -> dict[str, Any]:
    """Train, measure, look into the trained models, judge and report; repeating continues."""
    from smearlens.experiments.pig_latin.mamba_report import write_mamba_pig_latin_report

    for name in ("small", "large"):
        load_pairs(name, config.data)  # raises for a wrong folder while nothing is touched
    open_study(out, config)
    grid = cells(config, out)
    found = run_grid(grid, partial(tasks, config, out), out, jobs=jobs)
    small, large = (stored_split(out, n, config.data, config.words) for n in ("small", "large"))
    found = gather(grid, found, out, partial(evidence, split=small), version=VERSION)
    found += parity_runs(out, seeds=config.seeds, steps=PARITY_STEPS * config.epochs)
    study = write_result(
        out, study="Mamba on Pig Latin", command=command, config=config, recipe=RECIPE,
        verdicts=judge(found), measures=found, cells=grid,
        lists={"small": describe(small), "large": describe(large)}, tables=fill(MAMBA, found),
    )  # fmt: skip
    write_mamba_pig_latin_report(study, out)
    return study


def _cell(task: str, name: str, seed: int, model: dict[str, Any], train: TrainConfig) -> Cell:
    return Cell(
        name=name, task=task, seed=seed, model="Mamba", config=MambaConfig(**model), train=train
    )


def _recipe(
    config: MambaPigLatinConfig, seed: int, out: Path, task: str, epochs: int, batch: int = BATCH
) -> TrainConfig:
    steps = epochs_to_steps(stored_split(out, task, config.data, config.words), epochs, batch)
    return pig_latin.recipe(steps, lr=config.lr, seed=seed)
