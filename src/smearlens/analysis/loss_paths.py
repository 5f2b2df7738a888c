"""Where checkpoints lie by the losses of single tokens: one PCA of all models and all checkpoints.

Leaves out the losses (`training.attention_tracking` writes those of fixed tokens) and plots.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True, eq=False)
class LossPaths:
    """The paths of some models through the plane in which their token losses vary most.

    Attributes:
        paths: name of the model to its checkpoints in the components, in nats; the origin is the
            mean of all checkpoints of all models
        components: directions of length 1; their sign makes the sum of the weights positive, so
            that a checkpoint further along has the higher losses
        mean: of every token over all checkpoints, nats
        explained: share of the variance along each component, in [0, 1]
    """

    paths: dict[str, Float[Tensor, "checkpoint component"]]
    components: Float[Tensor, "component token"]
    mean: Float[Tensor, " token"]
    explained: Float[Tensor, " component"]


def loss_paths(
    losses: Mapping[str, Float[Tensor, "checkpoint token"]], *, n_components: int = 2
) -> LossPaths:
    """Fit the first principal components of token losses jointly, and place every checkpoint.

    Models count by their checkpoints. Smooth paths bend in this plane whatever the model learns: a
    random walk in many dimensions alone has shares of 0.61 and 0.15.

    >>> falling = torch.tensor([[3.0, 3.0], [2.0, 2.0], [1.0, 1.0]])
    >>> found = loss_paths({"a model": falling}, n_components=1)
    >>> tuple(round(x, 3) for x in found.paths["a model"].flatten().tolist())
    (1.414, 0.0, -1.414)

    Args:
        losses: name of a model to the losses of its checkpoints, in nats, on the same tokens for
            all; a row is one checkpoint, as `per_token_loss` gives one number per token
        n_components: how many to keep

    Raises:
        ValueError: if models have other numbers of tokens, a loss is not finite, all checkpoints
            are alike, or there are fewer checkpoints or tokens than components

    Source:
        Olsson et al. 2022, "In-context Learning and Induction Heads", per-token loss analysis; the
        shares of a random walk: Antognini and Sohl-Dickstein 2018, "PCA of high dimensional random
        walks with comparison to neural network training"
    """
    sizes = {name: tuple(each.shape) for name, each in losses.items()}
    if len({size[1:] for size in sizes.values()}) != 1 or {*map(len, sizes.values())} != {2}:
        raise ValueError(
            f"losses must be [checkpoint token] of some models on the same tokens, got {sizes}"
        )
    rows = torch.cat([each.detach().double().cpu() for each in losses.values()])
    if not 1 <= n_components <= min(rows.shape):
        raise ValueError(
            f"n_components must be in 1..{min(rows.shape)}, the smaller of {rows.shape[0]} "
            f"checkpoints and {rows.shape[1]} tokens; got {n_components}"
        )
    mean = rows.mean(0)
    if not rows.isfinite().all() or rows.allclose(mean, rtol=1e-12, atol=0):
        raise ValueError(
            "losses must be finite and differ between checkpoints: "
            f"{int((~rows.isfinite()).sum())} of {rows.numel()} are not finite"
        )
    _, lengths, directions = torch.linalg.svd(rows - mean, full_matrices=False)
    components = directions[:n_components]
    components = components * torch.where(components.sum(1, keepdim=True) < 0, -1.0, 1.0)
    parts = ((rows - mean) @ components.T).split([len(each) for each in losses.values()])
    return LossPaths(
        paths=dict(zip(losses, parts, strict=True)),
        components=components,
        mean=mean,
        explained=(lengths.square() / lengths.square().sum())[:n_components],
    )
