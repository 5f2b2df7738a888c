"""Does a model read the future? By changed later tokens, by gradients, and by ln V as a floor.

Leaves out padding and baselines, and the summary of it all (`causal.audit`).
"""

from __future__ import annotations

import copy
import inspect
import math
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from smearlens.analysis.behaviour import per_token_loss
from smearlens.causal.running import observed
from smearlens.data.synthetic import iid_tokens
from smearlens.models.base import HookedModel

ROUNDING = 1e-5  # nats: a model that says the same everywhere has error 0, and its loss rounds


@dataclass(frozen=True)
class FutureRead:
    """Whether tokens after position t change what the model says at or before t.

    Attributes:
        influence: largest change of a logit at a position <= t, per cut t [cut]; infinite where one
            of two logits is not finite, and what is NaN in both counts as equal
        cuts: the positions t
        jacobian: largest |∂ (w · logits[t]) / ∂ embedding[s]| over s > t at the cuts tried; w is a
            fixed random direction, since the logits of many models sum to a constant
        tolerance: what counts as a change
        first_leak: the first hook, in the order of computation, that depends on later tokens; None
            if no change of tokens shows a leak
        finite: whether all logits were finite, and the gradient
    """

    influence: list[float]
    cuts: list[int]
    jacobian: float
    tolerance: float | int
    first_leak: str | None
    finite: bool = True

    @property
    def leaks(self) -> bool:
        """Whether the influence at any cut, or the gradient, is above the tolerance."""
        return any(size > self.tolerance for size in (*self.influence, self.jacobian))


@dataclass(frozen=True)
class IidFloor:
    """Loss on independent uniform tokens, which no causal model gets below ln V; nats.

    Attributes:
        floor: ln V
        loss: mean loss of the model as it is
        error: its standard error
        trained_loss: loss on fresh tokens after training a copy on such tokens; None if not asked
        trained_error: its standard error
        steps: of that training
    """

    floor: float
    loss: float
    error: float
    trained_loss: float | None = None
    trained_error: float | None = None
    steps: int = 0

    @property
    def broken(self) -> bool:
        """Whether either loss lies more than three standard errors below the floor."""
        floor = self.floor - ROUNDING
        plain = self.loss < floor - 3 * self.error
        if self.trained_loss is None or self.trained_error is None:
            return plain
        return plain or self.trained_loss < floor - 3 * self.trained_error


@observed
def reads_future(
    model: HookedModel,
    tokens: Int[Tensor, "batch pos"],
    *,
    tolerance: float | int = 1e-4,
    generator: torch.Generator,
) -> FutureRead:
    """Change all tokens after t, for every t, and look at what changes at or before t."""
    batch, length = tokens.shape
    logits = model(tokens)
    if (noise := largest_change(model(tokens), logits)) > tolerance:
        raise ValueError(
            f"two runs of this {type(model).__name__} on the same tokens differ by {noise:.2g}, so "
            "that nothing can be told from what changes with later tokens: give F.dropout "
            "training=self.training, and keep no state between calls"
        )
    influence, cuts, finite = [], list(range(length - 1)), bool(logits.isfinite().all())
    other = iid_tokens(batch, length, model.config.d_vocab, generator=generator)
    if torch.equal(other, tokens):  # drawn by a generator of the same seed
        other = iid_tokens(batch, length, model.config.d_vocab, generator=generator)
    for cut in cuts:
        changed = torch.cat((tokens[:, : cut + 1], other[:, cut + 1 :]), dim=1)
        said = model(changed)[:, : cut + 1]
        influence.append(largest_change(said, logits[:, : cut + 1]))
        finite = finite and bool(said.isfinite().all())
    worst = max(cuts, key=lambda cut: influence[cut])
    changed = torch.cat((tokens[:, : worst + 1], other[:, worst + 1 :]), dim=1)
    leaks, first = influence[worst] > tolerance, None
    if leaks:
        first = _first_leak(model, tokens, changed, worst, tolerance / 100)
    jacobian = _jacobian(model, tokens)
    finite = finite and math.isfinite(jacobian)
    return FutureRead(influence, cuts, jacobian, tolerance, first, finite)


def largest_change(one: Tensor, other: Tensor) -> float:
    """Largest |one - other|: no change where both are NaN or infinite alike, else an infinite."""
    same = (one == other) | (one.isnan() & other.isnan())
    change = (one - other).abs()
    return float(change.masked_fill(change.isnan(), torch.inf).masked_fill(same, 0).max())


@observed
def iid_floor(
    model: HookedModel, length: int, *, steps: int = 0, generator: torch.Generator
) -> IidFloor:
    """Loss on independent uniform tokens, before and (on a copy) after training on such tokens."""
    d_vocab = model.config.d_vocab
    loss, error = _iid_loss(model, length, generator)
    if steps == 0:
        return IidFloor(math.log(d_vocab), loss, error)
    trained = copy.deepcopy(model).train()
    trained.reset_hooks(including_permanent=True)
    trained.requires_grad_(True)  # all of it, whatever is frozen in the model
    optimizer = torch.optim.Adam(trained.parameters(), lr=3e-3)
    with torch.random.fork_rng(), torch.enable_grad():
        of_dropout = torch.Generator().manual_seed(generator.initial_seed())
        torch.set_rng_state(of_dropout.get_state())
        for _ in range(steps):
            tokens = iid_tokens(32, length, d_vocab, generator=generator)
            optimizer.zero_grad()
            trained(tokens, return_type="loss").backward()
            optimizer.step()
    after = _iid_loss(trained.eval(), length, generator)
    return IidFloor(math.log(d_vocab), loss, error, *after, steps)


def _first_leak(
    model: HookedModel, tokens: Tensor, changed: Tensor, cut: int, rounding: float
) -> str | None:
    """The first hook whose activation at queries <= cut differs between the two inputs."""
    _, one = model.run_with_cache(tokens)
    _, other = model.run_with_cache(changed)
    length = tokens.shape[1]
    for name in one.keys():  # noqa: SIM118 - an ActivationCache iterates over tensors
        axis = 2 if name.endswith(("hook_pattern", "hook_attn_scores")) else 1
        a, b = one[name], other[name]
        if a.ndim < 3 or a.shape[axis] != length:
            continue
        a, b = (t.narrow(axis, 0, cut + 1) for t in (a, b))
        if axis == 2:  # keys after the cut belong to changed tokens even in a causal layer
            a, b = a.tril(), b.tril()
        if largest_change(a, b) > rounding:
            return name
    return None


def _jacobian(model: HookedModel, tokens: Tensor) -> float:
    """Largest |∂ (w · logits[t]) / ∂ embedding[s]|, s > t, over a handful of positions t."""
    kept: list[Tensor] = []

    def leaf(value: Tensor, hook: Any) -> Tensor:
        kept.append(value.detach().requires_grad_())
        return kept[0]

    length = tokens.shape[1]
    with torch.inference_mode(False), torch.enable_grad():
        tokens = tokens.clone()  # made in inference mode it could not be saved for backward
        embed = [name for name in model.hook_dict if name.endswith("hook_embed")][-1]  # decoder's
        logits = model.run_with_hooks(tokens[:2], fwd_hooks=[(embed, leaf)])
        if not kept:
            raise ValueError(f"the embedding of this {type(model).__name__} must pass {embed!r}")
        if not logits.requires_grad:
            return 0.0
        direction = torch.randn(logits.shape[-1], generator=torch.Generator().manual_seed(0))
        mixed, largest = logits @ direction.to(logits), []
        for cut in sorted({0, length // 4, length // 2, length - 2}):
            (grad,) = torch.autograd.grad(
                mixed[:, cut].sum(), kept, retain_graph=True, materialize_grads=True
            )
            largest.append(grad[:, cut + 1 :].abs().max())
    return float(torch.stack(largest).max())  # NaN if any is


def takes(model: HookedModel, **options: Any) -> bool:
    """Whether the forward pass of `model` knows these arguments beside the tokens."""
    try:
        inspect.signature(model.forward).bind(None, **options)
    except TypeError:
        return False
    return True


@observed
def streaming_gap(model: HookedModel, tokens: Tensor) -> float | None:
    """Largest difference between logits token by token and in one run; None if impossible.

    Impossible: `forward` takes no `state`, puts nothing into it, or raises a ValueError, as layers
    do that read ahead.
    """
    state: dict[str, Tensor] = {}
    if not takes(model, state=state):
        return None
    try:
        pieces = [model(tokens[:, i : i + 1], state=state) for i in range(tokens.shape[1])]
    except (ValueError, TypeError) as error:  # **kwargs handed to one that has no `state`
        if isinstance(error, TypeError) and "'state'" not in str(error):
            raise
        return None
    return largest_change(torch.cat(pieces, dim=1), model(tokens)) if state else None


@torch.no_grad()
def _iid_loss(model: HookedModel, length: int, generator: torch.Generator) -> tuple[float, float]:
    """Mean loss per target on fresh independent tokens, and its standard error over examples."""
    tokens = iid_tokens(256, length, model.config.d_vocab, generator=generator)
    losses = per_token_loss(model(tokens), tokens).double().mean(1)
    return float(losses.mean()), float(losses.std() / len(losses) ** 0.5)
