"""The steps of a recurrence, A_bar and B_bar, asked for by position or by how far they reach.

Contains steps as cached and steps still to be discretised, which need no [batch pos channel
d_state] tensor. Leaves out what is made of them: `state_space`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import cached_property

import torch
from torch import Tensor


class PairSteps:
    """Steps as cached: A_bar, B_bar."""

    def __init__(self, A_bar: Tensor, B_bar: Tensor):
        self.A_bar, self.B_bar, self.shape = A_bar, B_bar, B_bar.shape

    def channels(self, chosen: slice) -> PairSteps:
        """Those of these channels."""
        return PairSteps(self.A_bar[:, :, chosen], self.B_bar[:, :, chosen])

    def at(self, positions: slice) -> tuple[Tensor, Tensor]:
        """A_bar and B_bar there, [batch pos channel d_state]."""
        return self.A_bar[:, positions], self.B_bar[:, positions]

    def windows(self, lag: int) -> Iterator[tuple[Tensor, Tensor]]:
        """State by state: the decay over the `lag` steps that end at each i >= lag, and B_bar."""
        for a, b in zip(
            self.A_bar.expand_as(self.B_bar).unbind(3), self.B_bar.unbind(3), strict=True
        ):
            yield _window_products(a, lag), b


class DeltaSteps:
    """Steps still to be discretised: delta, A, B and the rule."""

    def __init__(self, delta: Tensor, A: Tensor, B: Tensor, rule: str):
        if rule not in FACTORS:
            raise ValueError(f"rule must be one of {list(FACTORS)}, got {rule!r}")
        self.delta, self.A, self.B, self.rule = delta, A, B, rule
        self.shape = (*delta.shape, B.shape[-1])

    @cached_property
    def elapsed(self) -> Tensor:
        """Sum of delta up to each position; in float32, late spans would lose their digits."""
        return self.delta.double().cumsum(1)

    def channels(self, chosen: slice) -> DeltaSteps:
        """Those of these channels."""
        return DeltaSteps(self.delta[:, :, chosen], self.A[chosen], self.B, self.rule)

    def at(self, positions: slice) -> tuple[Tensor, Tensor]:
        """A_bar and B_bar there, [batch pos channel d_state]."""
        A_bar, gain = FACTORS[self.rule](self.delta[:, positions, :, None], self.A)
        return A_bar, gain * self.B[:, positions, None]

    def windows(self, lag: int) -> Iterator[tuple[Tensor, Tensor]]:
        """As `PairSteps.windows`; where A_bar = exp(delta·A), from the time that has passed."""
        passed = self.elapsed[:, lag:] - self.elapsed[:, : self.shape[1] - lag]
        passed = (passed * math.log2(math.e)).to(self.delta.dtype)
        for A, B in zip(self.A.expand(-1, self.shape[3]).unbind(1), self.B.unbind(2), strict=True):
            A_bar, gain = FACTORS[self.rule](self.delta, A)
            products = self.rule not in ("mamba", "zoh")
            decay = _window_products(A_bar, lag) if products else torch.exp2(passed * A)
            yield decay, gain * B.unsqueeze(-1)


def _bilinear(delta: Tensor, A: Tensor) -> tuple[Tensor, Tensor]:
    phi = 1 / (1 - delta * A / 2)
    return 1 + delta * A * phi, delta * phi


def _clamped_bilinear(delta: Tensor, A: Tensor) -> tuple[Tensor, Tensor]:
    A_bar, gain = _bilinear(delta, A)
    return A_bar.relu(), gain


def _zero_order_hold(delta: Tensor, A: Tensor) -> tuple[Tensor, Tensor]:
    z = delta * A
    return z.exp(), torch.where(z == 0, delta, delta * torch.expm1(z) / torch.where(z == 0, 1, z))


FACTORS: dict[str, Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]] = {  # A_bar and B_bar / B
    "mamba": lambda delta, A: (torch.exp(delta * A), delta),
    "zoh": _zero_order_hold,
    "bilinear": _bilinear,
    "bilinear-clamped": _clamped_bilinear,
}


def _window_products(a: Tensor, length: int) -> Tensor:
    """Products over the `length` entries of axis 1 that end at each index >= `length`."""
    size = a.shape[1]
    product = torch.ones_like(a[:, : size - length])  # from entry i+1 on, for each i
    power, covered = a[:, 1:], 0  # power: products of 2^k neighbours, by where they begin
    for k in range(length.bit_length()):
        if length >> k & 1:
            product = product * power[:, covered : covered + size - length]
            covered += 2**k
        if length >> (k + 1):
            power = power[:, : -(2**k)] * power[:, 2**k :]
    return product
