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
from smearlens._hooks import HookedRootModule
from smearlens.analysis.stats import bootstrap_interval
from smearlens.causal.component import Component, as_component
from smearlens.causal.running import BehaviourMetric, activations, measure_with, observed, scored

RUNS = ("clean", "corrupt", "patched")


@dataclass(frozen=True)
class Recovery:
    """How much of a behaviour one patched activation brings back.

    Attributes:
        name: what was patched
        clean, corrupt, patched: metric per example [batch]
        control: metric with the activation of another clean example [batch]; NaN of a single pair
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
        if not self.defined or not self.patched.isfinite().all():
            return torch.nan, torch.nan
        gap = float((self.clean - self.corrupt).mean())
        ends = bootstrap_interval((self.patched - self.corrupt)[:, None], level)[0] / gap
        return float(ends.min()), float(ends.max())  # the gap of a loss is negative

    def _fraction(self, value: Tensor) -> float:
        if not self.defined:
            return torch.nan
        gap = self.clean.double().mean() - self.corrupt.double().mean()
        return float((value.double().mean() - self.corrupt.double().mean()) / gap)

    def __repr__(self) -> str:
        if not self.defined:
            means = (f"{key} {float(getattr(self, key).double().mean()):.3f}" for key in RUNS)
            return f"{self.name}: recovered nan, since {self._reason()} ({', '.join(means)})"
        low, high = self.interval()
        return (
            f"{self.name}: recovered {self.recovered:.3f} [{low:.3f}, {high:.3f}], "
            f"control {self.control_recovered:.3f}"
        )

    def _reason(self) -> str:
        """Why nothing is recovered, of a result that is not `defined`."""
        if len(self.clean) < 2:
            return "a single pair shows no spread: give at least 2"
        if lost := int((~(self.clean - self.corrupt).isfinite()).sum()):
            return f"the metric is not finite for {lost} of {len(self.clean)} pairs"
        return "clean and corrupt differ by no more than twice the standard error"


@explained
@observed
def patch_activation(
    model: HookedRootModule,
    clean: Int[Tensor, "batch pos"],
    corrupt: Int[Tensor, "other_batch other_pos"],
    component: Component | str,
    *,
    metric: BehaviourMetric,
    positions: Sequence[int] | None = None,
) -> Recovery:
    """Run `corrupt` with one activation of the clean run.

    Args:
        model: to intervene on; it runs in eval mode
        clean: tokens with the behaviour
        corrupt: tokens of the same shape without it
        component: hook name, or some units of it
        metric: (logits, tokens) to one number per example; it is given the clean tokens in every
            run, so that all runs are scored on the same targets
        positions: query positions to patch; default all

    Raises:
        ValueError: for hooks, units or positions that do not exist, for weights (such as
            `hook_kernel`), which both runs share, or a metric that returns anything else
    """
    component = as_component(component)
    _check_pair(clean, corrupt)
    n_pos, given = clean.shape[1], [0] if positions is None else list(positions)
    if not given or not set(given) <= set(range(-n_pos, n_pos)):
        raise ValueError(f"positions must be some of {-n_pos}..{n_pos - 1}, got {given}")
    stored = activations(model, clean, [component.name])[component.name]
    _check_stored(component, stored, len(clean))

    def run(new: Tensor) -> Tensor:
        hook = _insert(component, new, positions)
        return measure_on(model, corrupt, clean, metric, (component.name, hook))

    return Recovery(
        f"{component.name} {component.units or 'all'}",
        measure_on(model, clean, clean, metric),
        measure_on(model, corrupt, clean, metric),
        run(stored),
        of_another(stored, run),
    )


@explained
@observed
def patch_path(
    model: HookedRootModule,
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

    Raises:
        ValueError: as there, and if the receiver is not computed after the sender
    """
    sender, receiver = as_component(sender), as_component(receiver)
    _check_pair(clean, corrupt)
    stored = activations(model, clean, [sender.name, receiver.name])
    for component in (sender, receiver):
        _check_stored(component, stored[component.name], len(clean))
    if [n for n in stored if n in (sender.name, receiver.name)] != [sender.name, receiver.name]:
        raise ValueError(
            f"no path: sender {sender.name!r} must be computed before receiver {receiver.name!r}"
        )

    def run(new: Tensor) -> Tensor:
        with model.hooks([(sender.name, _insert(sender, new, None))]):
            told = activations(model, corrupt, [receiver.name])[receiver.name]
        hook = _insert(receiver, told, None)
        return measure_on(model, corrupt, clean, metric, (receiver.name, hook))

    return Recovery(
        f"{sender.name} -> {receiver.name}",
        measure_on(model, clean, clean, metric),
        measure_on(model, corrupt, clean, metric),
        run(stored[sender.name]),
        of_another(stored[sender.name], run),
    )


@explained
@observed
def attribution(
    model: HookedRootModule,
    clean: Int[Tensor, "batch pos"],
    corrupt: Int[Tensor, "other_batch other_pos"],
    names: str | Sequence[str],
    *,
    metric: BehaviourMetric,
) -> dict[str, Float[Tensor, " batch"]]:
    """First-order estimate of each patch, (a_clean - a_corrupt) · ∂metric/∂a, per example.

    Args:
        model: to measure; it runs in eval mode
        clean: tokens with the behaviour
        corrupt: tokens without it
        names: hooks to attribute to, one or several
        metric: differentiable, one number per example, such as a logit difference or
            `induction_loss`; given the clean tokens

    Raises:
        ValueError: for hooks that do not exist or are weights, or a metric that returns anything
            else than one number per example, or has no gradient

    Source:
        Nanda 2023, attribution patching
    """
    names = [names] if isinstance(names, str) else list(names)
    if not names:
        raise ValueError("names must hold at least one hook, got []")
    _check_pair(clean, corrupt)
    stored = activations(model, clean, names)
    for name in names:
        _check_stored(Component(name), stored[name], len(clean))
    kept: dict[str, Tensor] = {}

    def keep_as(name: str) -> Callable:  # a bridge has several names for one hook
        def keep(value: Tensor, hook) -> Tensor:
            value = value if value.requires_grad else value.requires_grad_()
            kept[name] = value
            return value

        return keep

    with torch.enable_grad():
        logits = model.run_with_hooks(corrupt, fwd_hooks=[(n, keep_as(n)) for n in names])
        score = scored(metric, logits, clean)
        if not score.requires_grad:
            raise ValueError(
                "metric must be differentiable, such as a logit difference or induction_loss; "
                "the gradient of what it returned is lost, as by argmax or detach"
            )
        grads = torch.autograd.grad(
            score.sum(), [kept[name] for name in names], materialize_grads=True
        )
    return {
        name: (_change(kept[name].detach(), stored[name]) * grad).flatten(1).sum(1)
        for name, grad in zip(names, grads, strict=True)
    }


def _change(old: Tensor, new: Tensor) -> Tensor:
    """The difference; 0 where both are alike, as the scores of hidden keys, -inf, are."""
    return torch.where(new == old, 0, new - old)


def measure_on(
    model: HookedRootModule,
    tokens: Tensor,
    targets: Tensor,
    metric: BehaviourMetric,
    *hooks: tuple[str, Callable],
) -> Tensor:
    """`metric` of a run on `tokens` with `hooks`, scored as if `targets` had been read."""
    return measure_with(model, tokens, list(hooks), lambda logits, _: metric(logits, targets))


def of_another(stored: Tensor, run: Callable[[Tensor], Tensor]) -> Tensor:
    """The control: `run` with what is stored of the example before; NaN if there is but one."""
    return run(stored.roll(1, 0)) if len(stored) > 1 else torch.full((1,), torch.nan)


def _insert(component: Component, stored: Tensor, positions: Sequence[int] | None) -> Callable:
    """A hook that puts units (and positions) of `stored` in the place of what passes."""

    def insert(value: Tensor, hook) -> Tensor:
        chosen = torch.ones_like(value, dtype=torch.bool)
        if component.units is not None:
            chosen &= _mask(value, component.unit_axis(value), component.units)
        if positions is not None:
            chosen &= _mask(value, component.pos_axis(value, "positions"), positions)
        return torch.where(chosen, stored, value)

    return insert


def _mask(value: Tensor, axis: int, index: Sequence[int]) -> Tensor:
    """True at `index` of one axis of `value`, with size 1 in the others."""
    here = torch.zeros(value.shape[axis], dtype=torch.bool, device=value.device)
    here[torch.tensor(list(index))] = True
    return here.view([-1 if other == axis else 1 for other in range(value.ndim)])


def _check_pair(clean: Tensor, corrupt: Tensor) -> None:
    if clean.shape != corrupt.shape:
        raise ValueError(
            f"clean {list(clean.shape)} and corrupt {list(corrupt.shape)} tokens must have one "
            "shape: each position is patched from the same position"
        )


def _check_stored(component: Component, stored: Tensor, batch: int) -> None:
    component.check_examples(stored, batch, "a patch")
    component.check_units(stored)
