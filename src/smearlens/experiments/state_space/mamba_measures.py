"""What the study of induction in Mamba measures of one trained model.

Contains what each role of the state-space layer does without the convolution's lags and with those
of another example, and the share of negative decays. Leaves out the grid and the verdicts
(`mamba_induction`).
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from smearlens.analysis.behaviour import predictable
from smearlens.causal.ablate import measure_with
from smearlens.causal.lags import exchange_lags, role_without_lags
from smearlens.experiments import measures
from smearlens.experiments.grid import Cell
from smearlens.models.base import HookedModel

ROLES = (("u",), ("B",), ("C",), ("delta",), ("u", "B", "C", "delta"))


def measure(model: HookedModel, cell: Cell, *, tokens: Tensor) -> dict[str, Any]:
    """Accuracy, without the lags of each role and with another example's, and negative decays."""
    generator = torch.Generator().manual_seed(0)
    found: dict[str, Any] = measures.behaviour(model, tokens)
    if cell.config.n_layers == 1:
        found["without_lags"] = {
            "+".join(roles): float(
                role_without_lags(model, tokens, roles, generator=generator).changed.nanmean()
            )
            for roles in ROLES
        }
        found["exchanged_lags"] = exchanged(model, tokens, generator=generator)
    with torch.no_grad():
        _, cache = model.run_with_cache(
            tokens[:16], names_filter=lambda name: name.endswith("hook_A_bar")
        )
    decays = torch.cat([cache[name].flatten() for name in cache.keys()])  # noqa: SIM118
    found["negative_decays"] = float((decays < 0).double().mean())
    return found


def exchanged(
    model: HookedModel, tokens: Tensor, *, generator: torch.Generator
) -> dict[str, dict[str, float]]:
    """How often each role with another example's lags makes the model answer as either example.

    `own` is what followed the query in its own example. `other` is what stands behind the query in
    the other example's order: the answer of a model that finds it by what stood before. Positions
    where the two are one token do not count.
    """
    shuffled, answers = reordered(tokens, generator=generator)
    own, other = tokens[:, 1:], answers[:, :-1]  # of each query but the last
    apart = predictable(tokens) & (own != other)

    def share(logits: Tensor, wanted: Tensor) -> Tensor:
        right = (logits[:, :-1].argmax(-1) == wanted) & apart
        return right.sum(1) / apart.sum(1)

    found: dict[str, dict[str, float]] = {}
    for roles in ROLES:
        hooks = exchange_lags(model, tokens, shuffled, roles)
        found["+".join(roles)] = {
            whose: float(
                measure_with(
                    model, tokens, hooks, lambda logits, _, wanted=wanted: share(logits, wanted)
                ).nanmean()
            )
            for whose, wanted in (("own", own), ("other", other))
        }
    return found


def reordered(
    tokens: Int[Tensor, "batch pos"], *, generator: torch.Generator
) -> tuple[Int[Tensor, "batch pos"], Int[Tensor, "batch pos"]]:
    """The same repeats with the tokens of each block in another order, and what follows by it.

    Returns:
        the reordered examples; and, for each query of the given ones, the token that stands in the
        given example where the other one has the successor of the query
    """
    shuffled, answers = torch.empty_like(tokens), torch.empty_like(tokens)
    for row, example in enumerate(tokens):
        period = int((example[1:] == example[0]).nonzero()[0]) + 1
        order = torch.randperm(period, generator=generator)
        place = torch.arange(tokens.shape[1]) % period  # of each position in its block
        shuffled[row] = example[order[place]]
        after = (order.argsort()[place] + 1) % period  # place behind the query, in the other order
        answers[row] = example[after]
    return shuffled, answers
