"""What lags carry, taken away or exchanged: taps of a convolution, or one role's share of it.

Leaves out other ablations and the measuring itself (`causal.ablate`).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Int
from torch import Tensor

from smearlens._explain import explained
from smearlens.analysis.behaviour import induction_accuracy
from smearlens.causal.ablate import BehaviourMetric, Effect, Hooks, measure_with, replace_with
from smearlens.models.base import HookedModel


@explained
def keep_lags(model: HookedModel, layer: str, keep: Sequence[int]) -> Hooks:
    """Hooks that zero every tap of the convolution `layer` whose lag is not in `keep`."""
    conv = model.mod_dict.get(layer)
    if conv is None or not hasattr(conv, "lags"):
        known = [name for name, module in model.mod_dict.items() if hasattr(module, "lags")]
        raise ValueError(f"layer={layer!r} is no convolution of this model; convolutions: {known}")
    lags: Sequence[int] = conv.lags  # pyrefly: ignore[bad-assignment]
    mask = torch.tensor([lag in keep for lag in lags])
    return [(f"{layer}.hook_kernel", lambda kernel, hook: kernel * mask.to(kernel))]


def present_only(model: HookedModel, block: str = "blocks.0") -> Hooks:
    """Hooks that leave only lag 0 of every convolution and smearing in `block`."""
    hooks: Hooks = []
    for name in model.hook_dict:
        if not name.startswith(f"{block}."):
            continue
        if name.endswith("hook_kernel"):
            hooks += keep_lags(model, name.removesuffix(".hook_kernel"), [0])
        elif name.endswith("smear.hook_weight"):
            hooks.append((name, lambda weight, hook: torch.zeros_like(weight)))
    if not hooks:
        raise ValueError(
            f"block {block!r} of this {type(model).__name__} has no convolution and no smearing; "
            f"hooks that would do: *.hook_kernel, *.smear.hook_weight"
        )
    return hooks


@explained
def role_without_lags(
    model: HookedModel,
    tokens: Int[Tensor, "batch pos"],
    roles: Sequence[str],
    *,
    block: str = "blocks.0",
    metric: BehaviourMetric = induction_accuracy,
    n_controls: int = 3,
    generator: torch.Generator,
) -> Effect:
    """Effect of giving chosen roles what they would be without any smearing.

    A first run with only lag 0 left in every convolution and smearing of the block yields the
    roles' activations; a second run gets them in place of its own, and keeps every other role as it
    was. The control moves each activation as far, position by position, in a random direction.

    Args:
        model: a model with a convolution or smeared keys
        tokens: to measure on
        roles: some of "q", "k", "v" of an attention layer ("qkv" is all); some of "u" (what is
            written), "B" (under which key), "C" (what is asked for), "delta" of a state-space layer
        block: which block
        metric: behaviour, per example
        n_controls: random directions to average
        generator: of the controls

    Source:
        "key smearing" is the claim that the effect of "k" alone is that of all; B is the key of a
        state-space layer
    """
    points = _role_points(model, block, roles)
    everything = _role_points(model, block, ())
    with torch.no_grad():
        _, now = model.run_with_cache(tokens, names_filter=everything)
        with model.hooks(present_only(model, block)):
            _, plain = model.run_with_cache(tokens, names_filter=points)
    kept: Hooks = [(name, replace_with(now[name])) for name in everything if name not in points]
    swapped: Hooks = [(point, replace_with(plain[point])) for point in points]
    controls = []
    for _ in range(n_controls):
        moved: Hooks = []
        for point in points:
            size = (plain[point] - now[point]).norm(dim=-1, keepdim=True)
            direction = torch.randn(now[point].shape, generator=generator)
            direction = direction / direction.norm(dim=-1, keepdim=True)
            near = now[point] + size * direction
            moved.append((point, replace_with(near.abs() if point.endswith("delta") else near)))
        controls.append(measure_with(model, tokens, [*kept, *moved], metric))
    return Effect(
        f"lags removed from {'+'.join(roles)}",
        measure_with(model, tokens, [], metric),
        measure_with(model, tokens, [*kept, *swapped], metric),
        torch.stack(controls) if controls else None,
    )


def exchange_lags(
    model: HookedModel,
    tokens: Int[Tensor, "batch pos"],
    other: Int[Tensor, "other_batch other_pos"],
    roles: Sequence[str],
    *,
    block: str = "blocks.0",
) -> Hooks:
    """Hooks that give chosen roles, in a run on `tokens`, what the lags bring them from `other`.

    The convolution of the block is linear, so that its output is the sum of what lag 0 and what the
    other lags contribute. A run with the former from `tokens` and the latter from `other` yields
    the roles' activations; a run on `tokens` with these hooks gets them, and keeps every other role
    as it was. If a role finds its tokens by what stood before them, the model now answers as if
    those of `other` had stood there.

    Args:
        model: a model whose block has a convolution
        tokens: to run on
        other: of the same shape; example by example, where the lags' share comes from
        roles: as in `role_without_lags`
        block: which block

    Raises:
        ValueError: if the block has no convolution, or no such role, or the shapes differ

    Source:
        Geiger et al. 2021, "Causal Abstractions of Neural Networks", interchange interventions
    """
    if other.shape != tokens.shape:
        raise ValueError(f"other {list(other.shape)} must be as tokens are, {list(tokens.shape)}")
    conv = f"{block}.conv"
    points, everything = _role_points(model, block, roles), _role_points(model, block, ())
    only_present = keep_lags(model, conv, [0])
    outputs = []
    with torch.no_grad():
        _, now = model.run_with_cache(tokens, names_filter=everything)
        _, full = model.run_with_cache(other, names_filter=f"{conv}.hook_out")
        for run in (tokens, other):
            with model.hooks(only_present):
                _, present = model.run_with_cache(run, names_filter=f"{conv}.hook_out")
            outputs.append(present[f"{conv}.hook_out"])
        own, foreign = outputs
        mixed = own + full[f"{conv}.hook_out"] - foreign
        with model.hooks([(f"{conv}.hook_out", replace_with(mixed))]):
            _, exchanged = model.run_with_cache(tokens, names_filter=points)
    kept: Hooks = [(name, replace_with(now[name])) for name in everything if name not in points]
    return [*kept, *((point, replace_with(exchanged[point])) for point in points)]


def _role_points(model: HookedModel, block: str, roles: Sequence[str]) -> list[str]:
    """Hook names of the roles of a block's attention or state-space layer; all if none is named."""
    attention = f"{block}.attn.hook_q" in model.hook_dict
    allowed, layer = (("q", "k", "v"), "attn") if attention else (("u", "B", "C", "delta"), "ssm")
    wrong = [role for role in roles if role not in allowed]
    if wrong or f"{block}.{layer}.hook_{allowed[0]}" not in model.hook_dict:
        raise ValueError(
            f"roles must be some of {', '.join(map(repr, allowed))} in {block!r} of this "
            f"{type(model).__name__}, got {roles!r}"
        )
    return [f"{block}.{layer}.hook_{role}" for role in roles or allowed]
