"""How models are run here: in eval mode, without gradients, with hooks, scored example by example.

Contains what every experiment of `causal` shares. Leaves out what is taken out or put in.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from smearlens._explain import describe
from smearlens._files import nearest
from smearlens._hooks import HookedRootModule
from smearlens.analysis.behaviour import induction_accuracy

Target = TypeVar("Target", bound=Callable[..., Any])
Hooks = list[tuple[str | Callable, Callable]]
BehaviourMetric = Callable[[Tensor, Tensor], Tensor]  # (logits, tokens) -> one number per example


def observed(function: Target) -> Target:
    """Have `function(model, ...)` find the model in eval mode, and no gradients recorded.

    Whatever happens, each module is then in the mode it was in: some may be frozen.
    """

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        model = args[0] if args else kwargs.get("model")
        if not isinstance(model, nn.Module):
            return function(*args, **kwargs)  # which says what it needs
        modes = [(module, module.training) for module in model.modules()]
        try:
            model.eval()
            with torch.no_grad():
                return function(*args, **kwargs)
        finally:
            for module, training in modes:
                module.training = training

    return call  # pyrefly: ignore[bad-return]


@observed
def measure_with(
    model: HookedRootModule,
    tokens: Int[Tensor, "batch pos"],
    hooks: Hooks,
    metric: BehaviourMetric = induction_accuracy,
) -> Float[Tensor, " batch"]:
    """`metric` of the model's logits with `hooks` attached for this one run."""
    return scored(metric, model.run_with_hooks(tokens, fwd_hooks=hooks), tokens)


def scored(metric: BehaviourMetric, logits: Tensor, tokens: Tensor) -> Tensor:
    """What `metric` says of `logits`: one number per example, or a ValueError."""
    found = metric(logits, tokens)
    if not isinstance(found, Tensor) or found.shape != tokens.shape[:1]:
        raise ValueError(
            f"metric must return one number per example, a tensor of shape [{len(tokens)}], got "
            f"{describe(found)}; leave the mean over examples to what is returned"
        )
    return found if found.is_floating_point() else found.double()  # hits or counts have a mean


def activations(
    model: HookedRootModule, tokens: Int[Tensor, "batch pos"], names: Sequence[str]
) -> dict[str, Tensor]:
    """Activations of a run on `tokens` by hook name, in the order of computation."""
    for name in names:
        if name not in model.hook_dict:
            raise ValueError(
                f"no hook {name!r} in {type(model).__name__}; "
                f"nearest: {nearest(name, model.hook_dict)}"
            )
    _, cache = model.run_with_cache(tokens, names_filter=list(dict.fromkeys(names)))
    found = dict(cache.items())
    if silent := [name for name in names if name not in found]:
        raise ValueError(f"nothing passed the hooks {silent} of this {type(model).__name__}")
    return found


def replace_with(value: Tensor) -> Callable:
    """A hook that puts `value` in the place of whatever passes."""
    return lambda _, hook: value
