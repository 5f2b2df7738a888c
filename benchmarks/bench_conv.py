"""The depthwise convolution beside `nn.Conv1d`, from and to [batch pos channel].

    python benchmarks/bench_conv.py

The peer pads by K-1 and trims, as causal convolutions are usually written. Forward and backward for
input, weight and bias. Also the largest difference between the two, relative to the largest entry.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from timing import ERROR, Row, compare, report, row
from torch import Tensor, nn

from smearlens.nn.conv import depthwise_conv

TRAINING = [  # (batch, pos, channel, tap)
    (32, 256, 512, 5),
    (32, 256, 512, 1),
    (32, 256, 512, 16),
    (32, 48, 64, 3),
    (128, 40, 128, 16),
    (1, 4096, 256, 4),
]
BAR = 0.65
TOLERANCE = 5e-6


class Pair:
    """The same convolution twice."""

    def __init__(self, batch: int, pos: int, channel: int, tap: int):
        generator = torch.Generator().manual_seed(0)
        self.x = torch.randn(batch, pos, channel, generator=generator, requires_grad=True)
        self.dy = torch.randn(batch, pos, channel, generator=generator)
        self.conv = nn.Conv1d(channel, channel, tap, padding=tap - 1, groups=channel)
        self.weight = self.conv.weight.detach()[:, 0].flip(-1).clone().requires_grad_()
        self.bias = self.conv.bias.detach().clone().requires_grad_()

    def ours(self) -> Tensor:
        return depthwise_conv(self.x, self.weight, self.bias)

    def theirs(self) -> Tensor:
        return self.conv(self.x.transpose(1, 2))[..., : self.x.shape[1]].transpose(1, 2)

    def our_gradients(self) -> tuple[Tensor, ...]:
        return torch.autograd.grad(self.ours(), (self.x, self.weight, self.bias), self.dy)

    def their_gradients(self) -> tuple[Tensor, ...]:
        leaves = (self.x, self.conv.weight, self.conv.bias)
        return torch.autograd.grad(self.theirs(), leaves, self.dy)

    def error(self) -> float:
        dx, dw, db = self.their_gradients()
        pairs = [(self.ours().detach(), self.theirs().detach())]
        pairs += zip(self.our_gradients(), (dx, dw[:, 0].flip(-1), db), strict=True)
        return max(float((a - b).abs().max() / b.abs().max()) for a, b in pairs)


def rows() -> Iterator[Row]:
    for shape in TRAINING:
        pair = Pair(*shape)
        sides = pair.our_gradients, pair.their_gradients
        yield compare("conv / nn.Conv1d, forward + backward", shape, *sides, BAR)
        with torch.no_grad():
            yield compare("conv / nn.Conv1d, forward", shape, pair.ours, pair.theirs, 1)
        yield row("largest relative difference", shape, pair.error(), TOLERANCE, unit=ERROR)


def main() -> list[Row]:
    return report(rows())


if __name__ == "__main__":
    main()
