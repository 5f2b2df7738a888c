"""Move activations from one run into another: which of them carries the behaviour?

Contains activation patching of any hook, path patching along one edge, and attribution patching
(its gradient approximation). Leaves out removing things (`causal.ablate`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from smearlens._explain import explained
from smearlens.analysis.stats import bootstrap_interval
from smearlens.causal.ablate import BehaviourMetric, Component, Hooks, measure_with
from smearlens.models.base import HookedModel


@dataclass(frozen=True)
class Recovery:
    """How much of a behaviour one patched activation brings back.

    Attributes:
        name: what was patched
        clean, corrupt, patched: metric per example [batch]
        control: metric with the activation of another clean example [batch]
    """

    name: str
    clean: Float[Tensor, " batch"]
    corrupt: Float[Tensor, " batch"]
    patched: Float[Tensor, " batch"]
    control: Float[Tensor, " batch"]

    @property
    def defined(self) -> bool:
        """Whether clean and corrupt differ by more than twice the standard error."""
        gap = (self.clean - self.corrupt).double()
        error = float(gap.std()) / len(gap) ** 0.5 if len(gap) > 1 else float("inf")
        return abs(float(gap.mean())) > 2 * error

    @property
    def recovered(self) -> float:
        """(patched - corrupt) / (clean - corrupt) of the means; NaN where not `defined`."""
        return self._fraction(self.patched)

    @property
    def control_recovered(self) -> float:
        """The same for the control."""
        return self._fraction(self.control)

    def interval(self, level: float = 0.95) -> tuple[float, float]:
        """Bootstrap interval of patched - corrupt over examples, as a fraction of the mean gap."""
        low, high = bootstrap_interval((self.patched - self.corrupt)[:, None], level)[0]
        gap = float((self.clean - self.corrupt).mean())
        return (float(low) / gap, float(high) / gap) if self.defined else (torch.nan, torch.nan)

    def _fraction(self, value: Tensor) -> float:
        if not self.defined:
            return torch.nan
        gap = self.clean.double().mean() - self.corrupt.double().mean()
        return float((value.double().mean() - self.corrupt.double().mean()) / gap)

    def __repr__(self) -> str:
        low, high = self.interval()
        return (
            f"{self.name}: recovered {self.recovered:.3f} [{low:.3f}, {high:.3f}], "
            f"control {self.control_recovered:.3f}"
        )


@explained
def patch_activation(
    model: HookedModel,
    clean: Int[Tensor, "batch pos"],
    corrupt: Int[Tensor, "other_batch other_pos"],
    component: Component | str,
    *,
    metric: BehaviourMetric,
    positions: Sequence[int] | None = None,
) -> Recovery:
    """Run `corrupt` with one activation of the clean run.

    Args:
        model: to intervene on
        clean: tokens with the behaviour
        corrupt: tokens of the same shape without it
        component: hook name, or some units of it
        metric: (logits, tokens) to one number per example; it is given the clean tokens in every
            run, so that all runs are scored on the same targets
        positions: query positions to patch; default all
    """
    component = Component(component) if isinstance(component, str) else component
    _check_pair(clean, corrupt)
    n_pos, given = clean.shape[1], [0] if positions is None else list(positions)
    if not given or not set(given) <= set(range(-n_pos, n_pos)):
        raise ValueError(f"positions must be some of {-n_pos}..{n_pos - 1}, got {given}")
    with torch.no_grad():
        _, cache = model.run_with_cache(clean, names_filter=component.name)
    stored = cache[component.name]
    other = stored.roll(1, 0)

    def run(tokens: Tensor, hooks: Hooks) -> Tensor:
        return measure_with(model, tokens, hooks, lambda logits, _: metric(logits, clean))

    return Recovery(
        f"{component.name} {component.units or 'all'}",
        run(clean, []),
        run(corrupt, []),
        run(corrupt, [(component.name, _insert(component, stored, positions))]),
        run(corrupt, [(component.name, _insert(component, other, positions))]),
    )


@explained
def patch_path(
    model: HookedModel,
    clean: Int[Tensor, "batch pos"],
    corrupt: Int[Tensor, "other_batch other_pos"],
    sender: Component | str,
    receiver: Component | str,
    *,
    metric: BehaviourMetric,
) -> Recovery:
    """Restrict a patch to what `sender` tells `receiver`, as from a convolution to the keys.

    The receiver's activation is taken from a corrupt run in which the sender is clean, and is then
    the only thing changed in another corrupt run. Arguments as in `patch_activation`.
    """
    sender = Component(sender) if isinstance(sender, str) else sender
    receiver = Component(receiver) if isinstance(receiver, str) else receiver
    _check_pair(clean, corrupt)

    def through(stored: Tensor) -> Tensor:
        with model.hooks([(sender.name, _insert(sender, stored, None))]):
            _, cache = model.run_with_cache(corrupt, names_filter=receiver.name)
        return cache[receiver.name]

    def run(tokens: Tensor, hooks: Hooks) -> Tensor:
        return measure_with(model, tokens, hooks, lambda logits, _: metric(logits, clean))

    with torch.no_grad():
        _, cache = model.run_with_cache(clean, names_filter=sender.name)
        told, control = through(cache[sender.name]), through(cache[sender.name].roll(1, 0))
    return Recovery(
        f"{sender.name} -> {receiver.name}",
        run(clean, []),
        run(corrupt, []),
        run(corrupt, [(receiver.name, _insert(receiver, told, None))]),
        run(corrupt, [(receiver.name, _insert(receiver, control, None))]),
    )


@explained
def attribution(
    model: HookedModel,
    clean: Int[Tensor, "batch pos"],
    corrupt: Int[Tensor, "other_batch other_pos"],
    names: Sequence[str],
    *,
    metric: BehaviourMetric,
) -> dict[str, Float[Tensor, " batch"]]:
    """First-order estimate of each patch, (a_clean - a_corrupt) · ∂metric/∂a, per example.

    Args:
        model: to measure
        clean: tokens with the behaviour
        corrupt: tokens without it
        names: hooks to attribute to
        metric: differentiable, such as a logit difference; given the clean tokens

    Source:
        Nanda 2023, attribution patching
    """
    _check_pair(clean, corrupt)
    with torch.no_grad():
        _, cache = model.run_with_cache(clean, names_filter=list(names))
    kept: dict[str, Tensor] = {}

    def keep(value: Tensor, hook) -> Tensor:
        value = value if value.requires_grad else value.requires_grad_()
        kept[hook.name] = value
        return value

    with torch.enable_grad():
        logits = model.run_with_hooks(corrupt, fwd_hooks=[(name, keep) for name in names])
        grads = torch.autograd.grad(metric(logits, clean).sum(), [kept[name] for name in names])
    return {
        name: ((cache[name] - kept[name].detach()) * grad).flatten(1).sum(1)
        for name, grad in zip(names, grads, strict=True)
    }


def _insert(component: Component, stored: Tensor, positions: Sequence[int] | None) -> Callable:
    """A hook that puts units (and positions) of `stored` in the place of what passes."""

    def insert(value: Tensor, hook) -> Tensor:
        chosen = torch.zeros(value.shape, dtype=torch.bool)
        units = range(value.shape[component.axis]) if component.units is None else component.units
        chosen.index_fill_(component.axis % value.ndim, torch.tensor(list(units)), True)
        if positions is not None:
            place = 2 if component.axis == 1 else 1
            here = torch.zeros(value.shape[place], dtype=torch.bool)
            here[torch.tensor(list(positions))] = True
            chosen &= here.view([-1 if axis == place else 1 for axis in range(value.ndim)])
        return torch.where(chosen, stored, value)

    return insert


def _check_pair(clean: Tensor, corrupt: Tensor) -> None:
    if clean.shape != corrupt.shape:
        raise ValueError(
            f"clean {list(clean.shape)} and corrupt {list(corrupt.shape)} tokens must have one "
            "shape: each position is patched from the same position"
        )
