"""Discretisations of a diagonal state-space model: from (delta, A, B) to (A_bar, B_bar).

Contains the rules `mamba`, `zoh`, `bilinear` and `bilinear-clamped`, each as plain differentiable
factors and as the in-place pair (value, derivative) that the blocked scan runs on its buffers. All
are functions of z = delta·A: A_bar = α(z) and B_bar = delta·φ(z)·B. Leaves out the recurrence
(`scan`), and complex A.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from contextlib import AbstractContextManager, nullcontext
from difflib import get_close_matches
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

SERIES_RADIUS = 0.25  # |z| below which the moments are summed as a power series
SERIES_TERMS = {torch.float32: 6, torch.float64: 12}  # truncation below one rounding at the radius
SMALLEST_STEP = 1e-18  # moves delta and -A off 0 and nothing else; its square is a normal float32


class Rule(ABC):
    """One discretisation: α and φ, such that A_bar = α(z), gain = delta·φ(z), z = delta·A."""

    name: ClassVar[str]
    constant_phi: ClassVar[bool] = False
    """True if φ = 1: the gain is delta itself, without a state axis."""

    @abstractmethod
    def factors(
        self, delta: Float[Tensor, "..."], A: Float[Tensor, "..."]
    ) -> tuple[Float[Tensor, "..."], Float[Tensor, "..."]]:
        """A_bar and the gain, differentiable to any order; all shapes broadcast."""

    @abstractmethod
    def fill(
        self,
        delta: Float[Tensor, "..."],
        A: Float[Tensor, "..."],
        decay: Float[Tensor, "..."],
        phi: Float[Tensor, "..."],
    ) -> None:
        """Write α(delta·A) into `decay` and φ(delta·A) into `phi` (untouched if it is constant)."""

    @abstractmethod
    def pull(
        self,
        d_decay: Float[Tensor, "..."],
        d_phi: Float[Tensor, "..."],
        delta: Float[Tensor, "..."],
        A: Float[Tensor, "..."],
        decay: Float[Tensor, "..."],
        phi: Float[Tensor, "..."],
    ) -> Float[Tensor, "..."]:
        """Gradient of z, d_decay·α'(z) + d_phi·φ'(z), in the memory of `d_decay`.

        `decay` and `phi` are what `fill` wrote; they and `d_phi` may be overwritten.
        """


class _Mamba(Rule):
    """A_bar = exp(z), gain = delta: exact decay, Euler's step for the input, as in Mamba."""

    name = "mamba"
    constant_phi = True

    def factors(self, delta, A):
        return torch.exp(delta * A), delta

    def fill(self, delta, A, decay, phi):
        torch.mul(delta, A * math.log2(math.e), out=decay).exp2_()  # exp2 is 2-5 times faster

    def pull(self, d_decay, d_phi, delta, A, decay, phi):
        return d_decay.mul_(decay)


class _ZeroOrderHold(Rule):
    """A_bar = exp(z), gain = delta·(exp(z) - 1)/z: exact for an input held during the step."""

    name = "zoh"

    def factors(self, delta, A):
        z = delta * A
        return torch.exp(z), delta * _Moment.apply(z, 0)

    def fill(self, delta, A, decay, phi):
        z = torch.mul(delta + SMALLEST_STEP, A - SMALLEST_STEP, out=phi)  # never 0
        torch.expm1(z, out=decay)
        torch.div(decay, z, out=phi)  # 1 where delta·A is 0
        decay.add_(1)

    def pull(self, d_decay, d_phi, delta, A, decay, phi):
        d_decay.mul_(decay)
        z = (delta + SMALLEST_STEP) * (A - SMALLEST_STEP)
        slope = torch.sub(decay, phi, out=phi).div_(z)
        clamped = torch.clamp(z, -SERIES_RADIUS, SERIES_RADIUS, out=decay)
        near = torch.eq(z, clamped, out=z)
        return d_decay.addcmul_(d_phi, slope.lerp_(_series(clamped, 1), near))


class _Bilinear(Rule):
    """A_bar = (1 + z/2)/(1 - z/2), gain = delta/(1 - z/2): Tustin's rule, as in S4.

    With r = 1/(1 - z/2): A_bar = 1 + z·r, below 0 for delta·|A| > 2; α' = r², φ' = r²/2. Written
    as 2r - 1, A_bar would carry twice the rounding of r through a long memory.
    """

    name = "bilinear"

    def factors(self, delta, A):
        z = delta * A
        phi = torch.reciprocal(1 - z / 2)
        return 1 + z * phi, delta * phi

    def fill(self, delta, A, decay, phi):
        z = torch.mul(delta, A, out=decay)
        torch.mul(z, -0.5, out=phi).add_(1).reciprocal_()
        torch.addcmul(z.new_ones(()), z, phi, out=decay)

    def pull(self, d_decay, d_phi, delta, A, decay, phi):
        return d_decay.add_(d_phi, alpha=0.5).mul_(phi.square_())


class _ClampedBilinear(_Bilinear):
    """`bilinear` with max(A_bar, 0): no oscillation, and no gradient to A_bar where it is cut off.

    To tell apart what negative decays do for a model from what the rest of the rule does. The gain
    is that of `bilinear`; for delta·|A| > 2 a constant input is then no longer kept at its level.
    """

    name = "bilinear-clamped"

    def factors(self, delta, A):
        A_bar, gain = super().factors(delta, A)
        return torch.relu(A_bar), gain

    def fill(self, delta, A, decay, phi):
        super().fill(delta, A, decay, phi)
        decay.relu_()

    def pull(self, d_decay, d_phi, delta, A, decay, phi):
        return super().pull(d_decay.mul_(decay > 0), d_phi, delta, A, decay, phi)


RULES: dict[str, Rule] = {
    rule.name: rule for rule in (_Mamba(), _ZeroOrderHold(), _Bilinear(), _ClampedBilinear())
}


def rule_named(name: str) -> Rule:
    """The discretisation rule of that name.

    Raises:
        ValueError: if there is none; the message names the nearest one and lists all
    """
    if name in RULES:
        return RULES[name]
    nearest = get_close_matches(name, RULES, n=1, cutoff=0)
    raise ValueError(f"no discretisation rule {name!r}; nearest: {nearest}; rules: {list(RULES)}")


def discretize(
    delta: Float[Tensor, "*rows channel"],
    A: Float[Tensor, "channel d_decay"],
    B: Float[Tensor, "*rows d_state"],
    rule: str = "mamba",
) -> tuple[Float[Tensor, "*rows channel d_decay"], Float[Tensor, "*rows channel d_state"]]:
    r"""The discrete pair (A_bar, B_bar) of h_t = A_bar_t · h_{t-1} + B_bar_t · u_t.

    With z = delta·A and r = 1/(1 - z/2):

    | rule | A_bar | B_bar |
    |---|---|---|
    | `mamba` | exp(z) | delta·B |
    | `zoh` | exp(z) | (exp(z) - 1)/A·B |
    | `bilinear` | (1 + z/2)·r | delta·r·B |
    | `bilinear-clamped` | max((1 + z/2)·r, 0) | delta·r·B |

    delta = 0 gives A_bar = 1 and B_bar = 0 under each rule: the step is skipped. A = 0 is the plain
    sum, A_bar = 1 and B_bar = delta·B. Under `bilinear` A_bar is negative where delta·|A| > 2
    (`negative_share` counts them), so nothing may take its logarithm.

    Args:
        delta: step sizes, at least 0
        A: continuous-time decay rates, negative; d_decay is d_state, or 1 if all states of a
            channel share one rate, and then A_bar keeps that axis at size 1
        B: input weights
        rule: `mamba`, `zoh`, `bilinear` or `bilinear-clamped`

    Returns:
        A_bar and B_bar, in float32 or wider

    Raises:
        ValueError: if there is no such rule

    Source:
        Gu & Dao 2023, "Mamba", section 2 and the released code; Gu et al. 2022, "S4", section 2

    Example:
        >>> delta, A, B = torch.tensor([[0.7]]), torch.tensor([[-1.0]]), torch.tensor([[1.0]])
        >>> [round(float(factor), 6) for factor in discretize(delta, A, B, "zoh")]
        [0.496585, 0.503415]
    """
    delta, A, B = at_least_float32(delta, A, B)
    A_bar, gain = rule_named(rule).factors(delta.unsqueeze(-1), A)
    return A_bar, gain * B.unsqueeze(-2)


def negative_share(
    delta: Float[Tensor, "batch pos channel"],
    A: Float[Tensor, "channel d_state"],
    rule: str = "mamba",
) -> Float[Tensor, " channel"]:
    """Share of the entries of A_bar that are negative, per channel: where the state oscillates.

    The share of delta·|A| > 2 under `bilinear`, 0 under the other rules. Memory as `delta`.

    Raises:
        ValueError: if there is no such rule
    """
    chosen = rule_named(rule)
    delta, A = at_least_float32(delta, A)
    columns = [chosen.factors(delta, column)[0] < 0 for column in A.unbind(1)]
    return torch.stack([negative.to(delta.dtype).mean((0, 1)) for negative in columns]).mean(0)


def at_least_float32(*tensors: Float[Tensor, "..."]) -> tuple[Float[Tensor, "..."], ...]:
    """The tensors in their common dtype, float32 or wider: products of decays need the digits."""
    dtype = torch.float32
    for tensor in tensors:
        if tensor.dtype != dtype:
            dtype = torch.promote_types(dtype, tensor.dtype)
    return tuple(t if t.dtype == dtype else t.to(dtype) for t in tensors)


def without_autocast(device: torch.device) -> AbstractContextManager:
    """A context in which nothing is cast down; free where nothing would be."""
    on = device.type != "meta" and torch.is_autocast_enabled(device.type)
    return torch.autocast(device.type, enabled=False) if on else nullcontext()


class _Moment(torch.autograd.Function):
    """m_k(z) = ∫₀¹ s^k exp(z·s) ds: φ of `zoh` is m_0, and the derivative of m_k is m_{k+1}."""

    @staticmethod
    def forward(z: Tensor, order: int) -> Tensor:
        return _moment(z, order)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, int], output: Tensor) -> None:
        z, ctx.order = inputs
        ctx.save_for_backward(z)
        ctx.save_for_forward(z)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (z,) = ctx.saved_tensors
        return grads[0] * _Moment.apply(z, ctx.order + 1), None

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Tensor:
        (z,) = ctx.saved_tensors
        return tangents[0] * _Moment.apply(z, ctx.order + 1)

    @staticmethod
    def vmap(info: Any, in_dims: Any, *inputs: Any) -> tuple[Tensor, int]:
        return _Moment.apply(*inputs), in_dims[0]  # element by element


def _moment(z: Float[Tensor, "*shape"], order: int) -> Float[Tensor, "*shape"]:
    """m_k(z): m_0 = expm1(z)/z, m_k = (exp(z) - k·m_{k-1})/z, but the series where they cancel.

    The two are mixed by a mask of 0 and 1: over a large tensor of both cases, `torch.where` costs
    ten times as much.
    """
    clamped = z.clamp(-SERIES_RADIUS, SERIES_RADIUS)
    near = (z == clamped).to(z.dtype)
    far = z + near  # nowhere 0
    moment = torch.expm1(far).div_(far)
    for k in range(1, order + 1):
        moment = torch.exp(far).sub_(moment, alpha=k).div_(far)
    del far
    return moment.lerp_(_series(clamped, order), near)


def _series(z: Float[Tensor, "*shape"], order: int) -> Float[Tensor, "*shape"]:
    """m_k(z) = Σ_j z^j / (j!·(j + k + 1)), to the last digit for |z| <= `SERIES_RADIUS`."""
    last = SERIES_TERMS[z.dtype] - 1
    coefficients = [1 / (math.factorial(j) * (j + order + 1)) for j in range(last + 1)]
    total = torch.full_like(z, coefficients[last])
    for coefficient in reversed(coefficients[:last]):
        torch.addcmul(z.new_tensor(coefficient), total, z, out=total)
    return total
