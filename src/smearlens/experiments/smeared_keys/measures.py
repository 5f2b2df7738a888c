"""What the smeared-keys study takes from a model beyond `experiments.measures`.

A lean set for the big grid, the heads of every layer of a stack, a kernel's way from its start,
taps that read the future removed one by one, and gradient norms in a few numbers. Leaves out padded
text (`text_measures`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from smearlens.analysis.behaviour import induction_accuracy, induction_loss, per_token_loss
from smearlens.analysis.heads import (
    duplicate_token_score,
    induction_score,
    prefix_matching_score,
    prev_token_score,
)
from smearlens.analysis.kernels import kernel_profile
from smearlens.analysis.scores import Scores
from smearlens.causal.ablate import Component, ablate, measure_with
from smearlens.causal.lags import keep_lags, role_without_lags
from smearlens.experiments.grid import Cell
from smearlens.experiments.measures import ROLES, with_patterns
from smearlens.models.base import HookedModel
from smearlens.models.families import family

WINDOW = 20  # updates that a gradient norm is compared with
OFFSETS = (0, 1, 2, 3)  # of a stripe: 1 is the token that followed an earlier occurrence


def lean(model: HookedModel, tokens: Int[Tensor, "batch pos"]) -> dict[str, Any]:
    """Accuracy, best heads with control and chance, and lags removed from each role.

    Same names as `experiments.measures`, without intervals over examples and random controls.
    """
    logits, cache = with_patterns(model, tokens)
    found: dict[str, Any] = {
        "accuracy": float(induction_accuracy(logits, tokens).mean()),
        "loss": float(induction_loss(logits, tokens).mean()),
        "scores": {
            "induction": {"best": best(induction_score(cache, tokens))},
            "prev_token": {"best": best(prev_token_score(cache))},
        },
        "smearing": {},
    }
    if not any(name.endswith(("hook_kernel", "smear.hook_weight")) for name in model.hook_dict):
        return found
    generator = torch.Generator().manual_seed(0)
    for roles in ROLES:
        effect = role_without_lags(model, tokens, roles, n_controls=0, generator=generator)
        without = found["smearing"].setdefault("without_lags", {})
        without[roles] = {"accuracy": float(effect.changed.nanmean())}
    return found


def best(scores: Scores, layer: str | None = None) -> dict[str, Any]:
    """The head with the highest mean score, of one layer or of all; with control and chance."""
    means = {name: mean for name, mean in scores.mean().items() if layer in (None, name)}
    name = max(means, key=lambda key: float(means[key].nan_to_num(-1).max()))
    mean = means[name]
    head = int(mean.nan_to_num(-1).argmax())
    beside = {
        "score": mean,
        "control": scores.control[name].expand_as(mean),
        "chance": scores.chance[name].expand_as(mean),
    }
    return {"layer": name, "head": head, **{k: float(v[head]) for k, v in beside.items()}}


def layers(model: HookedModel, tokens: Int[Tensor, "batch pos"]) -> list[dict[str, Any]]:
    """Of every attention layer: its best heads, and accuracy without the best induction head.

    The head is replaced by its mean output; the control does the same to other heads of the layer.
    """
    _, cache = with_patterns(model, tokens)
    found = {
        "induction": induction_score(cache, tokens),
        "duplicate_token": duplicate_token_score(cache, tokens),
        "prev_token": prev_token_score(cache),
    }
    generator = torch.Generator().manual_seed(0)
    rows = []
    for layer in found["induction"]:
        row: dict[str, Any] = {name: best(scores, layer) for name, scores in found.items()}
        for name in ("induction", "prev_token"):
            target = Component(f"{layer}.hook_z", (row[name]["head"],))
            effect = ablate(model, tokens, target, how="mean", n_controls=3, generator=generator)
            row[f"without_{name}"] = {
                "accuracy": float(effect.changed.nanmean()),
                "effect": effect.mean(),
                "control_effect": effect.control,
            }
        rows.append(row)
    return rows


def stripe_offsets(
    model: HookedModel, tokens: Int[Tensor, "batch pos"]
) -> dict[str, dict[str, Any]]:
    """The best head for each place of a stripe: so many tokens after an earlier occurrence.

    Where a convolution replaces the stream, a position carries its predecessors, and the head that
    does induction may look one or two tokens further on than the induction score expects.
    """
    _, cache = with_patterns(model, tokens)
    scores = prefix_matching_score(cache, tokens, offset=OFFSETS)
    return {str(offset): best(found) for offset, found in scores.items()}


def kernel_from_start(model: HookedModel, cell: Cell) -> dict[str, Any]:
    """The kernel by lag and how far training moved it from where this seed started it.

    Empty for a model without a convolution. `bound` is that of the initialisation, uniform within
    ± 1 / √taps; `moved` the distance ‖w - w₀‖ / ‖w₀‖ by lag and in all.
    """
    points = [name for name in model.hook_dict if name.endswith("hook_kernel")]
    if not points:
        return {}
    layer = points[0].removesuffix(".hook_kernel")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(cell.seed)
        fresh = family(cell.model)(cell.config)
    conv: Any = model.get_submodule(layer)
    before: Any = fresh.get_submodule(layer)
    weight, start = (c.weight.detach().double() for c in (conv, before))
    profile = kernel_profile(weight, lags=conv.lags)
    order = [conv.lags.index(lag) for lag in profile.lags]
    distance = (weight - start)[:, order].norm(dim=0) / start[:, order].norm(dim=0)
    return {
        "layer": layer,
        "lags": profile.lags,
        "rms": profile.rms.tolist(),
        "signed_mean": profile.signed_mean.tolist(),
        "start_rms": start[:, order].square().mean(0).sqrt().tolist(),
        "moved": distance.tolist(),
        "moved_in_all": float((weight - start).norm() / start.norm()),
        "bound": weight.shape[1] ** -0.5,
        "largest": float(weight.abs().max()),
        "start_largest": float(start.abs().max()),
        "null_rms": profile.null_rms,
        "null_high": profile.null_high,
        "null_signed": profile.null_signed,
        "future_share": profile.future_share,
    }


def future_taps(
    model: HookedModel, tokens: Int[Tensor, "batch pos"], *, repeats: bool
) -> list[dict[str, Any]]:
    """Loss (nats) with each tap that reads the future removed, and with all of them.

    Args:
        model: with a convolution of the stream whose padding is not causal
        tokens: to measure on
        repeats: whether to add accuracy where induction can predict
    """
    layer = "blocks.0.conv"
    conv: Any = model.get_submodule(layer)
    lags: list[int] = conv.lags
    ahead = [lag for lag in lags if lag < 0]
    rows = []
    for removed in ([], *([lag] for lag in ahead), ahead):
        hooks = keep_lags(model, layer, [lag for lag in lags if lag not in removed])
        loss = measure_with(
            model, tokens, hooks, lambda logits, given: per_token_loss(logits, given).mean(1)
        )
        row: dict[str, Any] = {"removed": list(removed), "loss": float(loss.double().mean())}
        if repeats:
            row["accuracy"] = float(measure_with(model, tokens, hooks).mean())
        rows.append(row)
    return rows


def norm_summary(log: Sequence[dict[str, Any]], *, every: int = 10) -> dict[str, Any]:
    """Gradient norms of every parameter in a few numbers, and a thinned trace.

    `jump` is the largest ratio of a norm to the median of the `WINDOW` updates before it: 1 for a
    steady norm, whatever its trend.
    """
    steps = [row["step"] for row in log]
    found: dict[str, Any] = {"steps": steps[::every], "parameters": {}}
    for name in log[0]:
        if name == "step":
            continue
        norms = torch.tensor([row[name] for row in log], dtype=torch.float64)
        before = norms.unfold(0, min(WINDOW, len(norms) - 1), 1)[:-1].median(-1).values
        jumps = norms[-len(before) :] / before
        found["parameters"][name] = {
            "largest": float(norms.max()),
            "median": float(norms.median()),
            "jump": float(jumps.max()),
            "at": steps[len(norms) - len(jumps) + int(jumps.argmax())],
            "trace": [float(f"{norm:.3g}") for norm in norms[::every]],
        }
    return found
