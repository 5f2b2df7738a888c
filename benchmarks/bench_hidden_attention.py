"""The hidden attention of a Mamba beside TransformerLens' `compute_effective_attention`.

    python benchmarks/bench_hidden_attention.py          # some minutes
    python benchmarks/bench_hidden_attention.py --fast   # 256 positions only, no long context

The peer is the method itself, of a bridge around a Hugging Face Mamba of 64 channels and 16 states;
ours gets the same cache. Time is processor time of one thread. Memory is how far the resident size
rises, each side in a fresh process.
"""

from __future__ import annotations

import sys
import time
import warnings
from collections.abc import Callable
from statistics import median

import torch
from children import GIVING_BACK, call, peak_rise
from timing import ERROR, MB, MEMORY, Row, report, row, tenths

from smearlens import attention_entropy, attention_span, induction_score, prev_token_score
from smearlens.adapters.bridge import bridge_mixings
from smearlens.analysis.mixing.state_space import SSMMixing

CHANNELS, STATES = 64, 16
LENGTHS = (256, 512)
LONG = (4096, 16384)
BARS = {"matrix": 20, "row sums of |M|": 20, "previous-token diagonal": 500}  # times faster
MEMORY_BAR = 64  # MB, of row statistics, at any length
ROUNDS = 3  # of the peer, which takes seconds


def setting(length: int):
    """A bridge, what it cached on random tokens, and our mixing of its layer."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import transformers
        from peers import bridge as around

        torch.manual_seed(0)
        config = transformers.MambaConfig(
            vocab_size=50, hidden_size=CHANNELS // 2, num_hidden_layers=1, state_size=STATES,
            pad_token_id=0, bos_token_id=0, eos_token_id=0,
        )  # fmt: skip
        model = transformers.MambaForCausalLM(config).eval()
        bridge = around(model, "MambaForCausalLM")
        _, cache = bridge.run_with_cache(torch.randint(50, (1, length)))
    projected = cache["blocks.0.mixer.x_proj.hook_out"]
    mixer = bridge.blocks[0].mixer
    low = projected[..., : -2 * STATES]
    steps = torch.nn.functional.linear(low, mixer.dt_proj.weight, mixer.dt_proj.bias)
    theirs = {**dict(cache.items()), "blocks.0.mixer.dt_proj.hook_out": steps.detach()}
    return mixer, theirs, bridge_mixings(cache, bridge)["blocks.0.ssm"]


def sides(length: int) -> tuple[dict[str, Callable[[], object]], Callable[[], torch.Tensor]]:
    """What is timed and weighed: ours by name, and the peer."""
    mixer, cache, mixing = setting(length)

    def statistics() -> None:
        for part in mixing.parts():
            for _, _, rows in part.blocks():
                rows.abs_().sum(-1)

    def peer() -> torch.Tensor:
        with torch.no_grad():
            return mixer.compute_effective_attention(cache, 0, include_dt_scaling=True)

    ours = {
        "matrix": mixing.dense,
        "row sums of |M|": statistics,
        "previous-token diagonal": lambda: mixing.diagonal(1),
    }
    return ours, peer


def against_peer(length: int) -> list[Row]:
    """Time and memory of each of ours over the peer's, and how far the matrices differ."""
    shape, name = (1, length, CHANNELS, STATES), "compute_effective_attention"
    ours, peer = sides(length)
    theirs, found = peer(), ours["matrix"]()
    ratios = _take_turns(ours, peer)
    rows = [
        row(f"{what} / {name}", shape, median(r), 1 / BARS[what], **tenths(r))
        for what, r in ratios.items()
    ]
    error = float((found - theirs).abs().max() / theirs.abs().max())
    rows.append(row(f"matrix, difference from {name}", shape, error, 1e-5, unit=ERROR))
    weights = call(peaks, length, environment=GIVING_BACK)
    for what in ours:
        ratio = weights[what] / weights["peer"]
        rows.append(row(f"{what} / {name}", shape, ratio, 1 / 14, unit=MEMORY))
    return rows


def _take_turns(
    ours: dict[str, Callable[[], object]], peer: Callable[[], object]
) -> dict[str, list[float]]:
    """Processor time of each of ours over that of the one call of the peer in the same round."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    found: dict[str, list[float]] = {what: [] for what in ours}
    for _ in range(ROUNDS):
        theirs = _seconds(peer, 1)
        for what, run in ours.items():
            repeats = 20 if what.endswith("diagonal") else 3
            found[what].append(_seconds(run, repeats) / theirs)
    torch.set_num_threads(threads)
    return found


def _seconds(run: Callable[[], object], repeats: int) -> float:
    start = time.process_time()
    for _ in range(repeats):
        run()
    return (time.process_time() - start) / repeats


def long_context(length: int) -> list[Row]:
    """Memory of the scores of one layer."""
    shape = (1, length, CHANNELS, STATES)
    return [
        row(what, shape, call(peak_of, what, length, environment=GIVING_BACK), MEMORY_BAR, unit=MB)
        for what in (SCORES if length < 10_000 else ["row sums of |M|"])
    ]


def _long(length: int) -> SSMMixing:
    generator = torch.Generator().manual_seed(0)
    B, C = torch.randn(2, 1, length, STATES, generator=generator)
    noise = torch.randn(1, length, CHANNELS, generator=generator)
    delta = torch.logspace(-3, -1, CHANNELS) * torch.exp(0.3 * noise)
    A = -torch.arange(1.0, STATES + 1).repeat(CHANNELS, 1)
    return SSMMixing.from_delta(delta, A, B, C)


SCORES: dict[str, Callable[[SSMMixing, torch.Tensor], object]] = {
    "induction": induction_score,
    "previous token": lambda mixing, tokens: prev_token_score(mixing),
    "entropy": lambda mixing, tokens: attention_entropy(mixing),
    "span": lambda mixing, tokens: attention_span(mixing),
}


def peaks(length: int) -> dict[str, float]:
    """MB by which the peak rises for each of ours and for the peer, in a process of their own."""
    ours, peer = sides(length)
    return {what: peak_rise(run) for what, run in {**ours, "peer": peer}.items()}


def peak_of(what: str, length: int) -> float:
    """MB by which the peak rises for a score of a long context, in a process of its own."""
    mixing, small, tokens = _long(length), _long(64), torch.randint(50, (1, length))
    score = SCORES.get(what, lambda mixing, tokens: [
        rows.abs_().sum(-1) for part in mixing.parts() for _, _, rows in part.blocks()
    ])  # fmt: skip
    score(small, tokens[:, :64])
    return peak_rise(lambda: score(mixing, tokens))


def main(*, fast: bool = False) -> list[Row]:
    rows = []
    for length in LENGTHS[:1] if fast else LENGTHS:
        rows += against_peer(length)
    for length in () if fast else LONG:
        rows += long_context(length)
    report(rows)
    return rows


if __name__ == "__main__":
    main(fast="--fast" in sys.argv[1:])
