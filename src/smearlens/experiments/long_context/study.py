"""Do hybrids of convolution, rotary positions and attention hold out beyond the trained length?

Models of one attention layer (or two, narrower) trained at 256 tokens and read at up to 4,096, on
repeats at chosen gaps and on text. Contains the grid and what runs it. Leaves out what is measured
(`measures`), the verdicts (`verdicts`), the report (`report`) and training on WikiText-2 at full
size (`paper_preset`).

Rotary positions have no table: `n_ctx` is only the longest input a model accepts, so that a model
built with 4,096 and trained at 256 is the model built with 256. A learned table has no rows beyond
its end: that variant is read at 256 tokens and no further.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int64
from torch import Tensor

from smearlens.data.batches import TokenBatches
from smearlens.data.corpora import load_corpus
from smearlens.data.tokenizers import CharTokenizer
from smearlens.experiments.grid import Cell, Task, run_grid
from smearlens.experiments.long_context import measures as measured
from smearlens.experiments.long_context.paper_preset import paper_costs
from smearlens.experiments.long_context.verdicts import (
    BARE,
    HYBRID,
    LEARNED,
    REPEATS,
    STACK,
    judge,
)
from smearlens.experiments.study import check_counts, open_study, write_result
from smearlens.models.attn_attn import AttnAttnConfig
from smearlens.models.conv_attn import ConvAttnConfig
from smearlens.training.config import TrainConfig

SHAKESPEARE, STORIES = "tiny Shakespeare", "TinyStories"
D_VOCAB = 64  # of the repeats: half for blocks, half for what lies between them

RECIPE = (
    "One attention layer, or two that are narrower, so that all have as many weights; LayerNorm, "
    "residual stream, no MLP, kernel 5 (the preset “hybrid”, smaller). AdamW (weight decay 0.01 on "
    "matrices), 100 updates of warm-up, cosine to 10 %, gradient norm clipped at 1, batches of 8 "
    "windows. Equal steps and data for every model. "
)


@dataclass(frozen=True, kw_only=True)
class LongContextConfig:
    """Sizes of the study of long contexts."""

    seeds: int = 5  # independent runs of every model
    steps: int = 500  # updates per model and task
    d_model: int = 64  # width of the models with one layer
    length: int = 256  # tokens of a training window
    longest: int = 4096  # tokens up to which models are read
    lr: float = 1e-2  # highest learning rate, the same for every model
    paper_steps: int = 2  # updates of the full-size models timed for their cost; 0 = none
    data: str | None = None  # folder with tinystories/, or such a file; None: Shakespeare alone

    def __post_init__(self):
        check_counts(self, "seeds", "steps")
        if self.d_model % 32:
            raise ValueError(f"d_model must be a multiple of 32, got {self.d_model}")
        least = 2 * measured.FAR
        if self.length < least or self.length % 2 or self.longest < 4 * self.length:
            raise ValueError(
                f"length must be even, at least {least}, and longest four times as long or more, "
                f"got length={self.length}, longest={self.longest}"
            )
        if self.paper_steps < 0:
            raise ValueError(f"paper_steps must be 0 or above, got {self.paper_steps}")

    def quick(self) -> LongContextConfig:
        """The same in two minutes: enough to see it work, too short to convince."""
        return replace(
            self, seeds=2, steps=100, d_model=32, length=128, longest=1024, paper_steps=0
        )


def run(
    config: LongContextConfig, out: Path, *, jobs: int = 1, command: str = ""
) -> dict[str, Any]:
    """Train, measure, judge and report into `out`; repeating the call continues where it stopped.

    Without `config.data` TinyStories is left out, with a warning.

    Args:
        config: sizes and seeds
        out: folder for `runs/`, `result.json`, `tables/`, `figures/` and `report.html`
        jobs: processes that train cells side by side
        command: the command line, for the report

    Raises:
        ValueError: if `out` holds a study with another configuration, or `config.data` no stories
    """
    from smearlens.experiments.long_context.report import write_long_context_report

    texts = text_sources(config)
    open_study(out, config)
    if config.data is None:
        warnings.warn("TinyStories is left out: give its file or folder as data", stacklevel=2)
    grid = cells(config)
    found = run_grid(grid, partial(tasks, config), out, jobs=jobs)
    study = write_result(
        out, study="long contexts", command=command, config=config, recipe=RECIPE,
        verdicts=judge(found), measures=found, cells=grid, texts=list(texts),
        times={"paper": paper_costs(out / "paper.json", config.paper_steps)},
    )  # fmt: skip
    write_long_context_report(study, out)
    return study


def text_sources(config: LongContextConfig) -> dict[str, str]:
    """The texts that can be read, by name: what `load_corpus` takes.

    Raises:
        ValueError: if `config.data` is given and is no file and no folder with one of stories
    """
    found = {SHAKESPEARE: "tiny-shakespeare"}
    if config.data is None:
        return found
    path = Path(config.data).expanduser()
    files = [path] if path.is_file() else sorted(path.glob("tinystories/tinystories*"))
    if len(files) != 1:
        raise ValueError(
            f"data={config.data} must be a text file, or hold one as tinystories/tinystories*; "
            f"found {[str(file) for file in files] or 'none'}"
        )
    return found | {STORIES: str(files[0])}


def variants(config: LongContextConfig, d_vocab: int) -> dict[str, tuple[str, Any]]:
    """Model class and configuration by name, all of nearly the same number of weights.

    A learned table comes on top: 256 positions are most of a small model.
    """
    size: dict[str, Any] = {"d_vocab": d_vocab, "n_heads": 4, "norm": True, "residual": True}
    wide = partial(
        ConvAttnConfig, **size, d_model=config.d_model, kernel_size=5, n_ctx=config.longest
    )
    narrow = AttnAttnConfig(
        **size, d_model=config.d_model * 3 // 4, n_layers=2, positions="rotary",
        n_ctx=config.longest,
    )  # fmt: skip
    learned = replace(wide(), n_ctx=config.length)
    return {
        HYBRID: ("ConvAttn", wide(positions="rotary")),
        "rotary": ("ConvAttn", wide(positions="rotary", conv_on=None)),
        BARE: ("ConvAttn", wide(positions=None)),
        LEARNED: ("ConvAttn", learned),
        STACK: ("AttnAttn", narrow),
    }


def cells(config: LongContextConfig) -> list[Cell]:
    """The grid, seed by seed: every model on repeats and on each text."""
    found = []
    for seed in range(config.seeds):
        train = TrainConfig(
            steps=config.steps, lr=config.lr, warmup=min(100, config.steps // 4), seed=seed,
            checkpoint_every=max(1, config.steps // 2), eval_every=max(1, config.steps // 10),
        )  # fmt: skip
        for task, source in {REPEATS: None, **text_sources(config)}.items():
            d_vocab = D_VOCAB if source is None else _tokens(source)[0].d_vocab
            found += [
                Cell(name=name, task=task, seed=seed, model=model, config=sizes, train=train)
                for name, (model, sizes) in variants(config, d_vocab).items()
            ]
    return found


def tasks(config: LongContextConfig) -> dict[str, Task]:
    """Repeats at varied gaps, and each text."""
    generator = torch.Generator().manual_seed(2**31 - 1)  # no run trains with this seed
    gaps = (measured.BLOCK, config.length - measured.BLOCK)
    held_out, _ = measured.gap_tokens(
        64, gaps, config.length, D_VOCAB, copies=2, generator=generator
    )
    found = {
        REPEATS: Task(
            lambda seed: measured.GapBatches(8, gaps, config.length, D_VOCAB, seed),
            partial(measured.gap_scores, tokens=held_out),
            partial(measured.on_repeats, length=config.length, longest=config.longest),
        )
    }
    for name, source in text_sources(config).items():
        _, train, rest = _tokens(source)
        found[name] = Task(
            lambda seed, train=train: TokenBatches(train, 8, config.length, seed),
            partial(measured.text_loss_of, tokens=measured.windows(rest, config.length, 64)),
            partial(
                measured.on_text, train=train, held_out=rest, length=config.length,
                longest=config.longest,
            ),
        )  # fmt: skip
    return found


def _tokens(source: str) -> tuple[CharTokenizer, Int64[Tensor, " pos"], Int64[Tensor, " rest"]]:
    """Characters of a text; those that only its held-out part has are left out."""
    train, held_out = (load_corpus(source, split).text for split in ("train", "validation"))
    tokenizer = CharTokenizer(train)
    known = "".join(c for c in held_out if c in tokenizer.characters)
    return tokenizer, tokenizer.encode(train), tokenizer.encode(known)
