"""Which layers of a cache and which of their rows and keys a measure looks at.

Leaves out what is done with them: `rows`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool
from torch import Tensor

from smearlens.analysis.mixing.kinds import Mixing
from smearlens.analysis.mixing.state_space import Normalise

Kind = Literal["attention", "conv", "ssm"]


@dataclass(frozen=True, kw_only=True)
class RowOptions:
    """What to leave out of the rows before measuring.

    Attributes:
        exclude_bos: drop key 0
        exclude_self: drop the key at the query's own position
        renormalise: scale what is left of a row back to sum 1
        query_mask: True where a query counts, [example query] or [query]
        key_mask: True where a key counts, [example key] or [key]
        normalise: how signed rows (convolution, state space) become weights, before any key is
            left out: "abs" is |M| / Σ|M|, "softmax", "minmax" (shifted to start at 0, then to
            sum 1), "none"
        kind: which layers of a cache
    """

    exclude_bos: bool = False
    exclude_self: bool = False
    renormalise: bool = True
    query_mask: Tensor | None = None
    key_mask: Tensor | None = None
    normalise: Normalise = "abs"
    kind: Kind | tuple[Kind, ...] = ("attention", "ssm")

    def __post_init__(self):
        if self.normalise not in ("abs", "softmax", "minmax", "none"):
            raise ValueError(
                f"normalise must be 'abs', 'softmax', 'minmax' or 'none', got {self.normalise!r}"
            )
        for name in ("query_mask", "key_mask"):
            mask = getattr(self, name)
            if mask is not None and getattr(mask, "dtype", None) != torch.bool:
                given = getattr(mask, "dtype", type(mask).__name__)
                raise TypeError(f"{name} must be a bool tensor (True counts), got {given}")


def fitted(name: str, mask: Tensor, mixing: Mixing, size: int) -> Bool[Tensor, "batch_or_1 pos"]:
    """A mask of the options as [batch or 1, pos], its sizes checked."""
    mask = mask if mask.ndim != 1 else mask[None]
    n_examples = mixing.n_examples if mixing.n_examples > 1 else len(mask)
    if mask.ndim != 2 or mask.shape[-1] != size or len(mask) not in (1, n_examples):
        raise ValueError(f"{name} {list(mask.shape)} does not fit {n_examples} x {size} positions")
    return mask
