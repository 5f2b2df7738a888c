"""How does attention evolve in training, and does it tell how well a model does or writes?

Character models of six layers on tiny Shakespeare, enwik8 and text8, everything about attention
tracked while they train and while they write. Contains the grid and what runs it. Leaves out what
is measured (`measures`), the verdicts (`verdicts`) and the report (`report`).

The write-up trained each model four times: without tracking, with it, with similarities between
layers, and with samples. Tracking does not change training, so that three of the four would be the
same training again: here each seed trains once with everything tracked, and some seeds again
without any, to compare the logs of the losses byte by byte.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Int64
from torch import Tensor

from smearlens.data.batches import TokenBatches
from smearlens.data.corpora import load_corpus
from smearlens.data.synthetic import repeated_tokens
from smearlens.data.tokenizers import ByteTokenizer, CharTokenizer, Tokenizer
from smearlens.experiments.evolution import logs
from smearlens.experiments.evolution import measures as measured
from smearlens.experiments.evolution import times as took
from smearlens.experiments.evolution.logs import PLAIN, TRACKED
from smearlens.experiments.evolution.paths import token_paths
from smearlens.experiments.evolution.verdicts import judge
from smearlens.experiments.grid import Cell, Task, run_grid
from smearlens.experiments.long_context.measures import windows
from smearlens.experiments.study import check_counts, open_study, write_result
from smearlens.models.char_gpt import CharGPTConfig
from smearlens.training.attention_tracking import AttentionTracking, GenerationTracking
from smearlens.training.config import TrainConfig
from smearlens.training.evaluation import text_loss
from smearlens.training.tracking import Callback, Tracker, log_spaced

N_LAYERS = 6  # the write-up speaks of layers 4 to 6
SHAKESPEARE = "shakespeare_char"  # data sets are named as in the write-up
FROM_FILES = ("enwik8", "text8")
EVALUATED = 64  # held-out windows of the validation loss
LOOKED_AT = 64  # held-out windows of the tracked losses, 8 of them for attention
WRITTEN = 4  # texts continued, less often than looked at
SHOWN = 32  # characters whose patterns the report shows
PER_DOUBLING = 3  # looks in each doubling of the step

RECIPE = (
    "CharGPT, 6 layers. AdamW (betas 0.9 and 0.99, weight decay 0.1 on matrices), 100 updates of "
    "warm-up, cosine to 10 %, gradient norm clipped at 1, no dropout. The first 90 % of each text "
    "trains, what follows is held out; enwik8 and text8 may be the start of the files only. "
    "Each seed trains once with everything tracked, the first seeds again with nothing tracked. "
)


@dataclass(frozen=True, kw_only=True)
class EvolutionConfig:
    """Sizes of the study of attention over training."""

    seeds: int = 5  # independent runs on every data set; fewer than 5 allow no correlation
    steps: int = 1500  # updates per model
    d_model: int = 64  # width
    n_heads: int = 4  # per layer
    length: int = 96  # characters in a window; a quarter of it prompts a sample
    batch_size: int = 8  # windows per update
    lr: float = 6e-3  # highest learning rate
    baselines: int = 1  # seeds that also train without tracking
    prompts: int = 8  # held-out texts continued after training
    samples: int = 6  # continuations of each prompt at each temperature
    data: str | None = None  # folder with enwik8/ and text8/; without it Shakespeare alone

    def __post_init__(self):
        check_counts(self, "seeds", "steps", "d_model", "n_heads", "batch_size", "prompts")
        if self.steps < 12:
            raise ValueError(f"steps must be at least 12, to look 8 times, got {self.steps}")
        if self.length < 32:
            raise ValueError(f"length must be at least 32 characters, got {self.length}")
        if self.samples < 2:
            raise ValueError(f"samples of a prompt are compared: at least 2, got {self.samples}")
        if not 0 <= self.baselines <= self.seeds:
            raise ValueError(f"baselines must be in 0..{self.seeds} (seeds), got {self.baselines}")

    @property
    def prompt(self) -> int:
        """Characters of a prompt."""
        return self.length // 4

    def quick(self) -> EvolutionConfig:
        """The same in two minutes: enough to see it work, too short to convince."""
        return replace(self, seeds=2, steps=100, d_model=32, length=64, prompts=4, samples=3)


class TextData(NamedTuple):
    """A data set in tokens."""

    tokenizer: Tokenizer
    train: Int64[Tensor, " n_train"]
    held_out: Int64[Tensor, " n_held_out"]
    words: frozenset[str]  # of the training text
    note: str  # which part of the corpus it is


def run(config: EvolutionConfig, out: Path, *, jobs: int = 1, command: str = "") -> dict[str, Any]:
    """Train, measure, judge and report into `out`; repeating the call continues where it stopped.

    Without `config.data` tiny Shakespeare alone is run, with a warning.

    Args:
        config: sizes and seeds
        out: folder for `runs/`, `result.json`, `tables/`, `figures/` and `report.html`
        jobs: processes that train cells side by side
        command: the command line, for the report

    Raises:
        ValueError: if `out` holds a study with another configuration, or `config.data` lacks a file
    """
    from smearlens.experiments.evolution.report import write_evolution_report

    names = data_sets(config)
    open_study(out, config)
    if config.data is None:
        warnings.warn(
            "enwik8 and text8 are left out: give the folder that holds them as data", stacklevel=2
        )
    grid = cells(config)
    found = run_grid(grid, partial(tasks, config), out, jobs=jobs)
    folders = [out / "runs" / cell.folder for cell in grid]
    found = [
        {**m, **logs.logged(folder, patterns=m["seed"] == 0)}  # one seed is shown
        for m, folder in zip(found, folders, strict=True)
    ]
    times = [took.times(cell, folder) for cell, folder in zip(grid, folders, strict=True)]
    compared = logs.compared(found, folders)
    study = write_result(
        out, study="evolution of attention", command=command, config=config, recipe=RECIPE,
        verdicts=judge(found, times, compared), measures=found, cells=grid,
        data_sets={name: load_text(name, config.data).note for name in names},
        fields=took.fields(found, names), compared=compared, paths=token_paths(found, folders),
        times={"runs": times, "fields": took.time_fields(times, names)},
    )  # fmt: skip
    write_evolution_report(study, out)
    return study


def cells(config: EvolutionConfig) -> list[Cell]:
    """The grid, seed by seed: every data set tracked, the first seeds also without tracking."""
    found = []
    for seed in range(config.seeds):
        train = TrainConfig(
            steps=config.steps, lr=config.lr, warmup=min(100, config.steps // 4),
            weight_decay=0.1, betas=(0.9, 0.99), seed=seed,
            checkpoint_every=max(1, config.steps // 2), eval_every=max(1, config.steps // 30),
        )  # fmt: skip
        for name in data_sets(config):
            model = CharGPTConfig(
                d_vocab=d_vocab(name), d_model=config.d_model, n_heads=config.n_heads,
                n_layers=N_LAYERS, n_ctx=config.length,
            )  # fmt: skip
            for variant in (TRACKED, PLAIN) if seed < config.baselines else (TRACKED,):
                task = name if variant == TRACKED else f"{name}, {PLAIN}"
                found.append(
                    Cell(name=variant, task=task, seed=seed, model="CharGPT", config=model,
                         train=train)
                )  # fmt: skip
    return found


def tasks(config: EvolutionConfig) -> dict[str, Task]:
    """Each data set, with tracking and without."""
    found = {}
    for name in data_sets(config):
        data = load_text(name, config.data)
        shared: dict[str, Any] = {
            "data": lambda seed, data=data: TokenBatches(
                data.train, config.batch_size, config.length, seed
            ),
            "evaluate": partial(_validation_loss, tokens=_held_out(data, config, EVALUATED)),
        }
        prompts = windows(data.held_out, config.prompt, config.prompts)
        measure = partial(
            measured.after_training, prompts=prompts, tokenizer=data.tokenizer, words=data.words,
            new_tokens=config.length - config.prompt, samples=config.samples,
        )  # fmt: skip
        found[name] = Task(measure=measure, callbacks=_callbacks(data, config), **shared)
        found[f"{name}, {PLAIN}"] = Task(measure=measured.after_plain_training(prompts), **shared)
    return found


def data_sets(config: EvolutionConfig) -> tuple[str, ...]:
    """Names of the data sets that can be run.

    Raises:
        ValueError: if a folder is given and lacks one of its files
    """
    if config.data is None:
        return (SHAKESPEARE,)
    for name in FROM_FILES:
        file_of(name, config.data)
    return (SHAKESPEARE, *FROM_FILES)


def file_of(name: str, folder: str) -> Path:
    """The file of a corpus: `folder/NAME/` with one file in it, or `folder/NAME` itself, or packed.

    Raises:
        ValueError: if there is none, or several
    """
    root = Path(folder).expanduser()
    inside = sorted(path for path in (root / name).glob(f"{name}*") if path.is_file())
    beside = [
        path for suffix in ("", ".gz", ".zip") if (path := root / f"{name}{suffix}").is_file()
    ]
    if len(inside + beside) != 1:
        raise ValueError(
            f"data={folder} must hold one file of {name}, as {name}/{name}.gz or {name}[.gz|.zip]; "
            f"found {[str(path) for path in inside + beside] or 'none'}"
        )
    return (inside + beside)[0]


def d_vocab(name: str) -> int:
    """Characters of tiny Shakespeare and of text8, bytes of enwik8."""
    return {SHAKESPEARE: 65, "enwik8": 256, "text8": 27}[name]


def load_text(name: str, folder: str | None) -> TextData:
    """A data set by its name in the write-up."""
    source = "tiny-shakespeare" if name == SHAKESPEARE else file_of(name, str(folder))
    train, held_out = (load_corpus(source, split) for split in ("train", "validation"))
    tokenizer: Tokenizer = ByteTokenizer()
    if name != "enwik8":
        tokenizer = CharTokenizer(train.text)
    whole = f"train: {train.note}; held out: {held_out.note}"
    return TextData(
        tokenizer, tokenizer.encode(train.text), tokenizer.encode(held_out.text),
        frozenset(train.text.split()), whole,
    )  # fmt: skip


def _held_out(data: TextData, config: EvolutionConfig, count: int) -> Int64[Tensor, " pos"]:
    return data.held_out[: count * (config.length - 1) + 1]


def _validation_loss(model: Any, *, tokens: Tensor) -> dict[str, float]:
    return {"loss": text_loss(model, tokens).nats_per_token}


def _callbacks(data: TextData, config: EvolutionConfig) -> tuple[Callback, ...]:
    """What is tracked: reading text and repeats, writing, and patterns on one text."""
    generator = torch.Generator().manual_seed(2**31 - 1)  # no run trains with this seed
    vocabulary = data.tokenizer.d_vocab
    reading: Any = AttentionTracking(
        windows(data.held_out, config.length, LOOKED_AT),
        generator=generator,
        repeats=repeated_tokens(8, (8, 24), config.length, vocabulary, generator=generator),
    )
    writing = GenerationTracking(
        windows(data.held_out, config.prompt, WRITTEN), config.length - config.prompt,
        generator=generator, temperature=measured.USUAL,
    )  # fmt: skip
    shown = windows(data.held_out, SHOWN, 3)[1:2]
    seldom = log_spaced(config.steps, per_doubling=1)
    return (
        logs.Timed(Tracker(reading, at=log_spaced(config.steps, PER_DOUBLING))),
        logs.Writing(writing, seldom),
        logs.Snapshots(shown, data.tokenizer.tokens(shown[0]), seldom),
    )
