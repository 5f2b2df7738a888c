"""What lags carry, taken away or exchanged: taps of a convolution, or one role's share of it.

Leaves out other ablations and the measuring itself (`causal.ablate`).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Int
from torch import Tensor

from smearlens._explain import explained
from smearlens._hooks import HookedRootModule
from smearlens.analysis.behaviour import induction_accuracy
from smearlens.causal.ablate import Effect
from smearlens.causal.running import (
    BehaviourMetric,
    Hooks,
    activations,
    measure_with,
    observed,
    replace_with,
)


@explained
def keep_lags(model: HookedRootModule, layer: str, keep: Sequence[int]) -> Hooks:
    """Hooks that zero every tap of the convolution `layer` whose lag is not in `keep`.

    Raises:
        ValueError: if `layer` is no convolution, or has no tap of a lag in `keep`
    """
    conv = model.mod_dict.get(layer)
    if conv is None or not hasattr(conv, "lags"):
        known = [name for name, module in model.mod_dict.items() if hasattr(module, "lags")]
        raise ValueError(
            f"layer={layer!r} is no convolution of this model, a module with `lags` (the lag of "
            f"each tap) beside its hook_kernel; those it has: {known}"
        )
    lags: Sequence[int] = conv.lags  # pyrefly: ignore[bad-assignment]
    if wrong := [lag for lag in keep if lag not in lags]:
        raise ValueError(f"keep must be some of the lags of {layer!r}, {lags}, got {wrong} in it")
    mask = torch.tensor([lag in keep for lag in lags])
    return [(f"{layer}.hook_kernel", lambda kernel, hook: kernel * mask.to(kernel))]


def present_only(model: HookedRootModule, block: str = "blocks.0") -> Hooks:
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
@observed
def role_without_lags(
    model: HookedRootModule,
    tokens: Int[Tensor, "batch pos"],
    roles: str | Sequence[str],
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
    everything, points = _role_points(model, block, roles)
    now = activations(model, tokens, everything)
    with model.hooks(present_only(model, block)):
        plain = activations(model, tokens, list(points.values()))
    kept: Hooks = [(name, replace_with(now[name])) for name in everything if name not in plain]
    swapped: Hooks = [(point, replace_with(value)) for point, value in plain.items()]
    controls = []
    for _ in range(n_controls):
        moved: Hooks = []
        for point in points.values():
            size = (plain[point] - now[point]).norm(dim=-1, keepdim=True)
            direction = torch.randn(now[point].shape, generator=generator).to(now[point])
            direction = direction / direction.norm(dim=-1, keepdim=True)
            near = now[point] + size * direction
            moved.append((point, replace_with(near.abs() if point.endswith("delta") else near)))
        controls.append(measure_with(model, tokens, [*kept, *moved], metric))
    return Effect(
        f"lags removed from {'+'.join(points)}",
        measure_with(model, tokens, [], metric),
        measure_with(model, tokens, [*kept, *swapped], metric),
        torch.stack(controls) if controls else None,
    )


@observed
def exchange_lags(
    model: HookedRootModule,
    tokens: Int[Tensor, "batch pos"],
    other: Int[Tensor, "other_batch other_pos"],
    roles: str | Sequence[str],
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
    everything, points = _role_points(model, block, roles)
    only_present, out = keep_lags(model, conv, [0]), f"{conv}.hook_out"
    now = activations(model, tokens, everything)
    full = activations(model, other, [out])[out]
    with model.hooks(only_present):
        own, foreign = (activations(model, run, [out])[out] for run in (tokens, other))
    with model.hooks([(out, replace_with(own + full - foreign))]):
        exchanged = activations(model, tokens, list(points.values()))
    kept: Hooks = [(name, replace_with(now[name])) for name in everything if name not in exchanged]
    return [*kept, *((point, replace_with(value)) for point, value in exchanged.items())]


def _role_points(
    model: HookedRootModule, block: str, roles: str | Sequence[str]
) -> tuple[list[str], dict[str, str]]:
    """Hook names of all roles of a block's attention or state-space layer, and of the given."""
    attention = f"{block}.attn.hook_q" in model.hook_dict
    allowed, layer = (("q", "k", "v"), "attn") if attention else (("u", "B", "C", "delta"), "ssm")
    named = [roles] if isinstance(roles, str) and roles in allowed else list(roles)
    points = {role: f"{block}.{layer}.hook_{role}" for role in allowed}
    if points[allowed[0]] not in model.hook_dict:
        layers = (name.rpartition(".") for name in model.hook_dict)
        known = [owner.rpartition(".")[0] for owner, _, p in layers if p in ("hook_q", "hook_u")]
        raise ValueError(
            f"block {block!r} of this {type(model).__name__} has no attention or state-space "
            f"layer; blocks that have one: {known}"
        )
    if not named or set(named) - set(allowed):
        raise ValueError(
            f"roles must be some of {', '.join(map(repr, allowed))} in {block!r} of this "
            f"{type(model).__name__}, got {roles!r}"
        )
    return list(points.values()), {role: points[role] for role in named}
