"""The whole smeared-keys study: kernel sizes, paddings and roles on repeats; two texts; padding.

`smearlens compare` (`short`) is its short form; the names of its variants mean the same here.
Contains what the models are trained and measured on, and what runs it all. Leaves out the grid
(`grid`), the numbers taken from each model (`measures`, `text_measures`), verdicts (`verdicts`) and
the report (`report`).
"""

from __future__ import annotations

import warnings
from functools import partial
from pathlib import Path
from typing import Any

import torch

from smearlens.data.batches import PaddedBatches, TokenBatches
from smearlens.data.corpora import CorpusError
from smearlens.data.tokenizers import gpt2_tokenizer
from smearlens.experiments import measures
from smearlens.experiments.grid import Cell, Task, run_grid
from smearlens.experiments.smeared_keys import measures as smeared_keys_measures
from smearlens.experiments.smeared_keys import text_measures
from smearlens.experiments.smeared_keys.grid import RECIPE, SmearedKeysConfig, cells
from smearlens.experiments.smeared_keys.short import (
    D_VOCAB,
    LENGTH,
    PERIODS,
    TEXT_LENGTH,
    source,
    text_tokens,
    window_loss,
)
from smearlens.experiments.smeared_keys.verdicts import judge
from smearlens.experiments.study import open_study, write_result
from smearlens.models.base import HookedModel
from smearlens.nn.attention import Attention
from smearlens.training.tracking import GradientNorms

FULL = ("attention only", "conv k=3", "conv k=5", "conv k=3, same padding", "smeared keys")
SHOWN = ("conv k=3", "two layers", "conv k=3, same padding")  # whose head maps are kept
WIKITEXT_BATCH = 8  # lines per update: 512 x 50,257 logits are most of its time
STRIPE_ROWS = 24  # held-out lines of WikiText-2 that end early, to see where attention goes
CURVE_ROWS = 24  # held-out lines of WikiText-2 for the learning curve


def run(
    config: SmearedKeysConfig, out: Path, *, jobs: int = 1, command: str = ""
) -> dict[str, Any]:
    """Train, measure, judge and report; repeating the call continues where it stopped.

    Without WikiText-2 (no folder given, the corpus out of reach) the rest is run, with a warning;
    the claims about padding then stay undecided.

    Args:
        config: sizes and seeds
        out: folder for `runs/`, `result.json`, `tables/`, `figures/` and `report.html`
        jobs: processes that train cells side by side
        command: the command line, for the report

    Raises:
        ValueError: if `out` holds a study of another configuration, or `config.data` is no folder
            with WikiText-2
    """
    from smearlens.experiments.smeared_keys.report import write_smeared_keys_report

    lines = _held_out_lines(config)
    open_study(out, config)
    grid = cells(config, wikitext=lines is not None)
    found = run_grid(grid, partial(tasks, config, wikitext=lines is not None), out, jobs=jobs)
    found = [_compact(_thinned(m)) for m in found]
    recipe = f"On text {min(config.text_seeds, config.seeds)} seeds. {RECIPE}"
    padding = {str(n): text_measures.padding(lines, n) for n in (64, 128)} if lines else {}
    study = write_result(
        out, study="smeared keys", command=command, config=config, recipe=recipe,
        verdicts=judge(found, padding), measures=found, cells=grid, padding=padding,
    )  # fmt: skip
    write_smeared_keys_report(study, out)
    return study


def tasks(config: SmearedKeysConfig, *, wikitext: bool) -> dict[str, Task]:
    """What each kind of cell is trained and measured on."""
    tokens = measures.evaluation_tokens(PERIODS, LENGTH, D_VOCAB, batch=128)
    train_text, held_out = text_tokens()
    windows = held_out[: 128 * TEXT_LENGTH].view(128, TEXT_LENGTH)
    text: dict[str, Any] = {
        "data": lambda seed: TokenBatches(train_text, 32, TEXT_LENGTH, seed),
        "evaluate": partial(window_loss, windows=windows),
        "measure": partial(_measure_text, windows=windows),
    }
    found = {
        "repeats": Task(
            source(PERIODS),
            measures.repeats_curve(tokens),
            partial(_measure_repeats, tokens=tokens, floor_steps=config.floor_steps),
        ),
        "text": Task(**text),
        "norms": Task(**text, callbacks=(GradientNorms(),), logs=("gradient_norms",)),
    }
    return found | (_wikitext_tasks(config) if wikitext else {})


def _wikitext_tasks(config: SmearedKeysConfig) -> dict[str, Task]:
    lines = text_measures.wikitext_lines(config.data, "train")
    other = text_measures.wikitext_lines(config.data, "validation")
    tokens, real = text_measures.held_out_rows(other, config.wikitext_rows, TEXT_LENGTH)
    few = tokens[:CURVE_ROWS], real[:CURVE_ROWS]
    pad = gpt2_tokenizer().end_of_text

    def masked(seed: int) -> PaddedBatches:
        return PaddedBatches(lines, WIKITEXT_BATCH, TEXT_LENGTH, pad, seed)

    def counted(seed: int) -> text_measures.PadsCounted:
        return text_measures.PadsCounted(masked(seed))

    evaluate = partial(_padded_scores, rows=few)
    ending = text_measures.half_full(other, TEXT_LENGTH)
    short = text_measures.held_out_rows(ending, STRIPE_ROWS, TEXT_LENGTH)
    measure = partial(_measure_wikitext, rows=(tokens, real), short=short)
    return {
        "wikitext": Task(masked, evaluate, measure),
        "pads counted": Task(counted, evaluate, measure),
        "pads counted, no mask": Task(counted, evaluate, measure, prepare=_take_mask_away),
    }


def _take_mask_away(model: HookedModel) -> None:
    """Let every query see every key, as attention does when nobody passes it a mask."""
    for module in model.modules():
        if isinstance(module, Attention):
            module.causal = False


def _measure_repeats(
    model: HookedModel, cell: Cell, *, tokens: torch.Tensor, floor_steps: int
) -> dict[str, Any]:
    full, shown = cell.name in FULL, cell.name in SHOWN and cell.seed == 0
    floor = floor_steps if cell.name == "conv k=3, same padding" else 0
    found: dict[str, Any] = {
        **smeared_keys_measures.lean(model, tokens),
        "kernel": smeared_keys_measures.kernel_from_start(model, cell),
        "audit": measures.audited(model, floor_steps=floor),
    }
    if full:
        found["smearing"] = measures.smearing(model, tokens)
    if shown:
        heads = measures.head_scores(model, tokens, example=True)
        found["scores"]["example"] = heads["example"]
    if cell.name.startswith("conv") and not cell.config.residual:
        found["offsets"] = smeared_keys_measures.stripe_offsets(model, tokens)
    if cell.model == "AttnAttn":
        found["layers"] = smeared_keys_measures.layers(model, tokens)
    if cell.name.startswith("conv k=5, same padding"):
        found["future_taps"] = smeared_keys_measures.future_taps(model, tokens, repeats=True)
    return found


@torch.no_grad()
def _measure_text(model: HookedModel, cell: Cell, *, windows: torch.Tensor) -> dict[str, Any]:
    found: dict[str, Any] = {
        "val_loss": window_loss(model, windows)["loss"],
        "kernel": smeared_keys_measures.kernel_from_start(model, cell),
    }
    if cell.task == "text":
        found["audit"] = measures.audited(model, floor_steps=0)
    if cell.name.startswith("conv k=5, same padding") and cell.task == "text":
        found["future_taps"] = smeared_keys_measures.future_taps(model, windows, repeats=False)
    return found


def _padded_scores(model: Any, *, rows: tuple[torch.Tensor, torch.Tensor]) -> dict[str, float]:
    return text_measures.padded_scores(model, *rows)


def _measure_wikitext(
    model: HookedModel,
    cell: Cell,
    *,
    rows: tuple[torch.Tensor, torch.Tensor],
    short: tuple[torch.Tensor, torch.Tensor],
) -> dict[str, Any]:
    found: dict[str, Any] = {
        **text_measures.padded_scores(model, *rows),
        "kernel": smeared_keys_measures.kernel_from_start(model, cell),
        "audit": text_measures.leak(model),
    }
    if cell.task != "wikitext":
        found["stripes"] = text_measures.stripes(model, *short)
    return found


def _held_out_lines(config: SmearedKeysConfig) -> list[torch.Tensor] | None:
    """Held-out lines of WikiText-2, or None with a warning if it is out of reach."""
    try:
        text_measures.wikitext_text(config.data, "train")
        return text_measures.wikitext_lines(config.data, "validation")
    except CorpusError as error:
        if config.data is not None:
            raise
        warnings.warn(
            f"WikiText-2 is left out, and with it what is said of padding: {error}", stacklevel=3
        )
        return None


def _thinned(found: dict[str, Any]) -> dict[str, Any]:
    """The measures with the log of gradient norms in a few numbers."""
    if "gradient_norms" not in found:
        return found
    summary = smeared_keys_measures.norm_summary(found["gradient_norms"])
    return {**found, "gradient_norms": summary}


def _compact(value: Any) -> Any:
    """The same with every number to 5 significant digits."""
    if isinstance(value, dict):
        return {key: _compact(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_compact(each) for each in value]
    return float(f"{value:.5g}") if isinstance(value, float) else value
