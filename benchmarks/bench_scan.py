"""The selective scan beside the machine's floor and beside other people's scans; its mixing too.

    python benchmarks/bench_scan.py            # about ten minutes
    python benchmarks/bench_scan.py --fast     # one shape, and no peer that takes long

The floor is one `torch.exp2` per state and step, over buffers that stay in the cache: every scan
has to compute at least that exponential. Each peer gets the same u, delta, A, B and C and has to
return the output and all five gradients. Ratios are ours / theirs, in processor time of one thread:
steps this small gain little from a second one, and lose much when another process holds it.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable
from importlib.util import find_spec
from statistics import median, quantiles

import torch
from timing import Row, compare, report, row
from torch import Tensor
from torch._higher_order_ops.associative_scan import generic_associative_scan
from transformers.models.mamba.modeling_mamba import mamba_selective_scan

from smearlens.analysis.state_space import SSMMixing
from smearlens.nn.scan import selective_scan, selective_scan_plain

Shape = tuple[int, int, int, int]  # (batch, pos, channel, d_state)
FLOOR_SHAPES = [(8, 256, 128, 16), (4, 1024, 256, 16), (1, 4096, 256, 16)]
FLOOR_BARS = {"mamba": (6, 32), "zoh": (12, 60), "bilinear": (9, 50)}  # forward, both passes
PEER_SHAPES = [(8, 256, 128, 16), (128, 40, 128, 16), (4, 1024, 256, 16)]
MIXING_SHAPE = (1, 256, 64, 16)
TOLERANCE = 3e-6


def inputs(shape: Shape) -> list[Tensor]:
    """u, delta, A, B, C in the range of a freshly initialised model."""
    batch, pos, channel, d_state = shape
    generator = torch.Generator().manual_seed(0)
    u, noise = torch.randn(2, batch, pos, channel, generator=generator)
    B, C = torch.randn(2, batch, pos, d_state, generator=generator)
    delta = torch.logspace(-3, -1, channel) * torch.exp(0.3 * noise)
    A = -torch.arange(1.0, d_state + 1).repeat(channel, 1)
    return [x.requires_grad_() for x in (u, delta, A, B, C)]


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
    tenths = quantiles([mine / theirs for mine, theirs in times], n=10, method="inclusive")
    mine, theirs = (min(column) for column in zip(*times, strict=True))
    return row(f"{name}, best", shape, mine / theirs, bar, low=tenths[0], high=tenths[-1])


def against_peers(shape: Shape, index: int, *, slow: bool) -> list[Row]:
    tensors, weight = inputs(shape), torch.randn(shape[:3])

    def gradients(scan: Scan) -> Callable[[], tuple[Tensor, ...]]:
        return lambda: torch.autograd.grad(scan(*tensors), tensors, weight)

    def ours(*tensors: Tensor) -> Tensor:
        return selective_scan(*tensors)[0]

    rows = []
    for peer, times in QUICK.items():
        if peer is mamba_py and find_spec("mambapy") is None:
            continue
        name = f"scan / {peer.__name__}, forward + backward"
        sides = gradients(ours), gradients(peer)
        rows.append(compare(name, shape, *sides, 1 / times[index], rounds=5))
        rows.append(row(f"difference from {peer.__name__}", shape, _error(*sides), TOLERANCE))
    for peer, times in SLOW.items() if slow else ():
        name = f"scan / {peer.__name__}, forward + backward, few"
        rows.append(row(name, shape, _few(gradients(ours), gradients(peer)), 1 / times[index]))
    return rows


def effective_attention(delta: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
    """The hidden attention as TransformerLens' Mamba bridge computes it (dt scaling included)."""
    elapsed = (A[:, :, None] * delta.mT[:, :, None]).cumsum(-1)  # [batch channel d_state pos]
    future = torch.ones(2 * delta.shape[1:2], dtype=torch.bool).triu(1)
    decay = elapsed[..., :, None] - elapsed[..., None, :]
    decay = torch.exp(decay.masked_fill(future, -torch.inf))
    pairs = C.mT[:, None, :, :, None] * decay * B.mT[:, None, :, None, :]
    return (pairs * delta.mT[:, :, None, None, :]).sum(2)


def against_effective_attention(shape: Shape) -> list[Row]:
    _, *tensors = (x.detach() for x in inputs(shape))
    mixing = SSMMixing.from_delta(*tensors)

    def statistics() -> None:
        for _, _, rows in mixing.blocks():
            rows.abs_().sum(-1)

    def peer() -> Tensor:
        return effective_attention(*tensors)

    sides = {"matrix": (mixing.dense, 20), "row sums of |M|": (statistics, 20)}
    sides["previous-token diagonal"] = (lambda: mixing.diagonal(1), 500)
    rows = [
        compare(f"{name} / effective_attention", shape, ours, peer, 1 / times, rounds=3)
        for name, (ours, times) in sides.items()
    ]
    exact = SSMMixing.from_delta(*(x.double() for x in tensors)).dense()
    error = float((mixing.dense() - exact).abs().max() / exact.abs().max())
    return [*rows, row("matrix, difference from float64", shape, error, 1e-6)]


def _error(
    ours: Callable[[], tuple[Tensor, ...]], theirs: Callable[[], tuple[Tensor, ...]]
) -> float:
    """Largest difference of a gradient, relative to its largest entry."""
    pairs = zip(ours(), theirs(), strict=True)
    return max(float((a - b).abs().max() / b.abs().max()) for a, b in pairs)


def _few(ours: Callable[[], object], theirs: Callable[[], object]) -> float:
    """A few timings of a slow peer: three, or one if it takes longer than ten seconds."""
    ours()
    first = _seconds(theirs)
    timings = [first] if first > 10 else [first, _seconds(theirs), _seconds(theirs)]
    return median(_seconds(ours) for _ in range(9)) / median(timings)


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
        rows += against_effective_attention(MIXING_SHAPE)
    finally:
        torch.set_num_threads(threads)
    report(rows)
    return rows


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--fast", action="store_true", help="one shape, no peer that takes long")
    main(**vars(parser.parse_args()))
