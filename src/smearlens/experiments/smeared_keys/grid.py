"""The grid of the smeared-keys study: its sizes, its models, and how each of them is trained.

The names of its variants mean what they mean in the short form (`short`). Leaves out what the
models are trained and measured on (`study`).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from smearlens.data.tokenizers import gpt2_tokenizer
from smearlens.experiments.grid import Cell
from smearlens.experiments.smeared_keys.short import D_VOCAB, LENGTH, TEXT_LENGTH
from smearlens.experiments.study import check_counts
from smearlens.models.attn_attn import AttnAttnConfig
from smearlens.models.conv_attn import ConvAttnConfig
from smearlens.training.config import TrainConfig

NORM_RATES = (3e-3, 1e-2)  # learning rates at which gradient norms are recorded


@dataclass(frozen=True, kw_only=True)
class SmearedKeysConfig:
    """Sizes of the study of smeared keys."""

    seeds: int = 5  # independent runs of every model on repeats
    text_seeds: int = 3  # on text; never more than `seeds`
    steps: int = 400  # updates per model of one attention layer on repeats
    stack_steps: int = 700  # updates per stack of two or four attention layers, which learn later
    text_steps: int = 400  # updates per model on tiny Shakespeare
    norm_steps: int = 300  # updates while every gradient norm is recorded
    wikitext_steps: int = 150  # updates per model on WikiText-2
    kernels: tuple[int, ...] = (1, 2, 3, 4, 5, 6, 7)  # taps; 3 and 5 are always among them
    d_model: int = 64  # width on repeats and of the one-layer models on tiny Shakespeare
    wikitext_d_model: int = 32  # width of all models on WikiText-2
    wikitext_rows: int = 128  # held-out lines of WikiText-2 that every model is measured on
    lr: float = 3e-3  # highest learning rate on repeats and tiny Shakespeare
    wikitext_lr: float = 1e-2  # on WikiText-2
    floor_steps: int = 150  # updates on independent tokens in the audit of the padded convolution
    data: str | None = None  # folder of WikiText-2 raw; None fetches it by name

    def __post_init__(self):
        check_counts(
            self,
            "seeds",
            "text_seeds",
            "steps",
            "stack_steps",
            "text_steps",
            "wikitext_steps",
            "wikitext_rows",
        )
        if self.norm_steps < 2:
            raise ValueError(f"norm_steps must be at least 2, got {self.norm_steps}")
        if not {3, 5} <= set(self.kernels) or min(self.kernels) < 1:
            raise ValueError(f"kernels must hold 3 and 5 and be at least 1, got {self.kernels}")
        for name in ("d_model", "wikitext_d_model"):
            if getattr(self, name) % 16:
                raise ValueError(f"{name} must be a multiple of 16, got {getattr(self, name)}")

    def quick(self) -> SmearedKeysConfig:
        """The same in two minutes: enough to see it work, too short to convince."""
        return replace(
            self, seeds=2, text_seeds=2, kernels=(3, 5), steps=60, stack_steps=60, text_steps=30,
            norm_steps=40, wikitext_steps=2, wikitext_rows=32, floor_steps=40,
        )  # fmt: skip


RECIPE = (
    "AdamW (weight decay 0.01 on matrices), warm-up of 100 updates or a quarter, cosine to 10 %, "
    "gradient norm clipped at 1 unless said otherwise; learned absolute positions, no "
    "normalisation, no MLP. Repeats: 48 tokens of 64, period 8 to 20 drawn per example, batches of "
    "32. Tiny Shakespeare: 64 characters, batches of 32. WikiText-2: lines cut or padded to 64 "
    "tokens of GPT-2's vocabulary, batches of 8."
)


def cells(config: SmearedKeysConfig, *, wikitext: bool) -> list[Cell]:
    """The grid, longest first within each seed, so that what is done first is whole seeds."""
    text_seeds = min(config.text_seeds, config.seeds)
    made = []
    for seed in range(config.seeds):
        if seed < text_seeds:
            made += _wikitext_cells(config, seed) if wikitext else []
            made += [*_text_cells(config, seed), *_norm_cells(config, seed)]
        made += _repeats_cells(config, seed)
    return made


def _repeats_cells(config: SmearedKeysConfig, seed: int) -> list[Cell]:
    """Stacks of attention, and every kernel size, padding and role."""
    size: dict[str, Any] = {
        "d_vocab": D_VOCAB, "n_heads": 4, "n_ctx": LENGTH, "d_model": config.d_model
    }  # fmt: skip
    stacks: dict[str, Any] = {}
    for layers, name in ((4, "four layers"), (2, "two layers")):
        stacks[name] = AttnAttnConfig(**size, n_layers=layers)
        stacks[f"{name}, bare"] = AttnAttnConfig(**size, n_layers=layers, residual=False)
    one: dict[str, Any] = {}
    for residual in (True, False):
        bare = "" if residual else ", bare"
        plain: dict[str, Any] = {**size, "conv_on": None, "residual": residual}
        one[f"attention only{bare}"] = ConvAttnConfig(**plain)
        one[f"smeared keys{bare}"] = ConvAttnConfig(**plain, smear=True)
        for kernel in (3, 5) if bare else ():
            one |= _paddings(size, kernel, "stream", residual=False)
    for kernel in config.kernels:
        for role in ("stream", "q", "k", "v"):
            one |= _paddings(size, kernel, role, residual=True)
    rate = config.lr
    return [
        *(_cell("repeats", n, m, seed, config.stack_steps, rate) for n, m in stacks.items()),
        *(_cell("repeats", n, m, seed, config.steps, rate) for n, m in one.items()),
    ]


def _paddings(
    size: dict[str, Any], kernel: int, role: Any, *, residual: bool
) -> dict[str, ConvAttnConfig]:
    """A convolution with causal and with "same" padding, which are one and the same at 1 tap."""
    name = f"conv k={kernel}" + ("" if role == "stream" else f" on {role.upper()}")
    end = "" if residual else ", bare"
    given: dict[str, Any] = {**size, "kernel_size": kernel, "conv_on": role, "residual": residual}
    found = {name + end: ConvAttnConfig(**given)}
    if kernel > 1:
        found[f"{name}, same padding{end}"] = ConvAttnConfig(**given, causal=False)
    return found


def _text_cells(config: SmearedKeysConfig, seed: int) -> list[Cell]:
    """Tiny Shakespeare: both write-ups' pairs at equal parameters, bare and residual."""
    size: dict[str, Any] = {"d_vocab": 65, "n_ctx": TEXT_LENGTH, "n_heads": 4}
    one: dict[str, Any] = {**size, "d_model": config.d_model}
    two = config.d_model * 3 // 4
    four = config.d_model * 9 // 64 * 4  # 36 of 64: the parameters of one layer of 64
    models: dict[str, Any] = {}
    for residual in (True, False):
        bare = "" if residual else ", bare"
        for name, width, layers in (("two layers", two, 2), ("four layers", four, 4)):
            models[name + bare] = AttnAttnConfig(
                **size, d_model=width, n_layers=layers, residual=residual
            )
        for kernel in (3, 5):
            models |= _paddings(one, kernel, "stream", residual=residual)
    steps, rate = config.text_steps, config.lr
    return [_cell("text", name, model, seed, steps, rate) for name, model in models.items()]


def _norm_cells(config: SmearedKeysConfig, seed: int) -> list[Cell]:
    """Bare stacks of the k=5 write-up with and without clipping, at two learning rates."""
    size: dict[str, Any] = {"d_vocab": 65, "n_ctx": TEXT_LENGTH, "n_heads": 4}
    size["d_model"] = config.d_model
    models: dict[str, Any] = _paddings(size, 5, "stream", residual=False)
    models["four layers, bare"] = AttnAttnConfig(**size, n_layers=4, residual=False)
    return [
        _cell("norms", f"{name}, lr {rate:g}, {word}", model, seed, config.norm_steps, rate,
              clip=clip, skip_nonfinite=config.norm_steps)
        for name, model in models.items()
        for rate in NORM_RATES
        for word, clip in (("clipped", 1.0), ("not clipped", None))
    ]  # fmt: skip


def _wikitext_cells(config: SmearedKeysConfig, seed: int) -> list[Cell]:
    """Padded lines: pads left out of the loss, counted, and counted without a causal mask."""
    size: dict[str, Any] = {
        "d_vocab": gpt2_tokenizer().d_vocab, "n_ctx": TEXT_LENGTH, "n_heads": 4,
        "d_model": config.wikitext_d_model,
    }  # fmt: skip
    bare = {"residual": False}
    five = _paddings(size, 5, "stream", **bare)
    three = _paddings(size, 3, "stream", **bare)
    two = {"two layers, bare": AttnAttnConfig(**size, n_layers=2, **bare)}
    grid: dict[str, dict[str, Any]] = {
        "wikitext": {
            **five,
            "four layers, bare": AttnAttnConfig(**size, n_layers=4, **bare),
            "conv k=5": ConvAttnConfig(**size, kernel_size=5, residual=True),
            "four layers": AttnAttnConfig(**size, n_layers=4),
        },
        "pads counted": {"conv k=3, bare": three["conv k=3, bare"], **two},
        "pads counted, no mask": {
            "conv k=3, same padding, bare": three["conv k=3, same padding, bare"], **two
        },
    }  # fmt: skip
    steps, rate = config.wikitext_steps, config.wikitext_lr
    return [
        _cell(task, name, model, seed, steps, rate)
        for task, models in grid.items()
        for name, model in models.items()
    ]


def _cell(
    task: str, name: str, model: Any, seed: int, steps: int, rate: float, **train: Any
) -> Cell:
    recipe: dict[str, Any] = {
        "steps": steps, "lr": rate, "warmup": min(100, steps // 4), "seed": seed,
        "checkpoint_every": steps, "keep_checkpoints": 1, "eval_every": max(1, steps // 5),
    }  # fmt: skip
    return Cell(
        name=name,
        task=task,
        seed=seed,
        model=type(model).__name__.removesuffix("Config"),
        config=model,
        train=TrainConfig(**{**recipe, **train}),
    )
