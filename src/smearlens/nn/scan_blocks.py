"""The kernel of the blocked selective scan: forward and hand-written gradient, block by block.

Everything is time-major here with the channel last, [pos batch d_state channel], so that a step of
the recurrence is one contiguous multiply-add, and a block of positions is as long as the cache
likes. No tensor of all positions and states ever exists: the gradient recomputes each block from
the state before it. Leaves out checks, dtypes and autograd (`scan`).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from smearlens.nn.discretize import Rule

BLOCK_ELEMENTS = 2**18  # per buffer: 1 MB in float32


def block_length(batch: int, channel: int, d_state: int) -> int:
    """Positions per block: as many as keep a buffer near 1 MB, between 2 and 64."""
    return min(max(BLOCK_ELEMENTS // max(batch * channel * d_state, 1), 2), 64)


class Inputs(NamedTuple):
    """What a scan reads, or the gradients of that, time-major."""

    u: Tensor  # [pos batch channel]
    delta: Tensor  # [pos batch channel]
    A: Tensor  # [d_state channel], or [1 channel] if all states share it
    B: Tensor  # [pos batch d_state]
    C: Tensor  # [pos batch d_state]

    @classmethod
    def views(cls, u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Inputs:
        """Of batch-major tensors, without a copy."""
        return cls(*(x.transpose(0, 1) for x in (u, delta, A, B, C)))

    def block(self, start: int, stop: int) -> Inputs:
        """Views of the positions from `start` to before `stop`."""
        now = slice(start, stop)
        return Inputs(self.u[now], self.delta[now], self.A, self.B[now], self.C[now])


class _Recurrence:
    """Buffers for one block, allocated once (fresh memory costs more than the arithmetic)."""

    def __init__(self, rule: Rule, inputs: Inputs):
        pos, batch, channel = inputs.u.shape
        d_state = inputs.B.shape[2]
        new, length = inputs.u.new_empty, min(block_length(batch, channel, d_state), pos)
        self.rule = rule
        self.starts = range(0, pos, length)
        self.length = length
        self.decay = new(length, batch, len(inputs.A), channel)
        self.phi = new(0) if rule.constant_phi else torch.empty_like(self.decay)
        self.states = new(length + 1, batch, d_state, channel)  # [0]: the state before the block
        self.decay_steps = self.decay.unbind(0)
        self.state_steps = self.states.unbind(0)

    def run(self, block: Inputs) -> Tensor:
        """Fill `decay`, `phi` and `states[1:]`; returns the latter, [pos batch d_state channel]."""
        size = len(block.u)
        delta, phi = block.delta.unsqueeze(2), self.phi[:size]
        self.rule.fill(delta, block.A, self.decay[:size], phi)
        states = self.states[1 : size + 1]
        torch.mul(block.B.unsqueeze(3), delta * block.u.unsqueeze(2), out=states)
        if not self.rule.constant_phi:
            states.mul_(phi)
        before = self.state_steps[0]
        for decay, state in zip(self.decay_steps[:size], self.state_steps[1:], strict=False):
            before = state.addcmul_(decay, before)  # it held the write
        return states


def run_blocks(
    rule: Rule, inputs: Inputs, initial_state: Tensor | None, y: Tensor, *, keep: bool
) -> tuple[Tensor, Tensor | None]:
    """Write the output into `y` [pos batch channel].

    Returns:
        the last state [batch d_state channel] and, if `keep`, the state before each block
    """
    inputs = inputs._replace(A=inputs.A.contiguous())  # small, and read by every block
    recurrence = _Recurrence(rule, inputs)
    carried = recurrence.state_steps[0]
    carried.zero_() if initial_state is None else carried.copy_(initial_state)
    kept = carried.new_empty(len(recurrence.starts), *carried.shape) if keep else None
    for index, start in enumerate(recurrence.starts):
        if kept is not None:
            kept[index] = carried
        block = inputs.block(start, start + recurrence.length)
        states = recurrence.run(block)
        y[start : start + recurrence.length] = (block.C.unsqueeze(2) @ states).squeeze(2)
        carried.copy_(states[-1])
    return carried, kept


def pull_blocks(
    rule: Rule, inputs: Inputs, kept: Tensor, d_y: Tensor, d_state: Tensor, grads: Inputs
) -> None:
    """Write the gradients of all inputs into `grads`, and that of the first state into `d_state`.

    Args:
        rule: the discretisation
        inputs: as given to `run_blocks`
        kept: the state before each block
        d_y: gradient of the output [pos batch channel]
        d_state: gradient of the last state [batch d_state channel]; overwritten
        grads: time-major views of the results
    """
    inputs = inputs._replace(A=inputs.A.contiguous())
    recurrence = _Recurrence(rule, inputs)
    adjoint = torch.empty_like(recurrence.states[1:])
    spare = torch.empty_like(adjoint)
    grads.A.zero_()
    for index, start in reversed(list(enumerate(recurrence.starts))):
        stop = start + recurrence.length
        block, d_block = inputs.block(start, stop), grads.block(start, stop)
        size = len(block.u)
        recurrence.states[0] = kept[index]
        states = recurrence.run(block)
        d_out = d_y[start:stop].unsqueeze(2)
        d_block.C.copy_(torch.mul(states, d_out, out=spare[:size]).sum(3))
        torch.mul(block.C.unsqueeze(3), d_out, out=adjoint[:size])
        _run_back(recurrence.decay_steps[:size], adjoint[:size].unbind(0), d_state)
        _pull_block(recurrence, block, adjoint[:size], spare[:size], d_block)


def _run_back(decay: tuple[Tensor, ...], adjoint: tuple[Tensor, ...], d_state: Tensor) -> None:
    """The recurrence of the gradient: what step t receives, step t-1 receives times decay_t."""
    adjoint[-1].add_(d_state)
    for t in range(len(adjoint) - 1, 0, -1):
        adjoint[t - 1].addcmul_(decay[t], adjoint[t])
    torch.mul(decay[0], adjoint[0], out=d_state)


def _pull_block(
    recurrence: _Recurrence, block: Inputs, adjoint: Tensor, spare: Tensor, grads: Inputs
) -> None:
    """From the gradient of the states, `adjoint`, to those of u, delta, A and B.

    write = B · φ(delta·A) · (delta·u), so `adjoint` is its gradient too.
    """
    rule, size = recurrence.rule, len(block.u)
    delta, u, B = block.delta.unsqueeze(2), block.u.unsqueeze(2), block.B.unsqueeze(3)
    decay, phi = recurrence.decay[:size], recurrence.phi[:size]
    x = delta * u
    d_gained = adjoint if rule.constant_phi else torch.mul(adjoint, phi, out=spare)
    d_x = B.mT @ d_gained
    grads.B.copy_(torch.mul(d_gained, x, out=spare).sum(3))
    d_phi = torch.mul(adjoint, B, out=spare).mul_(x) if not rule.constant_phi else spare
    d_decay = adjoint.mul_(recurrence.states[:size])
    if len(block.A) < d_decay.shape[2]:  # one A for all states
        d_decay, d_phi = d_decay.sum(2, keepdim=True), d_phi.sum(2, keepdim=True)
    d_z = rule.pull(d_decay, d_phi, delta, block.A, decay, phi)
    grads.u.copy_((d_x * delta).squeeze(2))
    scaled = spare[:, :, : d_z.shape[2]]
    d_delta = torch.mul(d_z, block.A, out=scaled).sum(2, keepdim=True).addcmul_(d_x, u)
    grads.delta.copy_(d_delta.squeeze(2))
    grads.A.add_(torch.mul(d_z, delta, out=scaled).sum((0, 1)))
