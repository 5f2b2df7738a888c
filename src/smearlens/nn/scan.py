"""The selective scan: h_t = A_bar_t · h_{t-1} + B_bar_t · u_t, y_t = C_t · h_t, channel by channel.

Contains the fast path (blocked, memory of the inputs only), its plain twin (stock autograd over all
states), the step that decodes one token, and, from `scan_variants`, the recurrence on its own. The
skip D·u and the gate belong to the layer. Nothing here takes a logarithm, so decays of any sign and
size are safe.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from smearlens._tracing import is_traced
from smearlens.nn.discretize import (
    RULES,
    at_least_float32,
    discretize,
    rule_named,
    without_autocast,
)
from smearlens.nn.scan_blocks import Inputs, block_length, pull_blocks, run_blocks
from smearlens.nn.scan_variants import linear_scan

__all__ = [
    "block_length",
    "linear_scan",
    "selective_scan",
    "selective_scan_plain",
    "selective_step",
]


def selective_scan(
    u: Float[Tensor, "batch pos channel"],
    delta: Float[Tensor, "batch pos channel"],
    A: Float[Tensor, "channel d_decay"],
    B: Float[Tensor, "batch pos d_state"],
    C: Float[Tensor, "batch pos d_state"],
    *,
    rule: str = "mamba",
    initial_state: Float[Tensor, "batch channel d_state"] | None = None,
) -> tuple[Float[Tensor, "batch pos channel"], Float[Tensor, "batch channel d_state"]]:
    r"""Run a selective state-space model over a sequence, from discretisation to read-out.

    $$h_t = \bar A_t h_{t-1} + \bar B_t u_t, \qquad y_t[c] = \sum_n C_t[n]\, h_t[c, n]$$

    Works in blocks of positions that fit the cache and keeps one state per block, so that neither
    pass holds a [batch pos channel d_state] tensor. Its gradient is written by hand; a gradient of
    that gradient (`create_graph=True`) goes through `selective_scan_plain`. A position with
    delta = 0 is skipped exactly: the state passes through it unchanged. Runs in float32 or float64,
    whatever the inputs or autocast.

    Args:
        u: inputs
        delta: step sizes, at least 0
        A: decay rates, negative; d_decay is d_state, or 1 if all states of a channel share one
            rate (it is never expanded, and the scan is faster)
        B: input weights
        C: read-out weights
        rule: discretisation, `mamba`, `zoh` or `bilinear`
        initial_state: the state before the first position; None for zeros

    Returns:
        y in the dtype of `u`, and the state after the last position, from which a later call or
        `selective_step` continues

    Raises:
        ValueError: if shapes disagree, there is no position or no such rule

    Source:
        Gu & Dao 2023, "Mamba: Linear-Time Sequence Modeling with Selective State Spaces", section 3

    Example:
        >>> one = torch.ones(1, 3, 1)
        >>> y, state = selective_scan(one, one, -one[0, :1], one, one, rule="bilinear")
        >>> [round(value, 4) for value in y.flatten().tolist()]
        [0.6667, 0.8889, 0.963]
    """
    if is_traced():
        return selective_scan_plain(u, delta, A, B, C, rule=rule, initial_state=initial_state)
    _check(u, delta, A, B, C, initial_state)
    given, chosen = u.dtype, rule_named(rule)
    u, delta, A, B, C = at_least_float32(u, delta, A, B, C)
    if initial_state is not None:
        initial_state = initial_state.to(u.dtype)
    inputs = (initial_state, u, delta, A, B, C)
    keep = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs)
    with without_autocast(u.device):
        run = _BlockedScan.apply if torch.is_grad_enabled() else _BlockedScan.forward
        y, final_state, _ = run(chosen.name, keep, *inputs)
    return y.to(given), final_state


def selective_scan_plain(
    u: Float[Tensor, "batch pos channel"],
    delta: Float[Tensor, "batch pos channel"],
    A: Float[Tensor, "channel d_decay"],
    B: Float[Tensor, "batch pos d_state"],
    C: Float[Tensor, "batch pos d_state"],
    *,
    rule: str = "mamba",
    initial_state: Float[Tensor, "batch channel d_state"] | None = None,
) -> tuple[Float[Tensor, "batch pos channel"], Float[Tensor, "batch channel d_state"]]:
    """The plain twin of `selective_scan`: the same result by stock autograd, all states in memory.

    The reference for tests, and the pattern for a layer whose A_bar, B_bar, write or states are
    hooked. Arguments, results and errors as there.
    """
    _check(u, delta, A, B, C, initial_state)
    given = u.dtype
    u, delta, A, B, C = at_least_float32(u, delta, A, B, C)
    if initial_state is not None:
        initial_state = initial_state.to(u.dtype)
    with without_autocast(u.device):
        A_bar, gain = rule_named(rule).factors(delta.unsqueeze(-1), A)
        write = gain * u.unsqueeze(-1) * B.unsqueeze(-2)  # B_bar · u, one large tensor fewer
        states, final_state = linear_scan(A_bar, write, initial_state=initial_state)
        y = (states @ C.unsqueeze(-1)).squeeze(-1)
    return y.to(given), final_state


def selective_step(
    u: Float[Tensor, "batch channel"],
    delta: Float[Tensor, "batch channel"],
    A: Float[Tensor, "channel d_decay"],
    B: Float[Tensor, "batch d_state"],
    C: Float[Tensor, "batch d_state"],
    state: Float[Tensor, "batch channel d_state"],
    rule: str = "mamba",
) -> tuple[Float[Tensor, "batch channel"], Float[Tensor, "batch channel d_state"]]:
    """One step of the recurrence, to decode a token from the state that a scan returned.

    Returns:
        y of this token in the dtype of `u`, and the new state; `state` itself is not changed
    """
    given = u.dtype
    u, delta, A, B, C, state = at_least_float32(u, delta, A, B, C, state)
    with without_autocast(u.device):
        A_bar, B_bar = discretize(delta, A, B, rule)
        state = torch.addcmul(B_bar * u.unsqueeze(-1), A_bar, state)
        y = (state @ C.unsqueeze(-1)).squeeze(-1)
    return y.to(given), state


class _BlockedScan(torch.autograd.Function):
    """Autograd around the kernel. Saves the inputs and one state per block."""

    @staticmethod
    def forward(
        rule: str, keep: bool, initial_state: Tensor | None, *inputs: Tensor
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        y = torch.empty_like(inputs[0], memory_format=torch.contiguous_format)
        final_state, kept = run_blocks(
            RULES[rule],
            Inputs.views(*inputs),
            None if initial_state is None else initial_state.mT,
            y.transpose(0, 1),
            keep=keep,
        )
        return y, final_state.mT.clone(memory_format=torch.contiguous_format), kept

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:  # apart, for torch.func
        ctx.rule, _, *tensors = inputs
        kept = output[2]
        if kept is not None:
            ctx.mark_non_differentiable(kept)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(kept, *tensors)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        kept, initial_state, *inputs = ctx.saved_tensors
        if torch.is_grad_enabled():  # someone wants the gradient of this gradient
            return None, None, *_plain_gradients(ctx.rule, initial_state, inputs, grads[:2])
        d_y, d_final, _ = grads
        u, _, _, B, _ = inputs
        d_y = torch.zeros_like(u) if d_y is None else d_y
        d_state = u.new_zeros(u.shape[0], B.shape[2], u.shape[2])
        if d_final is not None:
            d_state.copy_(d_final.mT)
        d_inputs = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in inputs]
        with without_autocast(u.device):
            pull_blocks(
                RULES[ctx.rule],
                Inputs.views(*inputs),
                kept,
                d_y.transpose(0, 1),
                d_state,
                Inputs.views(*d_inputs),
            )
        return None, None, None if initial_state is None else d_state.mT, *d_inputs


def _plain_gradients(
    rule: str, initial_state: Tensor | None, inputs: list[Tensor], grads: tuple[Tensor | None, ...]
) -> list[Tensor | None]:
    """Differentiable gradients, through the plain twin.

    Each input is given a view of its own: one input may have been computed from another (delta from
    u), and the gradient asked for is that of the scan alone.
    """
    first = None if initial_state is None else initial_state.view_as(initial_state)
    own = [x.view_as(x) for x in inputs]
    outputs = selective_scan_plain(*own, rule=rule, initial_state=first)
    asked = [x for x in (first, *own) if x is not None and x.requires_grad]
    reached = [
        (out, grad)
        for out, grad in zip(outputs, grads, strict=True)
        if grad is not None and out.requires_grad  # the last state does not depend on C
    ]
    values = torch.autograd.grad(
        [out for out, _ in reached],
        asked,
        [grad for _, grad in reached],
        create_graph=True,
        allow_unused=True,
    )
    found = dict(zip(map(id, asked), values, strict=True))
    return [found.get(id(x)) for x in (first, *own)]


def _check(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, state: Tensor | None) -> None:
    """Raise ValueError, with the name of the argument, if the shapes of a scan disagree."""
    batch, pos, channel = u.shape
    if pos == 0:
        raise ValueError(f"u needs at least one position, got shape {tuple(u.shape)}")
    d_state = B.shape[-1]
    allowed: dict[str, tuple[Tensor | None, list[tuple[int, ...]]]] = {
        "delta [batch pos channel]": (delta, [(batch, pos, channel)]),
        "A [channel d_state] or [channel 1]": (A, [(channel, d_state), (channel, 1)]),
        "B [batch pos d_state]": (B, [(batch, pos, d_state)]),
        "C [batch pos d_state]": (C, [(batch, pos, d_state)]),
        "initial_state [batch channel d_state]": (state, [(batch, channel, d_state)]),
    }
    for name, (given, shapes) in allowed.items():
        if given is not None and tuple(given.shape) not in shapes:
            raise ValueError(
                f"{name} must be {' or '.join(map(str, shapes))} to go with u {tuple(u.shape)} "
                f"and B {tuple(B.shape)}, got {tuple(given.shape)}"
            )
