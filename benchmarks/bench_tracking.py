"""What it costs to track attention: memory at a long context, time beside training.

    python benchmarks/bench_tracking.py

Memory is the peak resident set (VmHWM) of a process of its own that builds a model of 6 layers of 6
heads, 384 wide, and calls `AttentionTracking` once on a window of 8,192 tokens, on as many repeated
tokens, and on an untrained model; libraries and weights are part of it. Time is one call as a
fraction of 500 training steps at the recipe of 4 layers of 4 heads, 128 wide, 12 windows of 64.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from children import GIVING_BACK, call, resident
from timing import MB, Row, compare, report, row
from torch import nn

from smearlens.data.synthetic import repeated_tokens
from smearlens.models.attn_attn import AttnAttn, AttnAttnConfig
from smearlens.training.attention_tracking import AttentionTracking
from smearlens.training.randomness import observing

MEMORY_BAR = 2048  # MB, the whole process
TIME_BAR = 0.02  # of the training time between two looks
EVERY = 500  # steps from look to look
TIMED = 5  # of those steps, to compare with one look
CHARACTERS = 65


def build(n_layers: int, n_heads: int, d_model: int, length: int) -> AttnAttn:
    sizes = {"n_layers": n_layers, "n_heads": n_heads, "d_model": d_model, "n_ctx": length}
    return AttnAttn(AttnAttnConfig(d_vocab=CHARACTERS, norm=True, mlp=True, **sizes))


def tracking(model_sizes: tuple[int, int, int, int], windows: int) -> AttentionTracking:
    """Everything there is to track, on random tokens: the values do not matter here."""
    generator = torch.Generator().manual_seed(0)
    length, n_attended = model_sizes[-1], min(windows, 8)
    return AttentionTracking(
        torch.randint(CHARACTERS, (windows, length), generator=generator),
        generator=generator,
        repeats=repeated_tokens(n_attended, (8, 20), length, CHARACTERS, generator=generator),
        untrained=build(*model_sizes),
        windows=n_attended,
    )


def look(metric: AttentionTracking, model: nn.Module) -> Callable[[], object]:
    def run() -> object:
        with observing(model):
            return metric(model)

    return run


def time_row() -> Row:
    sizes = (4, 4, 128, 64)
    model, metric = build(*sizes), tracking(sizes, 32)
    optimiser = torch.optim.AdamW(model.parameters())
    tokens = torch.randint(CHARACTERS, (12, 64), generator=torch.Generator().manual_seed(1))

    def train() -> None:
        for _ in range(TIMED):
            model(tokens, return_type="loss").backward()
            optimiser.step()
            optimiser.zero_grad()

    found = compare("", sizes, look(metric, model), train, TIME_BAR * EVERY / TIMED)
    keys = found.keys() & {"value", "low", "high", "wall"}
    share = {key: float(found[key]) * TIMED / EVERY for key in keys}
    name = f"one look / {EVERY} training steps"
    return found | share | {"name": name, "bar": TIME_BAR}


def memory_row(length: int = 8192) -> Row:
    sizes = (6, 6, 384, length)
    peak = call(peak_of_tracking, *sizes, environment=GIVING_BACK)
    return row("peak of a process that tracks everything", sizes, peak, MEMORY_BAR, unit=MB)


def peak_of_tracking(*sizes: int) -> float:
    """What the child process of `memory_row` does."""
    n_layers, n_heads, d_model, length = sizes
    model = build(n_layers, n_heads, d_model, length)
    look(tracking((n_layers, n_heads, d_model, length), 1), model)()
    return resident("VmHWM")


def rows() -> Iterator[Row]:
    yield time_row()
    for length in (2048, 8192):
        yield memory_row(length)


def main() -> list[Row]:
    return report(rows())


if __name__ == "__main__":
    main()
