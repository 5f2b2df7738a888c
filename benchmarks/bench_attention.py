"""The attention core and the streamed statistics beside torch's fused attention.

    python benchmarks/bench_attention.py

Peer of every ratio: one `F.scaled_dot_product_attention` of the same tensors, forward for the
statistics, forward + backward for the core. Memory is the rise of the peak resident set in a fresh
process; errors are against a dense float64 pattern.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from children import GIVING_BACK, call, peak_rise
from timing import ERROR, MB, Row, compare, report, row
from torch import Tensor
from torch.nn import functional as F

from smearlens._hooks import HookPoint, caching_hook
from smearlens.analysis.mixing.streaming import diagonal, log_normaliser, row_statistics
from smearlens.nn.attention import Attention, explicit_attention

STATISTICS_BAR = 1.3  # of one fused forward
MEMORY_BAR = 128  # MB, at 32768 tokens
EXPLICIT_BAR = 2.0  # of the fused core, forward + backward
UNHOOKED_BAR = 1.05  # of the same layer written without hook points
STATISTICS_WHY = (
    "the statistics take an exponential and two products more per entry than the output"
)
HOOKS_WHY = "six hook points are called"
EXPLICIT_WHY = (
    "scores and pattern exist in memory and pass their hooks; unhooked, the core is fused"
)
CORE = (32, 8, 256, 64)  # batch, head, pos, d_head


def random_qkv(batch: int, head: int, pos: int, d_head: int) -> list[Tensor]:
    """q, k, v as a layer makes them: views of [batch pos head d_head]."""
    generator = torch.Generator().manual_seed(0)
    draw = (torch.randn(batch, pos, head, d_head, generator=generator) for _ in range(3))
    return [t.transpose(1, 2) for t in draw]


def statistics_rows(shape: tuple[int, ...], *, causal: bool) -> Iterator[Row]:
    q, k, v = random_qkv(*shape)
    lse = log_normaliser(q, k, causal=causal)
    subjects = {
        "row_statistics": lambda: row_statistics(q, k, causal=causal),
        "log_normaliser": lambda: log_normaliser(q, k, causal=causal),
        "diagonal, normaliser known": lambda: diagonal(q, k, 1, lse, causal=causal),
    }

    def fused() -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=causal)

    kind = "causal" if causal else "full"
    for name, run in subjects.items():
        title = f"{name} / fused forward, {kind}"
        yield compare(title, shape, run, fused, STATISTICS_BAR, rounds=5, why=STATISTICS_WHY)


def accuracy_rows(shape: tuple[int, ...] = (1, 2, 2048, 64)) -> Iterator[Row]:
    q, k, _ = random_qkv(*shape)
    found = row_statistics(q, k, causal=True)
    length = shape[2]
    lag = torch.arange(length)[:, None] - torch.arange(length)
    scores = q.double() @ k.double().mT * shape[3] ** -0.5
    pattern = scores.masked_fill(lag < 0, -torch.inf).softmax(-1)
    entropy = -torch.special.xlogy(pattern, pattern).sum(-1)
    distance = (pattern * lag.abs()).sum(-1)
    error = float((found.entropy - entropy).abs().max())
    yield row("entropy, largest error in nats", shape, error, 2e-5, unit=ERROR)
    error = float((found.distance - distance).abs().max()) / length
    yield row("mean distance, largest error / pos", shape, error, 1e-6, unit=ERROR)


def memory_rows(shape: tuple[int, ...] = (1, 2, 32768, 64)) -> Iterator[Row]:
    rise = call(peak_of_statistics, *shape, environment=GIVING_BACK)
    yield row("row_statistics, rise of the peak", shape, rise, MEMORY_BAR, unit=MB)


def peak_of_statistics(*shape: int) -> float:
    """What the child process of `memory_rows` does."""
    q, k, _ = random_qkv(*shape)
    row_statistics(q[:, :, :256], k[:, :, :256], causal=True)  # libraries load what they load
    return peak_rise(lambda: row_statistics(q, k, causal=True))


def core_rows() -> Iterator[Row]:
    q, k, v = (t.requires_grad_() for t in random_qkv(*CORE))
    dz = torch.randn(CORE, generator=torch.Generator().manual_seed(1))
    pos = CORE[2]
    mask = torch.zeros(1, 1, pos, pos).masked_fill(
        torch.ones(pos, pos, dtype=torch.bool).triu(1), -torch.inf
    )
    points = [HookPoint(), HookPoint()]
    for point, name in zip(points, ("scores", "pattern"), strict=True):
        point.name = name
        point.add_hook(caching_hook({}))

    def fused() -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)

    def explicit() -> Tensor:
        return explicit_attention(q, k, v, mask, CORE[3] ** -0.5, *points)

    def gradients(forward) -> tuple[Tensor, ...]:
        return torch.autograd.grad(forward(), (q, k, v), dz)

    name = "explicit core, read by hooks / fused, forward + backward"
    sides = (lambda: gradients(explicit)), (lambda: gradients(fused))
    yield compare(name, CORE, *sides, EXPLICIT_BAR, why=EXPLICIT_WHY)
    error = float((explicit() - fused()).detach().abs().max())
    yield row("explicit core, largest difference from fused", CORE, error, 1e-6, unit=ERROR)


def layer_rows() -> Iterator[Row]:
    batch, head, pos, d_head = CORE
    layer = Attention(head * d_head, head)
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(batch, pos, head * d_head, generator=generator, requires_grad=True)
    leaves = (x, layer.in_proj.weight, layer.out_proj.weight)
    dy = torch.randn(x.shape, generator=generator)

    def bare(x: Tensor) -> Tensor:
        q, k, v = (
            t.view(batch, pos, head, d_head).transpose(1, 2)
            for t in F.linear(x, layer.in_proj.weight).chunk(3, -1)
        )
        z = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return F.linear(z.transpose(1, 2).reshape(x.shape), layer.out_proj.weight)

    name = "Attention, nothing hooked / the same without hook points, forward + backward"
    sides = [lambda f=f: torch.autograd.grad(f(x), leaves, dy) for f in (layer, bare)]
    yield compare(name, CORE, *sides, UNHOOKED_BAR, rounds=15, why=HOOKS_WHY)


def rows() -> Iterator[Row]:
    yield from core_rows()
    yield from layer_rows()
    yield from accuracy_rows()
    yield from memory_rows()
    for shape in ((1, 2, 2048, 64), (1, 8, 2048, 64), (1, 2, 8192, 64)):
        for causal in (True, False):
            yield from statistics_rows(shape, causal=causal)


def main() -> list[Row]:
    return report(rows())


if __name__ == "__main__":
    main()
