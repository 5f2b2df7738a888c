"""How time and memory grow with length, batch and layers: fitted exponents.

    python benchmarks/bench_growth.py

Time is processor time of one thread; memory is the rise of the peak resident set, in a process that
gives freed memory back at once. An exponent of 1 is linear growth.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from children import GIVING_BACK, call, peak_rise
from growth import curve, seconds
from peers import stepper
from timing import MB, Row, report

from smearlens import CharGPT, CharGPTConfig, Mamba, MambaConfig
from smearlens.analysis.mixing import streaming
from smearlens.analysis.mixing.state_space import SSMMixing
from smearlens.nn.conv import depthwise_conv
from smearlens.nn.scan import selective_scan

Run = Callable[[], object]
LINEAR, QUADRATIC = 1.1, 2.1
CHANNELS, STATES = 64, 16
LENGTHS, LONG = (256, 512, 1024, 2048, 4096), (1024, 2048, 4096, 8192, 16384)
FEW, LAYERS = (2, 4, 8, 16, 32), (1, 2, 4, 8)
POSITIONS, SEQUENCES, DEPTH = "positions", "sequences", "layers"


def scan(length: int) -> Run:
    """Forward and backward."""
    u, delta, A, B, C = _ssm(length)
    tensors = [t.requires_grad_() for t in (u, delta, A, B, C)]
    return lambda: torch.autograd.grad(selective_scan(*tensors)[0].sum(), tensors)


def conv(length: int) -> Run:
    """Forward and backward."""
    x = torch.randn(1, length, 4 * CHANNELS, requires_grad=True)
    weight = torch.randn(4 * CHANNELS, 4, requires_grad=True)
    bias = torch.zeros(4 * CHANNELS, requires_grad=True)
    leaves = (x, weight, bias)
    return lambda: torch.autograd.grad(depthwise_conv(*leaves).sum(), leaves)


def mixing_diagonal(length: int) -> Run:
    mixing = _mixing(length)
    return lambda: mixing.diagonal(1)


def mixing_rows(length: int) -> Run:
    mixing = _mixing(length)
    return lambda: [rows.abs_().sum(-1) for part in mixing.parts() for _, _, rows in part.blocks()]


def attention_diagonal(length: int) -> Run:
    q, k = torch.randn(2, 1, 2, length, 64)
    normaliser = torch.zeros(1, 2, length)
    return lambda: streaming.diagonal(q, k, 1, normaliser, causal=True)


def attention_rows(length: int) -> Run:
    q, k = torch.randn(2, 1, 2, length, 64)
    return lambda: streaming.row_statistics(q, k, causal=True)


def char_gpt(batch: int = 4, pos: int = 64, layers: int = 4) -> Run:
    """A training step."""
    sizes = {"d_vocab": 65, "d_model": 128, "n_heads": 4, "n_ctx": pos, "n_layers": layers}
    return _step(CharGPT(CharGPTConfig(**sizes)), batch, pos)


def mamba(batch: int = 4, pos: int = 64, layers: int = 2) -> Run:
    """A training step."""
    return _step(Mamba(MambaConfig(d_vocab=65, d_model=64, n_ctx=pos, n_layers=layers)), batch, pos)


def generation(tokens: int) -> Run:
    model = CharGPT.from_preset("cpu", n_ctx=tokens).eval()
    prompt = torch.zeros(1, 1, dtype=torch.int64)
    return lambda: model.generate(prompt, tokens - 1, temperature=0)


def cached(length: int) -> Run:
    """All activations kept, attention patterns among them."""
    model = CharGPT.from_preset("cpu", n_ctx=length).eval()
    tokens = torch.zeros(1, length, dtype=torch.int64)
    return torch.no_grad()(lambda: model.run_with_cache(tokens))


def by(make: Callable[..., Run], axis: str, **others: int) -> Callable[[int], Run]:
    """`make` as a function of one of its sizes, at the other ones."""
    return lambda size: make(**{axis: size}, **others)


TIMES: list[tuple[str, Callable[[int], Run], str, tuple[int, ...], float | None]] = [
    ("scan, forward + backward", scan, POSITIONS, LENGTHS, LINEAR),
    ("convolution, forward + backward", conv, POSITIONS, LENGTHS, LINEAR),
    ("diagonal of a state-space layer", mixing_diagonal, POSITIONS, LONG, LINEAR),
    ("row sums of a state-space layer", mixing_rows, POSITIONS, LENGTHS[:4], QUADRATIC),
    ("diagonal of attention", attention_diagonal, POSITIONS, LONG, LINEAR),
    ("row statistics of attention", attention_rows, POSITIONS, LENGTHS, QUADRATIC),
    ("training step of Mamba", by(mamba, "pos"), POSITIONS, LENGTHS[:4], LINEAR),
    ("training step of CharGPT", by(char_gpt, "pos"), POSITIONS, LENGTHS[:4], None),
    ("generation by CharGPT", generation, POSITIONS, (32, 64, 128, 256), None),
    ("training step of Mamba", by(mamba, "batch"), SEQUENCES, FEW, LINEAR),
    ("training step of CharGPT", by(char_gpt, "batch"), SEQUENCES, FEW, LINEAR),
    ("training step of Mamba", by(mamba, "layers"), DEPTH, LAYERS, LINEAR),
    ("training step of CharGPT", by(char_gpt, "layers"), DEPTH, LAYERS, LINEAR),
]
# Sizes at which activations are large: small tensors come from a heap that is there already.
PEAKS: list[tuple[str, Callable[[int], Run], str, tuple[int, ...], float | None]] = [
    ("scan, forward + backward", scan, POSITIONS, LONG, LINEAR),
    ("diagonal of a state-space layer", mixing_diagonal, POSITIONS, LONG, LINEAR),
    ("row sums of a state-space layer", mixing_rows, POSITIONS, LENGTHS, LINEAR),
    ("row statistics of attention", attention_rows, POSITIONS, LONG[:4], LINEAR),
    ("forward of CharGPT with everything cached", cached, POSITIONS, LENGTHS[:4], None),
    ("training step of Mamba", by(mamba, "pos"), POSITIONS, LENGTHS[:4], LINEAR),
    ("training step of CharGPT", by(char_gpt, "pos"), POSITIONS, LENGTHS[:4], LINEAR),
    ("training step of Mamba", by(mamba, "batch", pos=256), SEQUENCES, FEW[1:], LINEAR),
    ("training step of CharGPT", by(char_gpt, "batch", pos=256), SEQUENCES, FEW[1:], LINEAR),
    ("training step of Mamba", by(mamba, "layers", pos=512), DEPTH, LAYERS, LINEAR),
    ("training step of CharGPT", by(char_gpt, "layers", pos=512), DEPTH, LAYERS, LINEAR),
]


def peaks() -> list[list[float]]:
    """MB of every curve of `PEAKS`, in a process of its own."""
    torch.manual_seed(0)
    found = []
    for _, make, _, sizes, _ in PEAKS:
        make(sizes[0])()  # libraries load what they load
        found.append([peak_rise(make(size)) for size in sizes])
    return found


def rows() -> Iterator[Row]:
    torch.manual_seed(0)
    for name, make, axis, sizes, bar in TIMES:
        values = seconds({size: make(size) for size in sizes})
        yield curve(f"time: {name}", axis, sizes, values, "s", bar)
    found = call(peaks, environment=GIVING_BACK)
    for (name, _, axis, sizes, bar), values in zip(PEAKS, found, strict=True):
        yield curve(f"peak memory: {name}", axis, sizes, values, MB, bar)


def _ssm(length: int) -> tuple[torch.Tensor, ...]:
    """u, delta, A, B, C in the range of a freshly initialised model."""
    u, noise = torch.randn(2, 1, length, CHANNELS)
    B, C = torch.randn(2, 1, length, STATES)
    delta = torch.logspace(-3, -1, CHANNELS) * torch.exp(0.3 * noise)
    return u, delta, -torch.arange(1.0, STATES + 1).repeat(CHANNELS, 1), B, C


def _mixing(length: int) -> SSMMixing:
    _, delta, A, B, C = _ssm(length)
    return SSMMixing.from_delta(delta, A, B, C)


def _step(model: CharGPT | Mamba, batch: int, pos: int) -> Run:
    tokens = torch.randint(65, (batch, pos))
    return stepper(model, lambda: model(tokens, return_type="loss"))


def main() -> list[Row]:
    return report(rows())


if __name__ == "__main__":
    main()
