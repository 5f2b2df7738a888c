"""Scores of hidden attention, channel by channel: equal to those of the dense matrix, in bounds."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from smearlens import attention_entropy, attention_span, induction_score, prev_token_score
from smearlens.analysis.mixing import state_space
from smearlens.analysis.mixing.kinds import DenseMixing
from smearlens.analysis.mixing.state_space import SSMMixing

SCRIPT = Path(__file__).with_name("long_context.py")
SCORES = [
    induction_score,
    lambda mixing, tokens: prev_token_score(mixing),
    lambda mixing, tokens: attention_entropy(mixing),
    lambda mixing, tokens: attention_span(mixing),
    lambda mixing, tokens: attention_span(mixing, kind="mass", normalise="softmax"),
]


@pytest.mark.parametrize("room", [2**19, 14500, 1])
@pytest.mark.parametrize("rule", ["mamba", "bilinear"])
def test_parts_add_up_to_the_dense_matrix(rule, room, monkeypatch):
    length = 301
    delta = torch.rand(2, length, 7, dtype=torch.float64) * 4
    A = -torch.rand(7, 5, dtype=torch.float64)
    B, C = torch.randn(2, 2, length, 5, dtype=torch.float64)
    tokens = torch.randint(11, (2, length))
    mixing = SSMMixing.from_delta(delta, A, B, C, rule)
    dense = DenseMixing(mixing.dense(), signed=True)
    monkeypatch.setattr(state_space, "ROOM", room)
    sizes = [part.n_heads for part in mixing.parts()]
    assert sizes == {2**19: [7], 14500: [3, 3, 1], 1: [1] * 7}[room]
    for score in SCORES:
        torch.testing.assert_close(score(mixing, tokens), score(dense, tokens))
    found, expected = (induction_score({"blocks.0.ssm": m}, tokens) for m in (mixing, dense))
    for part in ("chance", "maximum", "control"):
        a, b = (getattr(scores, part)["blocks.0.ssm"] for scores in (found, expected))
        torch.testing.assert_close(*torch.broadcast_tensors(a, b), equal_nan=True)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="reads Linux's VmHWM")
def test_peak_memory_at_4096_positions():
    """In a process of its own, where freed memory goes back to the system at once."""
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(SCRIPT)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    found = json.loads(done.stdout)
    assert len(found) == 4
    assert max(found.values()) < 64e6, found
