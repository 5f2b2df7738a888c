"""Take something out of a running model and see what breaks, beside a control of the same size.

Contains the edits as hooks (zero, mean, resample, pattern-preserving) and the measurement of their
effect. Leaves out what lags carry (`causal.lags`) and moving activations between inputs
(`causal.patch`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from smearlens._explain import explained
from smearlens.analysis.behaviour import induction_accuracy
from smearlens.analysis.stats import bootstrap_interval
from smearlens.models.base import HookedModel

Hooks = list[tuple[str | Callable, Callable]]
BehaviourMetric = Callable[[Tensor, Tensor], Tensor]  # (logits, tokens) -> one number per example

HOW = ("zero", "mean", "mean_by_position", "resample", "pattern_preserving")
HEAD_POINTS = ("hook_q", "hook_k", "hook_v", "hook_z")  # [batch pos head d_head]
ROUTING_POINTS = ("hook_pattern", "hook_delta", "hook_B", "hook_C")  # what moves where


@dataclass(frozen=True)
class Component:
    """Some units of one activation.

    Attributes:
        name: hook name
        units: heads of `hook_q`, `hook_k`, `hook_v`, `hook_z` and patterns, channels of any other
            activation; None is all of them
    """

    name: str
    units: tuple[int, ...] | None = None

    def __post_init__(self):
        some = isinstance(self.units, (tuple, list)) and len(self.units) > 0
        if self.units is not None and not (some and all(isinstance(u, int) for u in self.units)):
            raise ValueError(f"units must be some indices, or None for all, got {self.units!r}")

    @property
    def axis(self) -> int:
        """The axis that `units` index."""
        point = self.name.rpartition(".")[2]
        if point in ("hook_pattern", "hook_attn_scores"):
            return 1
        return 2 if point in HEAD_POINTS else -1


@dataclass(frozen=True)
class Effect:
    """What an intervention did to a behaviour, per example.

    Attributes:
        name: of the intervention
        clean: metric without it [batch]
        changed: metric with it [batch]
        controls: metric under each size-matched random intervention; None without any
    """

    name: str
    clean: Float[Tensor, " batch"]
    changed: Float[Tensor, " batch"]
    controls: Float[Tensor, "control batch"] | None = None

    @property
    def values(self) -> Float[Tensor, " batch"]:
        """Changed minus clean, per example."""
        return self.changed - self.clean

    def mean(self) -> float:
        """Mean effect."""
        return float(self.values.nanmean())

    def interval(self, level: float = 0.95) -> tuple[float, float]:
        """Bootstrap interval of the mean effect over examples."""
        low, high = bootstrap_interval(self.values[:, None], level)[0]
        return float(low), float(high)

    @property
    def control(self) -> float:
        """Mean effect of the controls; NaN without any."""
        if self.controls is None:
            return torch.nan
        return float((self.controls - self.clean).nanmean())

    def __repr__(self) -> str:
        low, high = self.interval()
        before, after = float(self.clean.nanmean()), float(self.changed.nanmean())
        return (
            f"{self.name}: {before:.3f} -> {after:.3f} (effect {self.mean():+.3f} "
            f"[{low:+.3f}, {high:+.3f}], control {self.control:+.3f})"
        )


def measure_with(
    model: HookedModel,
    tokens: Int[Tensor, "batch pos"],
    hooks: Hooks,
    metric: BehaviourMetric = induction_accuracy,
) -> Float[Tensor, " batch"]:
    """`metric` of the model's logits with `hooks` attached for this one run."""
    with torch.no_grad():
        return metric(model.run_with_hooks(tokens, fwd_hooks=hooks), tokens)


@explained
def ablate(
    model: HookedModel,
    tokens: Int[Tensor, "batch pos"],
    component: Component | str,
    *,
    how: str = "zero",
    metric: BehaviourMetric = induction_accuracy,
    reference: Int[Tensor, "other other_pos"] | None = None,
    n_controls: int = 5,
    generator: torch.Generator,
) -> Effect:
    """Effect of removing `component`, beside that of equally many random other units.

    Args:
        model: to intervene on
        tokens: to measure on
        component: what to remove, or a hook name for all of it
        how: "zero"; "mean" over a data set and its positions; "mean_by_position"; "resample", the
            activation of another example; "pattern_preserving", zero with every pattern (Δ, B and C
            of state-space layers) kept as in the clean run
        metric: behaviour, per example
        reference: data set of the mean and of resampling; default `tokens`. Its sequences are as
            long, unless positions are averaged over, and to resample no fewer
        n_controls: random components of the same size and place; none if `component` is all units
        generator: of resampling and of the controls

    Raises:
        ValueError: for a `how`, a hook or units that do not exist, or a reference that does not fit

    Source:
        Olsson et al. 2022 for pattern-preserving ablation
    """
    if how not in HOW:
        raise ValueError(f"how must be one of {list(HOW)}, got {how!r}")
    component = Component(component) if isinstance(component, str) else component
    reference = tokens if reference is None else reference
    _check_reference(reference, tokens, component, how)
    names = {component.name, *_routing(model)} if how == "pattern_preserving" else {component.name}
    with torch.no_grad():
        _, cache = model.run_with_cache(
            tokens if how == "pattern_preserving" else reference, names_filter=sorted(names)
        )
    partner = torch.randperm(len(reference), generator=generator)
    stored = {name: cache[name] for name in names}

    def hooks_for(target: Component) -> Hooks:
        frozen = [
            (name, replace_with(stored[name]))
            for name in _routing(model)
            if how == "pattern_preserving"
        ]
        return [*frozen, (target.name, _remover(target, how, stored[target.name], partner))]

    others = _other_units(component, stored[component.name], n_controls, generator)
    controls = [measure_with(model, tokens, hooks_for(other), metric) for other in others]
    return Effect(
        f"{how} ablation of {component.name} {component.units or 'all'}",
        measure_with(model, tokens, [], metric),
        measure_with(model, tokens, hooks_for(component), metric),
        torch.stack(controls) if controls else None,
    )


def replace_with(value: Tensor) -> Callable:
    """A hook that puts `value` in the place of whatever passes."""
    return lambda _, hook: value


def _check_reference(reference: Tensor, tokens: Tensor, component: Component, how: str) -> None:
    """Raise unless what is stored of `reference` fits what passes for `tokens`."""
    placed = how in ("mean_by_position", "resample") or (how == "mean" and component.axis == 1)
    fewer = how == "resample" and len(reference) < len(tokens)
    if fewer or (placed and reference.shape[1] != tokens.shape[1]):
        raise ValueError(
            f"reference {list(reference.shape)} does not fit tokens {list(tokens.shape)}: "
            f"how={how!r} of {component.name} needs sequences of the same length"
            + (", no fewer than there are in tokens" if how == "resample" else "")
        )


def _routing(model: HookedModel) -> list[str]:
    return [n for n in model.hook_dict if n.rpartition(".")[2] in ROUTING_POINTS]


def _remover(target: Component, how: str, stored: Tensor, partner: Tensor) -> Callable:
    """A hook that removes the units of `target` from what passes."""

    def remove(value: Tensor, hook: Any) -> Tensor:
        if how in ("zero", "pattern_preserving"):
            new = torch.zeros_like(value)
        elif how == "mean":
            over = (0, 1) if target.axis != 1 else (0,)
            new = stored.mean(over, keepdim=True).expand_as(value)
        elif how == "mean_by_position":
            new = stored.mean(0, keepdim=True).expand_as(value)
        else:  # resample
            new = stored[partner][: len(value)]
        if target.units is None:
            return new
        index = torch.tensor(target.units)
        return value.index_copy(
            target.axis % value.ndim, index, new.index_select(target.axis, index)
        )

    return remove


def _other_units(
    component: Component, stored: Tensor, count: int, generator: torch.Generator
) -> list[Component]:
    """`count` random sets of units outside the component, each as large as it."""
    if component.units is None:
        return []
    n_units = stored.shape[component.axis]
    bad = [u for u in component.units if not 0 <= u < n_units]
    if bad:
        raise ValueError(f"units {bad} of {component.name}: allowed are 0..{n_units - 1}")
    rest = torch.tensor([u for u in range(n_units) if u not in component.units])
    size = len(component.units)
    if len(rest) < size:
        return []
    picks = (rest[torch.randperm(len(rest), generator=generator)[:size]] for _ in range(count))
    return [Component(component.name, tuple(pick.tolist())) for pick in picks]
