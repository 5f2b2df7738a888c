"""The mixing of a selective state-space layer: its hidden attention.

Contains `SSMMixing`, which hands out rows, diagonals or the dense array; `ChannelMixing`, which
takes its channels a few at a time; and what makes weights of signed rows. Decays enter as products,
never as exponentials of differences of large sums, so the negative and zero A_bar of the `bilinear`
rule are as exact as any. Leaves out the skip D·u and the gate, which mix no positions (`implicit`
has them), and the memory of single states (`analysis.states`).
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from smearlens.analysis.mixing.kinds import Mixing
from smearlens.analysis.mixing.steps import DeltaSteps, PairSteps

BLOCK = 32  # rows handed out at once, where the context is not long
STRETCH = 256  # rows discretised at once
Normalise = Literal["abs", "softmax", "minmax", "none"]  # of signed rows
ROOM = 2**19  # entries of a row block of one part: 2 MB in float32


class ChannelMixing(Mixing):
    """A signed, causal mixing with one matrix per channel, of which there can be very many."""

    causal = True
    signed = True

    @abstractmethod
    def channels(self, start: int, stop: int) -> ChannelMixing:
        """The mixing of these channels alone: rows of few heads at a time bound the memory."""

    def parts(self) -> Iterator[ChannelMixing]:
        """All channels, as many at a time as keep a block of rows within the cache."""
        at_once = max(1, ROOM // (self.n_examples * self.n_keys * self._block_size()))
        for start in range(0, self.n_heads, at_once):
            yield self.channels(start, min(start + at_once, self.n_heads))

    def _block_size(self) -> int:
        """Rows per block: fewer where they are long, so that a part still has a few channels."""
        return min(BLOCK, max(8, ROOM // (4 * self.n_examples * self.n_keys)))

    def _check_channels(self, start: int, stop: int) -> None:
        if not 0 <= start < stop <= self.n_heads:
            raise ValueError(f"channels {start}..{stop} are outside 0..{self.n_heads}")


class SSMMixing(ChannelMixing):
    r"""Hidden attention: one signed lower-triangular matrix per example and channel.

    $$M[c, i, j] = \sum_n C_i[n] \Big(\prod_{k=j+1}^{i} \bar A_k[c, n]\Big) \bar B_j[c, n],
    \qquad j \le i$$

    Exact: y_i[c] = Σ_j M[c, i, j] u_j[c], where u is the input after convolution and activation.
    Rows come in blocks, each from the one before in O(rows · pos · d_state) per channel; a diagonal
    costs O(pos · d_state); a row at random O(pos · d_state) more than the next one. No gradient
    flows through it.

    Build with `from_delta`, which holds no [batch pos channel d_state] tensor, or `from_steps`.
    Rows of all channels at once need [batch channel d_state pos] of memory; `parts` takes a few.

    Source:
        Ali, Zimerman & Wolf 2024, "The Hidden Attention of Mamba Models", equation 11
    """

    def __init__(self, steps: DeltaSteps | PairSteps, C: Float[Tensor, "batch pos d_state"]):
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
        return cls(PairSteps(A_bar, B_bar), C)

    @classmethod
    def from_delta(
        cls,
        delta: Float[Tensor, "batch pos channel"],
        A: Float[Tensor, "channel d_decay"],
        B: Float[Tensor, "batch pos d_state"],
        C: Float[Tensor, "batch pos d_state"],
        rule: str = "mamba",
    ) -> SSMMixing:
        """From what the layer discretised, by `rule` (as in `nn.discretize`).

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
        return cls(DeltaSteps(delta, A, B, rule), C)

    def channels(self, start: int, stop: int) -> SSMMixing:
        """The mixing of these channels alone."""
        self._check_channels(start, stop)
        return SSMMixing(self._steps.channels(slice(start, stop)), self._C)

    def rows(self, start: int, stop: int) -> Float[Tensor, "batch head rows key"]:
        """Rows `start` to `stop`, all keys; every column is first decayed up to `start`."""
        found = [rows for _, _, rows in self._stream(start, stop, BLOCK)]
        return found[0] if len(found) == 1 else torch.cat(found, -2)

    def blocks(self, size: int | None = None) -> Iterator[tuple[int, int, Tensor]]:
        """All rows, `size` at a time, as (start, stop, rows [batch head rows key])."""
        return self._stream(0, self.n_queries, size or self._block_size())

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
        stretch = max(STRETCH // size, 1) * size
        for begin in range(first, last, stretch):
            end = min(begin + stretch, last)
            A_bar, B_bar = (_by_channel(x) for x in self._steps.at(slice(begin, end)))
            C_all = self._C[:, begin:end].mT.unsqueeze(1)  # [batch 1 d_state rows]
            squares = _triangles(A_bar, B_bar, C_all, size)
            for start in range(begin, end, size):
                stop = min(start + size, end)
                here, now = slice(start - begin, stop - begin), slice(start, stop)
                a, b, C = A_bar[..., here], B_bar[..., here], C_all[..., here]
                decay = a.cumprod(-1)  # from the row before the block to each row
                rows = a.new_empty(self.n_examples, self.n_heads, stop - start, self.n_keys)
                rows[..., stop:] = 0
                rows[..., :start] = (decay * C).mT @ columns[..., :start]
                rows[..., now] = squares[here, :, :, : stop - start].permute(1, 2, 0, 3)
                yield start, stop, rows
                columns[..., :start] *= decay[..., -1:]
                columns[..., now] = _decay_to_end(a) * b

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


def require_weights(name: str, mixing: Mixing, normalise: Normalise) -> None:
    """Raise a ValueError where what `name` measures needs rows that sum to 1 and has none."""
    if mixing.signed and normalise == "none":
        raise ValueError(
            f"{name} needs weights, and normalise='none' leaves signed rows as they are; "
            "choose 'abs', 'softmax' or 'minmax'"
        )


def unsigned(rows: Tensor, allowed: Tensor, normalise: Normalise) -> Tensor:
    """Signed rows as weights, by the named choice."""
    if normalise == "none":
        return rows
    if normalise == "softmax":
        return rows.masked_fill(~allowed, -torch.inf).softmax(-1).nan_to_num()
    if normalise == "minmax":
        low = rows.masked_fill(~allowed, torch.inf).amin(-1, keepdim=True)
        rows = (rows - low).masked_fill(~allowed, 0)
    rows = rows.abs()
    return rows.div_(rows.sum(-1, keepdim=True).clamp_min(torch.finfo(rows.dtype).tiny))


def _triangles(a: Tensor, b: Tensor, C: Tensor, size: int) -> Tensor:
    """M inside each block of `size` rows, [rows batch channel size], diagonal by diagonal."""
    short = -a.shape[-1] % size
    a, b, C = (torch.nn.functional.pad(x, (0, short)).unflatten(-1, (-1, size)) for x in (a, b, C))
    squares = a.new_zeros(*a.shape[:2], *a.shape[3:], size)  # [batch channel block size size]
    span = torch.ones_like(a)  # the decay over the last `lag` steps
    for lag in range(size):
        entries = (C[..., lag:] * span * b[..., : size - lag]).sum(2)
        squares.diagonal(-lag, -2, -1).copy_(entries)
        span = a[..., lag + 1 :] * span[..., :-1]
    return squares.flatten(2, 3).permute(2, 0, 1, 3)


def _decay_to_end(a: Tensor) -> Tensor:
    """Along the last axis, the product of all later entries; 1 at the end."""
    later = a[..., 1:].flip(-1).cumprod(-1).flip(-1)
    return torch.cat([later, torch.ones_like(a[..., :1])], -1)


def _by_channel(x: Tensor) -> Tensor:
    """[batch rows channel d_state] as [batch channel d_state rows], rows contiguous."""
    return x.permute(0, 2, 3, 1).contiguous()


def _plain(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Cut from autograd, in their common dtype, at least float32."""
    dtype = torch.float32
    for x in tensors:
        dtype = torch.promote_types(dtype, x.dtype)
    return tuple(x.detach().to(dtype) for x in tensors)
