"""Take something out of a running model and see what breaks, beside a control of the same size.

Contains the edits as hooks (zero, mean, resample, pattern-preserving) and the measurement of their
effect. Leaves out what lags carry (`causal.lags`) and moving activations between inputs
(`causal.patch`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from smearlens._explain import explained
from smearlens._hooks import HookedRootModule
from smearlens.analysis.behaviour import induction_accuracy
from smearlens.analysis.stats import bootstrap_interval
from smearlens.causal.component import Component, as_component
from smearlens.causal.running import (
    BehaviourMetric,
    Hooks,
    activations,
    measure_with,
    observed,
    replace_with,
)

HOW = ("zero", "mean", "mean_by_position", "resample", "pattern_preserving")
ROUTING_POINTS = ("hook_pattern", "hook_delta", "hook_B", "hook_C")  # what moves where


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


@explained
@observed
def ablate(
    model: HookedRootModule,
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
        model: to intervene on; it runs in eval mode
        tokens: to measure on
        component: what to remove, or a hook name for all of it
        how: "zero"; "mean" over a data set and its positions; "mean_by_position"; "resample", the
            activation of another example; "pattern_preserving", zero with every pattern (Δ, B and C
            of state-space layers) kept as in the clean run. A score of -inf, a hidden key, stays
        metric: behaviour, per example
        reference: data set of the mean and of resampling; default `tokens`. Its sequences are as
            long, unless positions are averaged over, and to resample no fewer
        n_controls: random components of the same size and place; none if `component` is more than
            half of the units, since there are not as many others
        generator: of resampling and of the controls

    Raises:
        ValueError: for a `how`, a hook or units that do not exist, a reference that does not fit,
            weights (such as `hook_kernel`) to be averaged or resampled, a single example that would
            get its own activation, or a metric that returns anything but one number per example

    Source:
        Olsson et al. 2022 for pattern-preserving ablation
    """
    if how not in HOW:
        raise ValueError(f"how must be one of {list(HOW)}, got {how!r}")
    component = as_component(component)
    reference = tokens if reference is None else reference
    routing = _routing(model) if how == "pattern_preserving" else []
    run = tokens if how == "pattern_preserving" else reference
    stored = activations(model, run, [component.name, *routing])
    _check_reference(reference, tokens, component, how, stored[component.name])
    component.check_units(stored[component.name])
    partner = _partners(len(reference), generator)

    def hooks_for(target: Component) -> Hooks:
        frozen: Hooks = [(name, replace_with(stored[name])) for name in routing]
        return [*frozen, (target.name, _remover(target, how, stored[target.name], partner))]

    others = _other_units(component, stored[component.name], n_controls, generator)
    controls = [measure_with(model, tokens, hooks_for(other), metric) for other in others]
    return Effect(
        f"{how} ablation of {component.name} {component.units or 'all'}",
        measure_with(model, tokens, [], metric),
        measure_with(model, tokens, hooks_for(component), metric),
        torch.stack(controls) if controls else None,
    )


def _check_reference(
    reference: Tensor, tokens: Tensor, component: Component, how: str, stored: Tensor
) -> None:
    """Raise unless what is `stored` of `reference` fits what passes for `tokens`."""
    if how in ("zero", "pattern_preserving"):
        return
    component.check_examples(stored, len(reference), f"how={how!r}")
    placed = how != "mean" or component.pos_axis(stored, "the mean") == 2
    fewer = how == "resample" and len(reference) < len(tokens)
    if fewer or (placed and reference.shape[1] != tokens.shape[1]):
        raise ValueError(
            f"reference {list(reference.shape)} does not fit tokens {list(tokens.shape)}: "
            f"how={how!r} of {component.name} needs sequences of the same length"
            + (", no fewer than there are in tokens" if how == "resample" else "")
        )
    if len(reference) < 2 and (how == "resample" or (placed and reference is tokens)):
        raise ValueError(
            f"how={how!r} of {component.name} takes from other examples, got {len(reference)} in "
            "all; pass more tokens, or more in reference="
        )


def _partners(count: int, generator: torch.Generator) -> Int[Tensor, " example"]:
    """For each example a random other one: the next in a random circle."""
    order = torch.randperm(count, generator=generator)
    return torch.empty_like(order).scatter_(0, order, order.roll(1))


def _routing(model: HookedRootModule) -> list[str]:
    return [n for n in model.hook_dict if n.rpartition(".")[2] in ROUTING_POINTS]


def _remover(target: Component, how: str, stored: Tensor, partner: Tensor) -> Callable:
    """A hook that removes the units of `target` from what passes."""

    def remove(value: Tensor, hook: Any) -> Tensor:
        if how in ("zero", "pattern_preserving"):
            new = torch.zeros_like(value)
        elif how == "mean":
            over = (0,) if target.pos_axis(stored, "the mean") == 2 else (0, 1)
            new = _visible_mean(stored, over).expand_as(value)
        elif how == "mean_by_position":
            new = _visible_mean(stored, (0,)).expand_as(value)
        else:  # resample
            new = stored[partner][: len(value)]
        new = torch.where(value.isneginf() | new.isneginf(), value, new)
        if target.units is None:
            return new
        index, axis = torch.tensor(target.units, device=value.device), target.unit_axis(value)
        return value.index_copy(axis, index, new.index_select(axis, index))

    return remove


def _visible_mean(stored: Tensor, over: tuple[int, ...]) -> Tensor:
    """Mean over axes, which stay with size 1; of scores over those that are not hidden."""
    hidden = stored.isneginf()
    if not bool(hidden.any()):
        return stored.mean(over, keepdim=True)
    total = stored.masked_fill(hidden, 0).sum(over, keepdim=True)
    count = (~hidden).sum(over, keepdim=True)
    return (total / count).masked_fill(count == 0, -torch.inf)


def _other_units(
    component: Component, stored: Tensor, count: int, generator: torch.Generator
) -> list[Component]:
    """`count` random sets of units outside the component, each as large as it."""
    if component.units is None:
        return []
    n_units = stored.shape[component.unit_axis(stored)]
    rest = torch.tensor([u for u in range(n_units) if u not in component.units])
    size = len(component.units)
    if len(rest) < size:
        return []
    picks = (rest[torch.randperm(len(rest), generator=generator)[:size]] for _ in range(count))
    return [replace(component, units=tuple(pick.tolist())) for pick in picks]
