"""The selective scan beside the machine's floor and beside other people's scans.

    python benchmarks/bench_scan.py            # about ten minutes
    python benchmarks/bench_scan.py --fast     # one shape, and no peer that takes long

The floor is one `torch.exp2` per state and step, over buffers that stay in the cache: every scan
has to compute at least that exponential. Each peer gets the same u, delta, A, B and C and has to
return the output and all five gradients. Ratios are ours / theirs, in processor time of one thread:
steps this small gain little from a second one, and lose much when another process holds it.

The peers that keep every state need hundreds of megabytes per call. In a fresh process glibc gives
them back to the system, so each call pays for its pages again, as in a training step; a process
whose heap has grown for other reasons may keep them. Those two settings differ severalfold, so such
a peer runs in a process of its own and has two rows: all processor time, which is what a user of it
pays, and user time alone, which leaves out the system's work for fresh pages on both sides.
"""

from __future__ import annotations

import math
import os
import sys
import time
from collections.abc import Callable
from importlib.util import find_spec
from statistics import median

import torch
from children import call
from timing import ERROR, Row, compare, report, row, tenths
from torch import Tensor
from torch._higher_order_ops.associative_scan import generic_associative_scan
from transformers.models.mamba.modeling_mamba import mamba_selective_scan

from smearlens.nn.scan import selective_scan, selective_scan_plain

Shape = tuple[int, int, int, int]  # (batch, pos, channel, d_state)
FLOOR_SHAPES = [(8, 256, 128, 16), (4, 1024, 256, 16), (1, 4096, 256, 16)]
FLOOR_BARS = {"mamba": (6, 32), "zoh": (12, 60), "bilinear": (9, 50)}  # forward, both passes
PEER_SHAPES = [(8, 256, 128, 16), (128, 40, 128, 16), (4, 1024, 256, 16)]
TOLERANCE = 3e-6
FLOOR_WHY = (
    "the floor is one exponential per state and step; a scan also multiplies, adds and reads"
)
LONG = 5.0  # seconds: a peer that takes longer is timed once, at its first call


def inputs(shape: Shape) -> list[Tensor]:
    """u, delta, A, B, C in the range of a freshly initialised model."""
    batch, pos, channel, d_state = shape
    generator = torch.Generator().manual_seed(0)
    u, noise = torch.randn(2, batch, pos, channel, generator=generator)
    B, C = torch.randn(2, batch, pos, d_state, generator=generator)
    delta = torch.logspace(-3, -1, channel) * torch.exp(0.3 * noise)
    A = -torch.arange(1.0, d_state + 1).repeat(channel, 1)
    return [x.requires_grad_() for x in (u, delta, A, B, C)]


def ours(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
    return selective_scan(u, delta, A, B, C)[0]


def plain(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
    return selective_scan_plain(u, delta, A, B, C)[0]


def _pair(u: Tensor, delta: Tensor, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
    """A_bar and the write, [batch pos channel d_state], as most implementations form them."""
    decay = torch.exp(delta.unsqueeze(-1) * A)
    return decay, delta.unsqueeze(-1) * B.unsqueeze(2) * u.unsqueeze(-1)


def mamba_py(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
    from mambapy.pscan import pscan  # left out where it is not installed

    return (pscan(*_pair(u, delta, A, B)) @ C.unsqueeze(-1)).squeeze(-1)


def associative(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
    """`torch.associative_scan` without its compiler, which takes no gradient on CPU."""

    def combine(a: Tensor, h: Tensor, next_a: Tensor, next_h: Tensor) -> tuple[Tensor, Tensor]:
        return a * next_a, next_a * h + next_h

    _, states = generic_associative_scan(combine, _pair(u, delta, A, B), dim=1)
    return (states @ C.unsqueeze(-1)).squeeze(-1)


def hugging_face(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
    return mamba_selective_scan(u.mT, delta.mT, A, B.mT, C.mT).mT


def eager_loop(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
    """The loop that TransformerLens' Mamba bridge runs when its states are hooked."""
    writes = (delta * u).mT[..., None] * B[:, None]
    state, states = torch.zeros_like(writes[:, :, 0]), []
    for t in range(u.shape[1]):
        state = torch.exp(A * delta.mT[:, :, t, None]) * state + writes[:, :, t]
        states.append(state)
    return torch.einsum("bcts,bts->btc", torch.stack(states, 2), C)


Scan = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]
QUICK: dict[Scan, tuple[float, ...]] = {  # how many times slower, per shape
    plain: (1.6, 2.5, 3),
    mamba_py: (1.8, 6, 5),
    associative: (3, 6, 8),
}
SLOW: dict[Scan, tuple[float, ...]] = {
    hugging_face: (12, 20, 100),
    eager_loop: (3.5, 12, 100),
}


def against_floor(shape: Shape) -> list[Row]:
    tensors, weight = inputs(shape), torch.randn(shape[:3])
    buffer = -torch.rand(2**17)
    out = torch.empty_like(buffer)
    buffers = math.prod(shape) // len(buffer)

    def floor() -> None:
        for _ in range(buffers):
            torch.exp2(buffer, out=out)

    rows = []
    for rule, bars in FLOOR_BARS.items():

        def forward(rule: str = rule) -> Tensor:
            return selective_scan(*tensors, rule=rule)[0]

        def both(rule: str = rule) -> tuple[Tensor, ...]:
            return torch.autograd.grad(forward(rule), tensors, weight)

        with torch.no_grad():
            rows.append(_best(f"{rule} / exp2, forward", shape, forward, floor, bars[0]))
        rows.append(_best(f"{rule} / exp2, forward + backward", shape, both, floor, bars[1]))
    return rows


def _best(
    name: str, shape: Shape, ours: Callable[[], object], floor: Callable[[], object], bar: float
) -> Row:
    """Best of 9 over best of 9: what the kernel can do; the spread is what neighbours cost it."""
    ours()
    times = [(_seconds(ours), _seconds(floor)) for _ in range(9)]
    spread = tenths([mine / theirs for mine, theirs in times])
    mine, theirs = (min(column) for column in zip(*times, strict=True))
    return row(f"{name}, best", shape, mine / theirs, bar, **spread, why=FLOOR_WHY)


def against_peers(shape: Shape, index: int, *, slow: bool) -> list[Row]:
    tensors, weight = inputs(shape), torch.randn(shape[:3])
    rows = []
    for peer, times in QUICK.items():
        if peer is mamba_py and find_spec("mambapy") is None:
            continue
        name = f"scan / {peer.__name__}, forward + backward"
        sides = [_gradients(scan, tensors, weight) for scan in (ours, peer)]
        rows.append(compare(name, shape, *sides, 1 / times[index], rounds=5))
        rows.append(
            row(f"difference from {peer.__name__}", shape, _error(*sides), TOLERANCE, unit=ERROR)
        )
    for peer in SLOW if slow else ():
        rows += in_own_process(peer, index)
    return rows


def _gradients(
    scan: Scan, tensors: list[Tensor], weight: Tensor
) -> Callable[[], tuple[Tensor, ...]]:
    return lambda: torch.autograd.grad(scan(*tensors), tensors, weight)


def _error(
    ours: Callable[[], tuple[Tensor, ...]], theirs: Callable[[], tuple[Tensor, ...]]
) -> float:
    """Largest difference of a gradient, relative to its largest entry."""
    pairs = zip(ours(), theirs(), strict=True)
    return max(float((a - b).abs().max() / b.abs().max()) for a, b in pairs)


def in_own_process(peer: Scan, index: int) -> list[Row]:
    """Both rows of a peer that keeps every state; a fresh process, malloc as it is by default."""
    rounds = call(alternate, peer.__name__, index, environment={})
    times, rows = SLOW[peer][index], []
    # The bar holds for all processor time: page faults of fresh tensors are part of what a step of
    # the peer costs, in each step. User time alone is shown beside it and must only be shorter.
    for kind, bar in (("all processor time", 1 / times), ("user time", 1.0)):
        ratios = [mine[kind] / theirs[kind] for mine, theirs in rounds]
        name = f"scan / {peer.__name__}, forward + backward, {kind}"
        middle, edges = median(ratios), {"low": min(ratios), "high": max(ratios)}
        rows.append(row(name, PEER_SHAPES[index], middle, bar, **edges))
    return rows


def alternate(name: str, index: int) -> list[list[dict[str, float]]]:
    """Times of ours and of the peer, three rounds after the first; that one alone if it is slow."""
    shape, peer = PEER_SHAPES[index], next(scan for scan in SLOW if scan.__name__ == name)
    mine, theirs = (
        _gradients(scan, inputs(shape), torch.randn(shape[:3])) for scan in (ours, peer)
    )
    mine()
    first = [_times(mine), _times(theirs)]
    if first[1]["all processor time"] > LONG:
        return [first]
    return [[_times(mine), _times(theirs)] for _ in range(3)]


def _times(run: Callable[[], object]) -> dict[str, float]:
    before = os.times()
    seconds = _seconds(run)
    spent = os.times().system - before.system
    return {"all processor time": seconds, "user time": seconds - spent}


def _seconds(run: Callable[[], object]) -> float:
    start = time.process_time()
    run()
    return time.process_time() - start


def main(*, fast: bool = False) -> list[Row]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        rows = []
        for shape in FLOOR_SHAPES[:1] if fast else FLOOR_SHAPES:
            rows += against_floor(shape)
        for index, shape in enumerate(PEER_SHAPES[:1] if fast else PEER_SHAPES):
            rows += against_peers(shape, index, slow=not fast)
    finally:
        torch.set_num_threads(threads)
    report(rows)
    return rows


if __name__ == "__main__":
    main(fast="--fast" in sys.argv[1:])
