"""The smeared-keys study: does a convolution do what a previous-token head does?

Here: the grid of its short form, the main job `smearlens compare`, and what runs it. Leaves out the
numbers taken from each model (`experiments.measures`), the verdicts (`short_verdicts`) and how they
are shown (`short_report`).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from smearlens.data.batches import RepeatBatches, TokenBatches
from smearlens.data.corpora import load_corpus
from smearlens.data.tokenizers import CharTokenizer
from smearlens.experiments import measures
from smearlens.experiments.grid import Cell, Task, run_grid
from smearlens.experiments.smeared_keys.short_verdicts import judge
from smearlens.experiments.study import check_counts, open_study, write_result
from smearlens.models.attn_attn import AttnAttnConfig
from smearlens.models.base import HookedModel
from smearlens.models.conv_attn import ConvAttnConfig
from smearlens.training.config import TrainConfig

PERIODS = (8, 20)  # of the repeats, drawn per example
FIXED_PERIOD = 16
LENGTH = 48
D_VOCAB = 64
TEXT_LENGTH = 64


@dataclass(frozen=True, kw_only=True)
class CompareConfig:
    """Sizes of the comparison of convolution, smeared keys and attention."""

    seeds: int = 3  # independent runs of every model
    steps: int = 1200  # updates per model on repeated tokens
    text_steps: int = 500  # updates per model on tiny Shakespeare
    d_model: int = 64  # width of the one-layer models
    lr: float = 3e-3  # highest learning rate, the same for every model
    floor_steps: int = 200  # updates on independent tokens in each audit

    def __post_init__(self):
        check_counts(self, "seeds", "steps", "text_steps")
        if self.d_model % 16:
            raise ValueError(f"d_model must be a multiple of 16, got {self.d_model}")

    def quick(self) -> CompareConfig:
        """The same in about 70 seconds on two cores: to see it work, too short to convince."""
        return replace(
            self, seeds=2, steps=min(self.steps, 500), text_steps=min(self.text_steps, 100)
        )


@dataclass(frozen=True)
class Result:
    """What a study left behind."""

    folder: Path
    report: Path
    verdicts: list[Any]
    measures: list[dict[str, Any]]


def compare(config: CompareConfig, out: Path, *, jobs: int = 1, command: str = "") -> Result:
    """Train, measure, judge and report; repeating the call continues where it stopped.

    Args:
        config: sizes and seeds
        out: folder for `runs/`, `result.json`, `tables/`, `figures/` and `report.html`
        jobs: processes that train cells side by side
        command: the command line, for the report

    Raises:
        ValueError: if `out` holds a comparison with another configuration
    """
    from smearlens.experiments.smeared_keys.short_report import write_compare_report

    open_study(out, config)
    found = run_grid(cells(config), partial(tasks, config), out, jobs=jobs)
    verdicts = judge(found)
    study = write_result(
        out, study="smeared keys, short form", command=command, config=config, recipe=RECIPE,
        verdicts=verdicts, measures=found, cells=cells(config),
    )  # fmt: skip
    report = write_compare_report(study, out)
    return Result(out, report, verdicts, found)


RECIPE = (
    "AdamW (weight decay 0.01 on matrices), 100 updates of warm-up, cosine to 10 %, gradient norm "
    "clipped at 1, batches of 32; learned absolute positions, residual stack, no normalisation, no "
    "MLP; the same for every model"
)


def cells(config: CompareConfig) -> list[Cell]:
    """The grid: each model on its task with every seed, longest first."""
    one, narrow = config.d_model, config.d_model * 3 // 4
    size: dict[str, Any] = {"d_vocab": D_VOCAB, "n_heads": 4, "n_ctx": LENGTH}
    bare: dict[str, Any] = {**size, "d_model": one, "residual": True}
    repeats = {
        "two layers": AttnAttnConfig(**size, d_model=one, n_layers=2),
        "two layers, narrow": AttnAttnConfig(**size, d_model=narrow, n_layers=2),
        "attention only": ConvAttnConfig(**bare, conv_on=None),
        "conv k=3": ConvAttnConfig(**bare, kernel_size=3),
        "conv k=5": ConvAttnConfig(**bare, kernel_size=5),
        "conv k=3, same padding": ConvAttnConfig(**bare, kernel_size=3, causal=False),
        "smeared keys": ConvAttnConfig(**bare, conv_on=None, smear=True),
    }
    text: dict[str, Any] = {"d_vocab": 65, "n_ctx": TEXT_LENGTH, "n_heads": 4}
    texts = {
        "two layers": AttnAttnConfig(**text, d_model=narrow, n_layers=2),
        "conv k=3": ConvAttnConfig(**text, d_model=one, kernel_size=3, residual=True),
        "conv k=3, same padding": ConvAttnConfig(
            **text, d_model=one, kernel_size=3, residual=True, causal=False
        ),
    }
    grid = [
        *(("text", name, model, config.text_steps) for name, model in texts.items()),
        *(("repeats", name, model, config.steps) for name, model in repeats.items()),
        ("fixed", "attention only", repeats["attention only"], config.steps),
    ]
    return [
        Cell(
            name=name,
            task=task,
            seed=seed,
            model=type(model).__name__.removesuffix("Config"),
            config=model,
            train=_recipe(config, steps, seed),
        )
        for task, name, model, steps in grid
        for seed in range(config.seeds)
    ]


def tasks(config: CompareConfig) -> dict[str, Task]:
    """What each kind of cell is trained and measured on."""
    tokens = measures.evaluation_tokens(PERIODS, LENGTH, D_VOCAB)
    fixed = measures.evaluation_tokens(FIXED_PERIOD, LENGTH, D_VOCAB)
    train_text, held_out = text_tokens()
    windows = held_out[: 128 * TEXT_LENGTH].view(128, TEXT_LENGTH)

    def on_repeats(model: HookedModel, cell: Cell) -> dict[str, Any]:
        return {
            **measures.behaviour(model, tokens),
            "scores": measures.head_scores(model, tokens, example=cell.seed == 0),
            "smearing": measures.smearing(model, tokens),
            "audit": measures.audited(model, floor_steps=config.floor_steps),
        }

    def on_fixed(model: HookedModel, cell: Cell) -> dict[str, Any]:
        return {
            **measures.behaviour(model, fixed),
            "scores": measures.head_scores(model, fixed, example=False),
            "positional": measures.positional_test(
                model, period=FIXED_PERIOD, others=(10, 12, 19), length=LENGTH, d_vocab=D_VOCAB
            ),
        }

    def on_text(model: HookedModel, cell: Cell) -> dict[str, Any]:
        with torch.no_grad():
            loss = window_loss(model, windows)["loss"]
        return {"val_loss": loss, "audit": measures.audited(model, floor_steps=0)}

    return {
        "repeats": Task(source(PERIODS), measures.repeats_curve(tokens), on_repeats),
        "fixed": Task(source(FIXED_PERIOD), measures.repeats_curve(fixed), on_fixed),
        "text": Task(
            lambda seed: TokenBatches(train_text, batch_size=32, length=TEXT_LENGTH, seed=seed),
            partial(window_loss, windows=windows),
            on_text,
        ),
    }


def source(period: int | tuple[int, int]) -> Any:
    """A function from a seed to batches of repeats."""
    return lambda seed: RepeatBatches(32, period, LENGTH, D_VOCAB, seed)


def text_tokens() -> tuple[torch.Tensor, torch.Tensor]:
    """Tiny Shakespeare as characters: training and held-out ids, nanoGPT's 90 / 10 split."""
    train, held_out = (load_corpus("tiny-shakespeare", s).text for s in ("train", "validation"))
    tokenizer = CharTokenizer(train + held_out)
    return tokenizer.encode(train), tokenizer.encode(held_out)


def window_loss(model: Any, windows: torch.Tensor) -> dict[str, float]:
    """Mean loss on windows of text [window pos], nats per token, for a learning curve."""
    return {"loss": float(model(windows, return_type="loss"))}


def _recipe(config: CompareConfig, steps: int, seed: int) -> TrainConfig:
    return TrainConfig(
        steps=steps,
        lr=config.lr,
        warmup=min(100, steps // 4),
        weight_decay=0.01,
        clip=1.0,
        seed=seed,
        checkpoint_every=steps,
        eval_every=max(1, steps // 12),
    )
