"""The kernel of the blocked selective scan: forward and hand-written gradient, block by block.

A block is some positions of a few sequences, in buffers [row d_state channel]: a row is one
position of one sequence, the sequences of a position lie side by side, the channel last. So a step
of the recurrence is one contiguous multiply-add, and a block is as large as the cache likes. No
tensor of all positions and states ever exists: the gradient recomputes each block from the state
before it. Leaves out checks, dtypes and autograd (`scan`).
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from smearlens.nn.discretize import Rule

BLOCK_ELEMENTS = 2**18  # per buffer: 1 MB in float32
STEP_ELEMENTS = 2**15  # per step of the recurrence: with fewer, calling it is what takes the time
SCRATCH_ELEMENTS = 8 * BLOCK_ELEMENTS  # that a thread keeps from call to call, at most


def sequences_at_once(batch: int, channel: int, d_state: int) -> int:
    """Sequences that share a block: as many as make a step worth its call."""
    return max(min(STEP_ELEMENTS // max(channel * d_state, 1), batch), 1)


def block_length(batch: int, channel: int, d_state: int) -> int:
    """Positions per block: as many as keep a buffer near 1 MB, between 2 and 64."""
    step = sequences_at_once(batch, channel, d_state) * channel * d_state
    return min(max(BLOCK_ELEMENTS // max(step, 1), 2), 64)


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

    def groups(self) -> Iterator[tuple[slice, Inputs]]:
        """Views of the sequences that are scanned together, one group after the other."""
        batch, channel, d_state = *self.u.shape[1:], self.B.shape[2]
        count = sequences_at_once(batch, channel, d_state)
        for start in range(0, batch, count):
            some = slice(start, start + count)
            yield some, self._at((slice(None), some))

    def blocks(self, length: int) -> Iterator[tuple[slice, Inputs]]:
        """Views of `length` positions each, the last of the rest."""
        for start in range(0, len(self.u), length):
            span = slice(start, start + length)
            yield span, self._at((span,))

    def _at(self, where: tuple[slice, ...]) -> Inputs:
        return Inputs(self.u[where], self.delta[where], self.A, self.B[where], self.C[where])


class _Rows(NamedTuple):
    """What a block reads, by row; `pull_blocks` overwrites it with gradients."""

    delta: Tensor  # [row 1 channel]
    x: Tensor  # [row 1 channel], delta·u; then its gradient
    B: Tensor  # [row 1 d_state]; then its gradient
    C: Tensor  # [row 1 d_state]; then its gradient
    y: Tensor  # [row 1 channel], the memory of x; or the gradient of y, then that of delta

    @classmethod
    def of(cls, inputs: Inputs, d_y: Tensor | None = None) -> _Rows:
        """A block to read, so that copies stay in the cache; or, with `d_y`, all to overwrite."""
        copy = d_y is not None
        delta, B, C = (_by_row(x, copy=copy) for x in (inputs.delta, inputs.B, inputs.C))
        x = torch.empty_like(delta, memory_format=torch.contiguous_format)
        torch.mul(inputs.delta, inputs.u, out=x.view(inputs.u.shape))
        return cls(delta, x, B, C, x if d_y is None else _by_row(d_y, copy=True))

    def blocks(self, size: int) -> list[_Rows]:
        """Views of `size` rows each, the last of the rest."""
        return [_Rows(*parts) for parts in zip(*(x.split(size) for x in self), strict=True)]


def _by_row(x: Tensor, *, copy: bool) -> Tensor:
    """[pos batch size] as [pos·batch 1 size]; without `copy`, a view where the memory allows it."""
    x = x.clone(memory_format=torch.contiguous_format) if copy else x
    return x.reshape(-1, 1, x.shape[2])


_kept = threading.local()


def _scratch(like: Tensor, shapes: list[tuple[int, ...]]) -> list[Tensor]:
    """Buffers with anything in them, valid until this thread asks again.

    On CPU their memory is kept: touching a fresh page takes longer than all arithmetic on it, and
    what is freed may go back to the system. Elsewhere torch keeps freed memory itself.
    """
    sizes = [-(-math.prod(shape) // 16) * 16 for shape in shapes]  # whole cache lines
    count = sum(sizes)
    if like.device.type != "cpu" or type(like) is not Tensor or count > SCRATCH_ELEMENTS:
        memory = like.new_empty(count)
    else:
        name = str(like.dtype).removeprefix("torch.")  # torch.compile takes no dotted name
        memory = getattr(_kept, name, None)
        if memory is None or len(memory) < count:
            with torch.inference_mode(False):  # or no later call could write to it
                memory = torch.empty(count, dtype=like.dtype)
            setattr(_kept, name, memory)
    parts = memory[:count].split(sizes)
    return [part[: math.prod(shape)].view(shape) for part, shape in zip(parts, shapes, strict=True)]


class _Recurrence:
    """The buffers of a block, and the recurrence in them."""

    def __init__(self, rule: Rule, inputs: Inputs, length: int, *, backward: bool = False):
        pos, width, channel = inputs.u.shape
        rows, d_state = min(length, pos) * width, inputs.B.shape[2]
        self.rule, self.A, self.width, self.rows = rule, inputs.A, width, rows
        full, decay = (rows, d_state, channel), (rows, len(inputs.A), channel)
        phi, more = (0,) if rule.constant_phi else decay, [full, full] if backward else []
        shapes: list[tuple[int, ...]] = [(rows + width, d_state, channel), decay, phi, *more]
        self.states, self.decay, self.phi, *self.more = _scratch(inputs.u, shapes)
        self.decay_steps = self.decay.split(width)
        self.state_steps = self.states.split(width)  # first the one before the block

    def run(self, block: _Rows) -> Tensor:
        """Fill `decay`, `phi` and the states after each step; returns the latter, by row."""
        size = len(block.x)
        phi = self.phi[:size]
        self.rule.fill(block.delta, self.A, self.decay[:size], phi)
        states = self.states[self.width : self.width + size]
        torch.mul(block.B.mT, block.x, out=states)
        if not self.rule.constant_phi:
            states.mul_(phi)
        steps = size // self.width
        before = self.state_steps[0]
        for decay, state in zip(self.decay_steps[:steps], self.state_steps[1:], strict=False):
            before = state.addcmul_(decay, before)  # it held the write
        return states


def run_blocks(
    rule: Rule, inputs: Inputs, initial_state: Tensor | None, y: Tensor, *, keep: bool
) -> tuple[Tensor, Tensor | None]:
    """Write the output into `y` [pos batch channel].

    Returns:
        the last state [batch d_state channel] and, if `keep`, the state before each block
    """
    pos, batch, channel = y.shape
    length = block_length(batch, channel, inputs.B.shape[2])
    final_state = y.new_empty(batch, inputs.B.shape[2], channel)
    kept = y.new_empty(-(-pos // length), *final_state.shape) if keep else None
    inputs = inputs._replace(A=inputs.A.contiguous())  # small, and read by every block
    for some, group in inputs.groups():
        recurrence = _Recurrence(rule, group, length)
        carried = recurrence.state_steps[0]
        carried.zero_() if initial_state is None else carried.copy_(initial_state[some])
        for index, (span, given) in enumerate(group.blocks(length)):
            if kept is not None:
                kept[index, some] = carried
            block = _Rows.of(given)
            states = recurrence.run(block)
            torch.bmm(block.C, states, out=block.y)
            y[span, some] = block.y.view(given.u.shape)
            carried.copy_(states[-len(carried) :])
        final_state[some] = carried
    return final_state, kept


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
    _, batch, channel = d_y.shape
    length = block_length(batch, channel, inputs.B.shape[2])
    inputs = inputs._replace(A=inputs.A.contiguous())
    d_A = torch.zeros_like(inputs.A)
    for (some, group), (_, d_group) in zip(inputs.groups(), grads.groups(), strict=True):
        recurrence = _Recurrence(rule, group, length, backward=True)
        rows, (adjoint, spare) = _Rows.of(group, d_y[:, some]), recurrence.more
        for index, block in reversed(list(enumerate(rows.blocks(recurrence.rows)))):
            size = len(block.x)
            recurrence.state_steps[0].copy_(kept[index, some])
            states = recurrence.run(block)
            torch.mul(block.C.mT, block.y, out=adjoint[:size])
            torch.bmm(block.y, states.mT, out=block.C)
            _run_back(recurrence, adjoint[:size], d_state[some])
            d_A += _pull_block(recurrence, block, adjoint[:size], spare[:size])
        d_x, d_delta = rows.x.view_as(group.u), rows.y.view_as(group.u)
        torch.mul(d_x, group.delta, out=d_group.u)
        torch.addcmul(d_delta, d_x, group.u, out=d_group.delta)
        d_group.B.copy_(rows.B.view_as(group.B))
        d_group.C.copy_(rows.C.view_as(group.C))
    grads.A.copy_(d_A)


def _run_back(recurrence: _Recurrence, adjoint: Tensor, d_state: Tensor) -> None:
    """The recurrence of the gradient: what step t receives, step t-1 receives times decay_t."""
    steps, decay = adjoint.split(recurrence.width), recurrence.decay_steps
    steps[-1].add_(d_state)
    for t in range(len(steps) - 1, 0, -1):
        steps[t - 1].addcmul_(decay[t], steps[t])
    torch.mul(decay[0], steps[0], out=d_state)


def _pull_block(recurrence: _Recurrence, block: _Rows, adjoint: Tensor, spare: Tensor) -> Tensor:
    """From the gradient of the states, `adjoint`, to those of x, B and z = delta·A.

    write = B · φ(z) · x, so `adjoint` is its gradient too. Overwrites x and B with their gradients,
    y with the part of delta's that comes through z, and returns the gradient of A.
    """
    rule, size, delta = recurrence.rule, len(adjoint), block.delta
    decay, phi = recurrence.decay[:size], recurrence.phi[:size]
    d_gained = adjoint if rule.constant_phi else torch.mul(adjoint, phi, out=spare)
    d_x, d_B = torch.bmm(block.B, d_gained), torch.bmm(block.x, d_gained.mT)
    d_phi = spare
    if not rule.constant_phi:
        torch.mul(adjoint, block.B.mT, out=d_phi).mul_(block.x)
    d_decay = adjoint.mul_(recurrence.states[:size])
    if len(recurrence.A) < d_decay.shape[1]:  # one A for all states
        d_decay, d_phi = d_decay.sum(1, keepdim=True), d_phi.sum(1, keepdim=True)
    d_z = rule.pull(d_decay, d_phi, delta, recurrence.A, decay, phi)
    block.x.copy_(d_x)
    block.B.copy_(d_B)
    scaled = torch.mul(d_z, recurrence.A, out=spare[:, : d_z.shape[1]])
    torch.sum(scaled, 1, keepdim=True, out=block.y)
    by_step = d_z.mul_(delta).view(-1, recurrence.width, *recurrence.A.shape)
    return by_step.sum(0).sum(0)  # in two stages: faster, and as precise
