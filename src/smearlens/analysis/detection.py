"""Scores against targets that the caller gives: a detection pattern, an alignment of two sequences.

Leaves out the targets that follow from the tokens (`analysis.heads`).
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from smearlens._explain import explained
from smearlens.analysis.heads import checked_tokens, same_batch
from smearlens.analysis.mixing.options import RowOptions
from smearlens.analysis.mixing.rows import Metric, RowBlock, measure


@explained
def stripe_score(
    source: Any,
    detection: Bool[Tensor, "query key"] | Bool[Tensor, "batch query key"],
    *,
    normalise_by: Literal["row", "mul", "abs"] = "row",
    **options: Any,
) -> Any:
    """Agreement of the weights with a detection pattern D of zeros and ones.

    Args:
        source: a cache, or a pattern [batch head query key]
        detection: True where the head should look
        normalise_by: "row": mean over rows with a detected key of the detected weight; "mul":
            Σ A·D / Σ A; "abs": 1 - mean over rows of Σ |A - D|. The last two count every row, so
            that a perfect induction head on two repeats reaches 0.5 only: read `.maximum`
        **options: fields of `RowOptions`

    Source:
        TransformerLens `head_detector.detect_head`
    """
    if normalise_by not in ("row", "mul", "abs"):
        raise ValueError(f"normalise_by must be 'row', 'mul' or 'abs', got {normalise_by!r}")
    if detection.dtype != torch.bool:
        raise TypeError(f"detection must be a bool tensor, got {detection.dtype}; use .bool()")
    wanted = detection if detection.ndim == 3 else detection[None]

    def target(block: RowBlock) -> Tensor:
        size = [block.n_queries, block.weights.shape[-1]]
        if list(wanted.shape[1:]) != size or not same_batch(wanted, block):
            raise ValueError(
                f"detection {list(detection.shape)} does not fit patterns of {size} queries and "
                "keys; give [query key], or [batch query key] with one for each example"
            )
        return wanted[:, None, block.start : block.start + block.weights.shape[-2]] & block.allowed

    def value(block: RowBlock) -> tuple[Tensor, Tensor]:
        weight, some = block.at(target(block))
        if normalise_by == "abs":
            weight = 1 - (block.weights - target(block).to(block.weights.dtype)).abs().sum(-1)
        return weight, some if normalise_by == "row" else torch.ones_like(some)

    def mass(block: RowBlock) -> Tensor:
        return block.weights.sum(-1)

    def ceiling(block: RowBlock) -> Tensor:
        count = target(block).sum(-1)
        if normalise_by == "abs":
            return torch.where(count > 1, 2 - count, count)
        return mass(block) * (count > 0) if normalise_by == "mul" else count > 0

    divisor = mass if normalise_by == "mul" else None
    metric = Metric(f"stripe_score({normalise_by})", value, ceiling=ceiling, divisor=divisor)
    return measure(source, metric, RowOptions(**options))


@explained
def alignment_mass(
    source: Any,
    alignment: Int[Tensor, "*batch query"],
    *,
    shift: int = 0,
    accuracy: bool = False,
    **options: Any,
) -> Any:
    """Mean weight of cross attention on the source position that belongs to each target position.

    Args:
        source: a cache, or a pattern [batch head query key]
        alignment: source index per target position; rows whose index lies outside the keys, such
            as -1, have no target and do not count
        shift: added to the alignment
        accuracy: the fraction of rows whose largest weight lies there, instead of the weight; a
            tie counts in parts, so that chance is 1 / (number of keys)
        **options: fields of `RowOptions`
    """
    alignment = checked_tokens(alignment, "alignment")

    def value(block: RowBlock) -> tuple[Tensor, Tensor]:
        if alignment.shape[1] != block.n_queries or not same_batch(alignment, block):
            raise ValueError(
                f"alignment {list(alignment.shape)} does not fit a pattern of {len(block.weights)} "
                f"examples and {block.n_queries} queries; give one source index per query"
            )
        index = alignment[:, block.start : block.start + block.weights.shape[-2], None]
        known = (index >= 0) & (index < block.weights.shape[-1])
        here = ((block.key == index + shift) & known)[:, None]
        mass, some = block.at(here)
        if not accuracy:
            return mass, some
        top = block.weights == block.weights.amax(-1, keepdim=True)
        return (top & here).sum(-1) / top.sum(-1), some

    name = "alignment_accuracy" if accuracy else "alignment_mass"
    return measure(source, Metric(name, value), RowOptions(**options))
