"""Does a model read the future? By changed later tokens, by gradients, and by ln V as a floor.

Leaves out padding and baselines, and the summary of it all (`causal.audit`).
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from smearlens.analysis.behaviour import per_token_loss
from smearlens.data.synthetic import iid_tokens
from smearlens.models.base import HookedModel

ROUNDING = 1e-5  # nats: a model that says the same everywhere has error 0, and its loss rounds


@dataclass(frozen=True)
class FutureRead:
    """Whether tokens after position t change what the model says at or before t.

    Attributes:
        influence: largest change of a logit at a position <= t, per cut t [cut]
        cuts: the positions t
        jacobian: largest |∂ (w · logits[t]) / ∂ embedding[s]| over s > t at the cuts tried; w is a
            fixed random direction, since the logits of many models sum to a constant
        tolerance: what counts as a change
        first_leak: the first hook, in the order of computation, that depends on later tokens
    """

    influence: list[float]
    cuts: list[int]
    jacobian: float
    tolerance: float
    first_leak: str | None

    @property
    def leaks(self) -> bool:
        """Whether any cut shows an influence above the tolerance."""
        return max(self.influence) > self.tolerance or self.jacobian > self.tolerance


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


@torch.no_grad()
def reads_future(
    model: HookedModel,
    tokens: Int[Tensor, "batch pos"],
    *,
    tolerance: float = 1e-4,
    generator: torch.Generator,
) -> FutureRead:
    """Change all tokens after t, for every t, and look at what changes at or before t."""
    batch, length = tokens.shape
    logits = model(tokens)
    influence, cuts = [], list(range(length - 1))
    other = iid_tokens(batch, length, model.config.d_vocab, generator=generator)
    for cut in cuts:
        changed = torch.cat((tokens[:, : cut + 1], other[:, cut + 1 :]), dim=1)
        influence.append(float((model(changed)[:, : cut + 1] - logits[:, : cut + 1]).abs().max()))
    worst = max(cuts, key=lambda cut: influence[cut])
    changed = torch.cat((tokens[:, : worst + 1], other[:, worst + 1 :]), dim=1)
    first = _first_leak(model, tokens, changed, worst) if influence[worst] > tolerance else None
    return FutureRead(influence, cuts, _jacobian(model, tokens), tolerance, first)


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
    optimizer = torch.optim.Adam(trained.parameters(), lr=3e-3)
    for _ in range(steps):
        tokens = iid_tokens(32, length, d_vocab, generator=generator)
        optimizer.zero_grad()
        trained(tokens, return_type="loss").backward()
        optimizer.step()
    after = _iid_loss(trained.eval(), length, generator)
    return IidFloor(math.log(d_vocab), loss, error, *after, steps)


def _first_leak(model: HookedModel, tokens: Tensor, changed: Tensor, cut: int) -> str | None:
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
        if float((a - b).nan_to_num().abs().max()) > 1e-6:  # -inf in both is no change
            return name
    return None


def _jacobian(model: HookedModel, tokens: Tensor) -> float:
    """Largest |∂ (w · logits[t]) / ∂ embedding[s]|, s > t, over a handful of positions t."""
    kept: list[Tensor] = []

    def leaf(value: Tensor, hook: Any) -> Tensor:
        kept.append(value.detach().requires_grad_())
        return kept[0]

    length = tokens.shape[1]
    with torch.enable_grad():
        embed = [name for name in model.hook_dict if name.endswith("hook_embed")][-1]  # decoder's
        logits = model.run_with_hooks(tokens[:2], fwd_hooks=[(embed, leaf)])
        direction = torch.randn(logits.shape[-1], generator=torch.Generator().manual_seed(0))
        mixed, largest = logits @ direction.to(logits), 0.0
        for cut in sorted({0, length // 4, length // 2, length - 2}):
            (grad,) = torch.autograd.grad(mixed[:, cut].sum(), kept, retain_graph=True)
            largest = max(largest, float(grad[:, cut + 1 :].abs().max()))
    return largest


def streaming_gap(model: HookedModel, tokens: Tensor) -> float | None:
    """Largest difference between logits token by token and in one run; None if impossible."""
    state: dict[str, Tensor] = {}
    with torch.no_grad():
        try:
            pieces = [model(tokens[:, i : i + 1], state=state) for i in range(tokens.shape[1])]
        except ValueError:
            return None
        return float((torch.cat(pieces, dim=1) - model(tokens)).abs().max())


@torch.no_grad()
def _iid_loss(model: HookedModel, length: int, generator: torch.Generator) -> tuple[float, float]:
    """Mean loss per target on fresh independent tokens, and its standard error over examples."""
    tokens = iid_tokens(256, length, model.config.d_vocab, generator=generator)
    losses = per_token_loss(model(tokens), tokens).double().mean(1)
    return float(losses.mean()), float(losses.std() / len(losses) ** 0.5)
