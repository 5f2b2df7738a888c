"""The hidden attention of a Mamba beside TransformerLens' `compute_effective_attention`.

    python benchmarks/bench_hidden_attention.py          # some minutes
    python benchmarks/bench_hidden_attention.py --fast   # 256 positions only, no long context

The peer is the method itself, of a bridge around a Hugging Face Mamba of 64 channels and 16 states;
ours gets the same cache. Time is processor time of one thread. Memory is how far the resident size
rises, each side in a fresh process.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from timing import Row, compare, report, row

from smearlens import attention_entropy, attention_span, induction_score, prev_token_score
from smearlens.adapters.bridge import bridge_mixings
from smearlens.analysis.mixing.state_space import SSMMixing

CHANNELS, STATES = 64, 16
LENGTHS = (256, 512)
LONG = (4096, 16384)
BARS = {"matrix": 20, "row sums of |M|": 20, "previous-token diagonal": 500}  # times faster
MEMORY_BAR = 64e6  # bytes, of row statistics, at any length


def setting(length: int):
    """A bridge, what it cached on random tokens, and our mixing of its layer."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import transformers
        from transformer_lens.model_bridge.sources._bridge_builder import build_bridge_from_module

        torch.manual_seed(0)
        config = transformers.MambaConfig(
            vocab_size=50, hidden_size=CHANNELS // 2, num_hidden_layers=1, state_size=STATES,
            pad_token_id=0, bos_token_id=0, eos_token_id=0,
        )  # fmt: skip
        model = transformers.MambaForCausalLM(config).eval()
        bridge = build_bridge_from_module(
            model, "MambaForCausalLM", hf_config=config, tokenizer=None, device="cpu"
        )
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
    shape = (1, length, CHANNELS, STATES)
    ours, peer = sides(length)
    name = "compute_effective_attention"
    rows = [
        compare(f"{what} / {name}", shape, run, peer, 1 / BARS[what], rounds=3)
        for what, run in ours.items()
    ]
    theirs, found = peer(), ours["matrix"]()
    error = float((found - theirs).abs().max() / theirs.abs().max())
    rows.append(row(f"matrix, difference from {name}", shape, error, 1e-5))
    weight = memory("peer", length)
    for what in ours:
        ratio = memory(what, length) / weight
        rows.append(row(f"{what} / {name}, memory", shape, ratio, 1 / 14))
    return rows


def long_context(length: int) -> list[Row]:
    """Memory of the scores of one layer, as a share of what is allowed."""
    shape = (1, length, CHANNELS, STATES)
    return [
        row(f"{what} / 64 MB", shape, memory(what, length) / MEMORY_BAR, 1)
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


def memory(what: str, length: int) -> float:
    """Rise of the resident size in bytes, in a process of its own that gives freed pages back."""
    command = [sys.executable, __file__, "--memory", what, str(length)]
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def _weigh(what: str, length: int) -> None:
    if what in SCORES or length in LONG:
        mixing, small, tokens = _long(length), _long(64), torch.randint(50, (1, length))
        score = SCORES.get(what, lambda mixing, tokens: [
            rows.abs_().sum(-1) for part in mixing.parts() for _, _, rows in part.blocks()
        ])  # fmt: skip
        score(small, tokens[:, :64])
        run = lambda: score(mixing, tokens)  # noqa: E731
    else:
        ours, peer = sides(length)
        run = {**ours, "peer": peer}[what]
    Path("/proc/self/clear_refs").write_text("5")
    before = _resident("VmRSS")
    run()
    print(json.dumps(_resident("VmHWM") - before))


def _resident(kind: str) -> int:
    status = Path("/proc/self/status").read_text()
    return int(status.split(f"{kind}:")[1].split()[0]) * 1024


def main(*, fast: bool = False) -> list[Row]:
    rows = []
    for length in LENGTHS[:1] if fast else LENGTHS:
        rows += against_peer(length)
    for length in () if fast else LONG:
        rows += long_context(length)
    report(rows)
    return rows


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--fast", action="store_true", help="256 positions, no long context")
    parser.add_argument("--memory", nargs=2, metavar=("WHAT", "LENGTH"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.memory:
        _weigh(given.memory[0], int(given.memory[1]))
    else:
        main(fast=given.fast)
