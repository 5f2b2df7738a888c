"""What the states of a state-space layer keep, and since when.

Contains retention, write weights, half-lives, memory profiles and the state at a boundary, all from
the pair (A_bar, B_bar) that the layer used (`hook_A_bar`, `hook_B_bar`), whatever its
discretisation. Between positions s and t the decay is Π_{s<k<=t} |A_bar_k|: a token is not decayed
by its own step. Leaves out the read-out by C (`analysis.mixing.state_space`).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


def retention(
    A_bar: Float[Tensor, "batch pos channel d_state"], target: int = -1
) -> Float[Tensor, "batch source channel d_state"]:
    """Share of what a state held after each position that is left at `target`.

    Π_{s<k<=target} |A_bar_k| for every source s up to `target`, where it is 1.

    Args:
        A_bar: decays per step
        target: the later position; negative counts from the end

    Raises:
        ValueError: if there is no such position
    """
    a = _moduli(A_bar)[:, : _position(target, A_bar.shape[1]) + 1]
    later = a[:, 1:].flip(1).cumprod(1).flip(1)
    return torch.cat([later, torch.ones_like(a[:, :1])], 1)


def write_weight(
    A_bar: Float[Tensor, "batch pos channel d_state"],
    B_bar: Float[Tensor, "batch pos channel d_state"],
    target: int = -1,
) -> Float[Tensor, "batch source channel d_state"]:
    """How strongly the input of each position is represented in the state at `target`.

    retention(s → target) · |B_bar_s|, in units of state per unit of input.

    Raises:
        ValueError: if there is no such position
    """
    kept = retention(A_bar, target)
    return kept * _moduli(B_bar)[:, : kept.shape[1]]


def half_life(
    A_bar: Float[Tensor, "batch pos channel d_state"],
) -> Float[Tensor, "batch pos channel d_state"]:
    """Tokens until less than half is left of what a state held after each position.

    The smallest lag l with retention(s → s + l) < 1/2; inf if that does not happen before the
    sequence ends. Found by bisection over products of 2^k steps, state by state.

    Args:
        A_bar: decays per step, of modulus at most 1 (as under every rule, for A <= 0)
    """
    return torch.stack([_half_life(column) for column in _moduli(A_bar).unbind(-1)], -1)


def memory_profile(
    A_bar: Float[Tensor, "batch pos channel d_state"],
    B_bar: Float[Tensor, "batch pos channel d_state"],
    *,
    max_lag: int | None = None,
    mask: Bool[Tensor, "batch pos"] | None = None,
) -> Float[Tensor, "batch channel lag"]:
    """Mean write weight by lag: how much of a token is left in the state l tokens later.

    The mean of retention(t - l → t) · |B_bar_{t-l}| over targets t and states, for l = 0..max_lag.

    Args:
        A_bar: decays per step
        B_bar: input gains
        max_lag: largest lag; default all of them, O(pos²)
        mask: False at padding, which counts neither as source nor as target

    Returns:
        one profile per example and channel; NaN at a lag that no pair of valid tokens has

    Raises:
        ValueError: if `max_lag` reaches outside the sequence
    """
    a, b = _moduli(A_bar), _moduli(B_bar)
    length = a.shape[1]
    last = length - 1 if max_lag is None else max_lag
    if not 0 <= last < length:
        raise ValueError(f"max_lag must be in 0..{length - 1}, got {max_lag}")
    valid = torch.ones(a.shape[:2], dtype=torch.bool) if mask is None else mask
    means, kept = [], torch.ones_like(a)
    for lag in range(last + 1):
        weight = (kept * b[:, : length - lag]).mean(-1)
        means.append(_masked_mean(weight, valid[:, lag:] & valid[:, : length - lag]))
        kept = kept[:, :-1] * a[:, lag + 1 :]
    return torch.stack(means, -1)


class StateBoundary(NamedTuple):
    """What happens to a state at a boundary token, per example and channel."""

    write_ratio: Float[Tensor, "batch channel"]
    """Mean |B_bar| after the boundary over that before it; 0: nothing is written any more."""
    retention: Float[Tensor, "batch channel"]
    """Share of the state at the boundary that is left at the end, mean over states."""


def state_boundary(
    A_bar: Float[Tensor, "batch pos channel d_state"],
    B_bar: Float[Tensor, "batch pos channel d_state"],
    boundary: Int[Tensor, " batch"],
    *,
    mask: Bool[Tensor, "batch pos"] | None = None,
) -> StateBoundary:
    """Whether a layer stops writing at a token (the end of the source, say) and keeps what it has.

    Args:
        A_bar: decays per step
        B_bar: input gains; a token's write weight on its own state is |B_bar|
        boundary: position of that token in each example; it belongs to neither side
        mask: False at padding: not averaged, and not counted as decay

    Returns:
        the ratio is NaN for an example without a valid token on both sides

    Raises:
        ValueError: if a boundary lies outside the sequence
    """
    a, b = _moduli(A_bar), _moduli(B_bar).mean(-1)
    position = torch.arange(a.shape[1])
    if boundary.min() < 0 or boundary.max() >= a.shape[1]:
        raise ValueError(f"boundary must be in 0..{a.shape[1] - 1}, got {boundary.tolist()}")
    valid = torch.ones(a.shape[:2], dtype=torch.bool) if mask is None else mask
    after, before = position > boundary[:, None], position < boundary[:, None]
    ratio = _masked_mean(b, valid & after) / _masked_mean(b, valid & before)
    counted = torch.where((valid & after)[..., None, None], a, 1.0)
    return StateBoundary(ratio, counted.prod(1).mean(-1))


def _half_life(a: Float[Tensor, "batch pos channel"]) -> Float[Tensor, "batch pos channel"]:
    """Largest lag that keeps half, found from the highest power of 2 down, plus 1."""
    length = a.shape[1]
    windows = [a]  # windows[k][i]: product of 2^k decays from i on, 1 beyond the end
    for k in range(length.bit_length() - 1):
        ahead = torch.ones_like(a)
        ahead[:, : length - 2**k] = windows[k][:, 2**k :]
        windows.append(windows[k] * ahead)
    position = torch.arange(length)[:, None]
    lag, kept = torch.zeros(a.shape, dtype=torch.long), torch.ones_like(a)
    for k, window in reversed(list(enumerate(windows))):
        start = position + 1 + lag
        inside = start < length
        product = window.gather(1, start.clamp(max=length - 1)).where(inside, 1.0)
        enough = kept * product >= 0.5
        kept = torch.where(enough, kept * product, kept)
        lag += 2**k * enough
    return torch.where(position + lag < length, lag + 1.0, torch.inf).to(a.dtype)


def _masked_mean(
    x: Float[Tensor, "batch pos channel"], mask: Bool[Tensor, "batch pos"]
) -> Float[Tensor, "batch channel"]:
    """Mean over the positions of `mask`; NaN where there is none."""
    return (x * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)


def _position(index: int, length: int) -> int:
    if not -length <= index < length:
        raise ValueError(f"target must be in {-length}..{length - 1}, got {index}")
    return index % length


def _moduli(x: Tensor) -> Tensor:
    """|x|, at least float32."""
    return x.abs() if x.dtype in (torch.float32, torch.float64) else x.float().abs()
