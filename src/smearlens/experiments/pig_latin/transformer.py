"""The encoder-decoder transformer on Pig Latin: every row of the write-up, and its best models.

Side variants differ in one thing from a base; the tuned models ("beasts") in several. Leaves out
the task (`task`), what is read from trained models (`evidence`), verdicts (`verdicts`), the report
(`report`), and Mamba (`mamba`).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from smearlens.data.pig_latin import PairSplit
from smearlens.experiments.grid import Cell, Task, run_grid
from smearlens.experiments.pig_latin.evidence import VERSION, evidence
from smearlens.experiments.pig_latin.looks import gather
from smearlens.experiments.pig_latin.tables import TRANSFORMER, fill
from smearlens.experiments.pig_latin.task import (
    describe,
    epochs_to_steps,
    load_pairs,
    pair_task,
    stored_split,
)
from smearlens.experiments.pig_latin.verdicts import judge
from smearlens.experiments.study import check_counts, open_study, write_result
from smearlens.models.seq2seq import Seq2SeqConfig
from smearlens.training.config import TrainConfig

SMALL, MIXED, LARGE = "small pairs", "small pairs mixed", "large pairs"  # tasks
BATCH = 128  # pairs
ACCUMULATED = 5  # batches per update where gradients are accumulated
CURVE_WORDS = 500  # of the large list, for the learning curve

RECIPE = (
    "AdamW, batches of up to 128 pairs of equal lengths, gradient norm clipped at 1, cosine to 0 "
    "without warm-up, dropout 0.1, weight decay 0.01, last weights; every variant differs from the "
    "base in what its name says"
)


@dataclass(frozen=True, kw_only=True)
class PigLatinConfig:
    """Sizes of the study of the transformer on Pig Latin."""

    data: str | None = None  # folder of the published word pairs; None = words of tiny Shakespeare
    seeds: int = 3  # independent runs of every model
    epochs: int = 100  # of the side variants, and of the base they are compared with
    transformer_epochs: int = 100  # of the tuned models
    lr: float = 3e-3  # highest learning rate
    words: int | None = None  # take only so many words of the list

    def __post_init__(self):
        check_counts(self, "seeds", "epochs", "transformer_epochs")

    def quick(self) -> PigLatinConfig:
        """The same in two minutes: enough to see it work, too short to learn the task."""
        return replace(self, seeds=1, epochs=2, transformer_epochs=4, words=400)


BASE: dict[str, Any] = {"d_model": 64, "n_heads": 4, "n_layers": 2, "dropout": 0.1}
SIDE: dict[str, dict[str, Any]] = {  # variant -> what differs from BASE
    "base": {},
    "no positions": {"positions": None},
    "trained positions": {"positions": "learned-sinusoidal"},
    "2 heads": {"n_heads": 2},  # the model that the write-up looks into
    "8 heads": {"n_heads": 8},
    "16 heads": {"n_heads": 16},
    "width 32": {"d_model": 32, "d_mlp": 32},
    "1 + 1 layers": {"n_layers": 1},
    "4 + 4 layers": {"n_layers": 4},
}
TUNED: dict[str, Any] = {"n_heads": 8, "positions": "learned-sinusoidal"}
BEASTS: dict[str, dict[str, Any]] = {
    "beast small": TUNED,
    "beast large": {**TUNED, "n_layers": 4},
}


def cells(config: PigLatinConfig, out: Path) -> list[Cell]:
    """The grid, longest first: the tuned models, then every row of the write-up."""
    found = []
    for seed in range(config.seeds):
        side = _recipe(config, config.epochs, seed, out)
        mixed = _recipe(config, config.epochs, seed, out, padded=True)
        every = side.steps // config.epochs
        training = {
            "accumulated": replace(
                side, steps=-(-side.steps // ACCUMULATED), accumulation=ACCUMULATED
            ),
            "plateau": replace(side, schedule="plateau", eval_every=every, final_lr_fraction=1e-3),
            "no weight decay": replace(side, weight_decay=0.0),
            "weight decay 0.1": replace(side, weight_decay=0.1),
        }
        found += [
            *tuned(config, seed, out),
            *(_cell(SMALL, n, seed, diff, side) for n, diff in SIDE.items()),
            *(_cell(SMALL, n, seed, {}, train) for n, train in training.items()),
            _cell(MIXED, "lengths mixed", seed, {}, mixed),
        ]
    return found


def tuned(config: Any, seed: int, out: Path) -> list[Cell]:
    """The tuned models on the small list, the small one first."""
    train = _recipe(config, config.transformer_epochs, seed, out)
    return [_cell(SMALL, name, seed, diff, train) for name, diff in BEASTS.items()]


def contenders(config: Any, seed: int, out: Path) -> list[Cell]:
    """The small tuned model on either list, to be compared with Mamba.

    The first is the cell of `cells`: its folder under `runs/` can be copied instead of trained.
    """
    split = stored_split(out, "large", config.data, config.words)
    steps = epochs_to_steps(split, config.large_epochs, BATCH)
    train = recipe(steps, lr=config.lr, seed=seed)
    return [tuned(config, seed, out)[0], _cell(LARGE, "beast small", seed, TUNED, train)]


def pair_tasks(small: PairSplit, large: PairSplit | None = None) -> dict[str, Task]:
    """Either list in pairs of word and translation, and the small one in batches of all lengths."""
    found = {
        SMALL: pair_task(small, batch_size=BATCH, joined=False),
        MIXED: pair_task(small, batch_size=BATCH, joined=False, padded=True),
    }
    if large is not None:
        found[LARGE] = pair_task(large, batch_size=BATCH, joined=False, few=CURVE_WORDS)
    return found


def recipe(steps: int, *, lr: float, seed: int) -> TrainConfig:
    """What all runs of both studies share: cosine to 0, ten points of a learning curve."""
    return TrainConfig(
        steps=steps, lr=lr, final_lr_fraction=0.0, weight_decay=0.01, seed=seed,
        checkpoint_every=max(1, steps // 4), keep_checkpoints=1, eval_every=max(1, steps // 10),
    )  # fmt: skip


def run(config: PigLatinConfig, out: Path, *, jobs: int = 1, command: str = "") -> dict[str, Any]:
    """Train, measure, look into the trained models, judge and report; repeating continues."""
    from smearlens.experiments.pig_latin.report import write_pig_latin_report

    load_pairs("small", config.data)  # raises for a wrong folder while nothing is touched
    open_study(out, config)
    grid = cells(config, out)
    found = run_grid(grid, partial(_tasks, config, out), out, jobs=jobs)
    small = stored_split(out, "small", config.data, config.words)
    found = gather(grid, found, out, partial(evidence, split=small), version=VERSION)
    study = write_result(
        out, study="the transformer on Pig Latin", command=command, config=config, recipe=RECIPE,
        verdicts=judge(found), measures=found, cells=grid, lists={"small": describe(small)},
        tables=fill(TRANSFORMER, found),
    )  # fmt: skip
    write_pig_latin_report(study, out)
    return study


def _tasks(config: PigLatinConfig, out: Path) -> dict[str, Task]:
    return pair_tasks(stored_split(out, "small", config.data, config.words))


def _cell(task: str, name: str, seed: int, diff: dict[str, Any], train: TrainConfig) -> Cell:
    model = Seq2SeqConfig(**{**BASE, **diff})
    return Cell(name=name, task=task, seed=seed, model="Seq2Seq", config=model, train=train)


def _recipe(config: Any, epochs: int, seed: int, out: Path, *, padded: bool = False) -> TrainConfig:
    split = stored_split(out, "small", config.data, config.words)
    steps = epochs_to_steps(split, epochs, BATCH, padded=padded)
    return recipe(steps, lr=config.lr, seed=seed)
