"""The mixing of a selective state-space layer: its hidden attention.

Contains `SSMMixing`, which hands out rows, diagonals or the dense array. Decays enter as products,
never as exponentials of differences of large sums, so the negative and zero A_bar of the `bilinear`
rule are as exact as any. Leaves out the skip D·u and the gate, which mix no positions, and the
memory of single states (`analysis.states`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import cached_property

import torch
from jaxtyping import Float
from torch import Tensor

from smearlens.analysis.mixing import Mixing

BLOCK = 32  # rows handed out at once


class SSMMixing(Mixing):
    r"""Hidden attention: one signed lower-triangular matrix per example and channel.

    $$M[c, i, j] = \sum_n C_i[n] \Big(\prod_{k=j+1}^{i} \bar A_k[c, n]\Big) \bar B_j[c, n],
    \qquad j \le i$$

    Exact: y_i[c] = Σ_j M[c, i, j] u_j[c], where u is the input after convolution and activation.
    Rows come in blocks, each from the one before in O(rows · pos · d_state) per channel; a diagonal
    costs O(pos · d_state); a row at random O(pos · d_state) more than the next one. No gradient
    flows through it.

    Build with `from_delta`, which holds no [batch pos channel d_state] tensor, or `from_steps`.
    Rows of all channels at once need [batch channel d_state pos] of memory; `channels` takes a few.

    Source:
        Ali, Zimerman & Wolf 2024, "The Hidden Attention of Mamba Models", equation 11
    """

    causal = True
    signed = True

    def __init__(self, steps: _Delta | _Pair, C: Float[Tensor, "batch pos d_state"]):
        self._steps, self._C = steps, C
        self.n_examples, self.n_queries, self.n_heads, self._d_state = steps.shape
        self.n_keys = self.n_queries
        wanted = (self.n_examples, self.n_queries, self._d_state)
        if tuple(C.shape) != wanted:
            raise ValueError(f"C must be [batch pos d_state] = {wanted}, got {tuple(C.shape)}")

    @classmethod
    def from_steps(
        cls,
        A_bar: Float[Tensor, "batch pos channel #d_state"],
        B_bar: Float[Tensor, "batch pos channel d_state"],
        C: Float[Tensor, "batch pos d_state"],
    ) -> SSMMixing:
        """From the pair that the layer used: what `hook_A_bar`, `hook_B_bar`, `hook_C` cache.

        Raises:
            ValueError: if the shapes disagree
        """
        A_bar, B_bar, C = _plain(A_bar, B_bar, C)
        if B_bar.ndim != 4 or A_bar.shape not in (B_bar.shape, (*B_bar.shape[:3], 1)):
            raise ValueError(
                "A_bar and B_bar must be [batch pos channel d_state] (A_bar may have d_state 1), "
                f"got {tuple(A_bar.shape)} and {tuple(B_bar.shape)}"
            )
        return cls(_Pair(A_bar, B_bar), C)

    @classmethod
    def from_delta(
        cls,
        delta: Float[Tensor, "batch pos channel"],
        A: Float[Tensor, "channel d_decay"],
        B: Float[Tensor, "batch pos d_state"],
        C: Float[Tensor, "batch pos d_state"],
        rule: str = "mamba",
    ) -> SSMMixing:
        """From what the layer discretised, by `rule` "mamba", "zoh" or "bilinear".

        Raises:
            ValueError: if there is no such rule, or the shapes disagree
        """
        delta, A, B, C = _plain(delta, A, B, C)
        batch, pos, channel = delta.shape
        if (
            A.shape[0] != channel
            or B.shape[:2] != (batch, pos)
            or A.shape[1] not in (1, B.shape[2])
        ):
            raise ValueError(
                f"A [channel d_state or 1] and B [batch pos d_state] must go with delta "
                f"{tuple(delta.shape)}, got {tuple(A.shape)} and {tuple(B.shape)}"
            )
        return cls(_Delta(delta, A, B, rule), C)

    def channels(self, start: int, stop: int) -> SSMMixing:
        """The mixing of these channels alone: rows of few heads at a time bound the memory."""
        if not 0 <= start < stop <= self.n_heads:
            raise ValueError(f"channels {start}..{stop} are outside 0..{self.n_heads}")
        return SSMMixing(self._steps.channels(slice(start, stop)), self._C)

    def rows(self, start: int, stop: int) -> Float[Tensor, "batch head rows key"]:
        """Rows `start` to `stop`, all keys; every column is first decayed up to `start`."""
        found = [rows for _, _, rows in self._stream(start, stop, BLOCK)]
        return found[0] if len(found) == 1 else torch.cat(found, -2)

    def blocks(self, size: int = BLOCK) -> Iterator[tuple[int, int, Tensor]]:
        """All rows, `size` at a time, as (start, stop, rows [batch head rows key])."""
        return self._stream(0, self.n_queries, size)

    def diagonal(self, lag: int) -> Float[Tensor, "batch head entry"]:
        """Entries M[i, i - lag] for i = lag, lag + 1, …; zeros for a negative lag."""
        first, last = self._extent(lag)
        entries = self._C.new_zeros(self.n_examples, last - first, self.n_heads)
        if lag >= 0:
            for C, (decay, gain) in zip(self._C.unbind(2), self._steps.windows(lag), strict=True):
                entries.addcmul_(decay, gain[:, : last - first] * C[:, first:last, None])
        return entries.transpose(1, 2)

    def reconstruct(
        self, u: Float[Tensor, "batch pos channel"]
    ) -> Float[Tensor, "batch pos channel"]:
        """M u by the recurrence itself, O(pos): the layer's output without D·u."""
        state = self._C.new_zeros(self.n_examples, self.n_heads, self._d_state)
        outputs = []
        for start in range(0, self.n_queries, BLOCK):
            now = slice(start, start + BLOCK)
            A_bar, B_bar = self._steps.at(now)
            states = []
            for a, write in zip(
                A_bar.unbind(1), (B_bar * u[:, now, :, None]).unbind(1), strict=True
            ):
                state = torch.addcmul(write, a, state)
                states.append(state)
            outputs.append(torch.stack(states, 1) @ self._C[:, now, :, None])
        return torch.cat(outputs, 1).squeeze(-1)

    def _stream(self, first: int, last: int, size: int) -> Iterator[tuple[int, int, Tensor]]:
        """Rows first..last; column j of `columns` is B_bar_j decayed to the row before a block."""
        columns = self._columns(first, last)
        for start in range(first, last, size):
            stop = min(start + size, last)
            a, b = (_by_channel(x) for x in self._steps.at(slice(start, stop)))
            C = self._C[:, start:stop].mT.unsqueeze(1)  # [batch 1 d_state rows]
            decay = a.cumprod(-1)  # from the row before the block to each row
            rows = a.new_zeros(self.n_examples, self.n_heads, stop - start, self.n_keys)
            rows[..., :start] = (decay * C).mT @ columns[..., :start]
            _fill_triangle(rows[..., start:stop], a, b, C)
            yield start, stop, rows
            columns[..., :start] *= decay[..., -1:]
            columns[..., start:stop] = _decay_to_end(a) * b

    def _columns(self, first: int, last: int) -> Float[Tensor, "batch head d_state key"]:
        """Room for `last` columns; those before `first` decayed to row first - 1."""
        columns = self._C.new_empty(self.n_examples, self.n_heads, self._d_state, last)
        kept: Tensor | float = 1.0
        for stop in range(first, 0, -BLOCK):
            now = slice(max(0, stop - BLOCK), stop)
            a, b = (_by_channel(x) for x in self._steps.at(now))
            columns[..., now] = _decay_to_end(a) * b * kept
            kept = kept * a.prod(-1, keepdim=True)
        return columns


class _Pair:
    """Steps as cached: A_bar, B_bar."""

    def __init__(self, A_bar: Tensor, B_bar: Tensor):
        self.A_bar, self.B_bar, self.shape = A_bar, B_bar, B_bar.shape

    def channels(self, chosen: slice) -> _Pair:
        return _Pair(self.A_bar[:, :, chosen], self.B_bar[:, :, chosen])

    def at(self, positions: slice) -> tuple[Tensor, Tensor]:
        """A_bar and B_bar there, [batch pos channel d_state]."""
        return self.A_bar[:, positions], self.B_bar[:, positions]

    def windows(self, lag: int) -> Iterator[tuple[Tensor, Tensor]]:
        """State by state: the decay over the `lag` steps that end at each i >= lag, and B_bar."""
        for a, b in zip(
            self.A_bar.expand_as(self.B_bar).unbind(3), self.B_bar.unbind(3), strict=True
        ):
            yield _window_products(a, lag), b


class _Delta:
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

    def channels(self, chosen: slice) -> _Delta:
        return _Delta(self.delta[:, :, chosen], self.A[chosen], self.B, self.rule)

    def at(self, positions: slice) -> tuple[Tensor, Tensor]:
        """A_bar and B_bar there, [batch pos channel d_state]."""
        A_bar, gain = FACTORS[self.rule](self.delta[:, positions, :, None], self.A)
        return A_bar, gain * self.B[:, positions, None]

    def windows(self, lag: int) -> Iterator[tuple[Tensor, Tensor]]:
        """As `_Pair.windows`; where A_bar = exp(delta·A), from the time that has passed."""
        passed = self.elapsed[:, lag:] - self.elapsed[:, : self.shape[1] - lag]
        passed = (passed * math.log2(math.e)).to(self.delta.dtype)
        for A, B in zip(self.A.expand(-1, self.shape[3]).unbind(1), self.B.unbind(2), strict=True):
            A_bar, gain = FACTORS[self.rule](self.delta, A)
            products = self.rule == "bilinear"
            decay = _window_products(A_bar, lag) if products else torch.exp2(passed * A)
            yield decay, gain * B.unsqueeze(-1)


def _bilinear(delta: Tensor, A: Tensor) -> tuple[Tensor, Tensor]:
    phi = 1 / (1 - delta * A / 2)
    return 1 + delta * A * phi, delta * phi


def _zero_order_hold(delta: Tensor, A: Tensor) -> tuple[Tensor, Tensor]:
    z = delta * A
    return z.exp(), torch.where(z == 0, delta, delta * torch.expm1(z) / torch.where(z == 0, 1, z))


FACTORS: dict[str, Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]] = {  # A_bar and B_bar / B
    "mamba": lambda delta, A: (torch.exp(delta * A), delta),
    "zoh": _zero_order_hold,
    "bilinear": _bilinear,
}


def _fill_triangle(square: Tensor, a: Tensor, b: Tensor, C: Tensor) -> None:
    """M inside a block, diagonal by diagonal; `span` is the decay over the last `lag` steps."""
    size = square.shape[-1]
    span = torch.ones_like(a)
    for lag in range(size):
        entries = (C[..., lag:] * span * b[..., : size - lag]).sum(2)
        square.diagonal(-lag, -2, -1).copy_(entries)
        span = a[..., lag + 1 :] * span[..., :-1]


def _decay_to_end(a: Tensor) -> Tensor:
    """Along the last axis, the product of all later entries; 1 at the end."""
    later = a[..., 1:].flip(-1).cumprod(-1).flip(-1)
    return torch.cat([later, torch.ones_like(a[..., :1])], -1)


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


def _by_channel(x: Tensor) -> Tensor:
    """[batch rows channel d_state] as [batch channel d_state rows], rows contiguous."""
    return x.permute(0, 2, 3, 1).contiguous()


def _plain(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Cut from autograd, in their common dtype, at least float32."""
    dtype = torch.float32
    for x in tensors:
        dtype = torch.promote_types(dtype, x.dtype)
    return tuple(x.detach().to(dtype) for x in tensors)
