"""Prints, as JSON, how far the resident memory rises while a score reads 4096 positions (bytes).

Run by test_long_context.py in a process of its own, with MALLOC_MMAP_THRESHOLD_=65536.
"""

import json
import sys
from pathlib import Path

import torch

from smearlens import attention_entropy, attention_span, induction_score, prev_token_score
from smearlens.analysis.mixing.state_space import SSMMixing

SCORES = {
    "induction": induction_score,
    "previous token": lambda mixing, tokens: prev_token_score(mixing),
    "entropy": lambda mixing, tokens: attention_entropy(mixing),
    "span": lambda mixing, tokens: attention_span(mixing),
}


def mixing(length, channels=12, d_state=16):
    delta = torch.rand(1, length, channels) * 0.1
    A = -torch.arange(1.0, d_state + 1).repeat(channels, 1)
    B, C = torch.randn(2, 1, length, d_state)
    return SSMMixing.from_delta(delta, A, B, C)


def resident(kind):
    """VmRSS (now) or VmHWM (highest since the last reset)."""
    status = Path("/proc/self/status").read_text()
    return int(status.split(f"{kind}:")[1].split()[0]) * 1024


def main():
    torch.manual_seed(0)
    tokens, long = torch.randint(50, (1, 4096)), mixing(4096)
    found = {}
    for name, score in SCORES.items():
        score(mixing(64), tokens[:, :64])  # warm up
        Path("/proc/self/clear_refs").write_text("5")
        before = resident("VmRSS")
        values = score(long, tokens)
        assert values.shape == (1, 12)
        assert values.isfinite().all()
        found[name] = resident("VmHWM") - before
    sys.stdout.write(json.dumps(found))


if __name__ == "__main__":
    main()
