"""Prints, as JSON, how far the resident memory rises in a loss, beside its bound (in bytes).

Run by test_large_vocab.py in a process of its own, with MALLOC_MMAP_THRESHOLD_=65536.
"""

import json
import sys
from pathlib import Path

import torch

from smearlens import AttnAttn, AttnAttnConfig
from smearlens.nn.large_vocab import CHUNK_LOGITS, plain_loss, streamed_loss

FLOAT, ROWS, D_VOCAB, D_MODEL = 4, 1001, 50257, 8


def resident(kind):
    """VmRSS (now) or VmHWM (highest since the last reset)."""
    status = Path("/proc/self/status").read_text()
    return int(status.split(f"{kind}:")[1].split()[0]) * 1024


def rise(run):
    Path("/proc/self/clear_refs").write_text("5")
    before = resident("VmRSS")
    run()
    return resident("VmHWM") - before


def of_loss(loss, rows):
    hidden = torch.randn(rows, D_MODEL, requires_grad=True)
    weight = torch.randn(D_VOCAB, D_MODEL, requires_grad=True)
    targets = torch.randint(D_VOCAB, (rows,))
    return rise(lambda: torch.autograd.grad(loss(hidden, weight, targets), (hidden, weight)))


def of_model(batch, pos):
    model = AttnAttn(AttnAttnConfig(d_vocab=D_VOCAB, d_model=D_MODEL, n_heads=2, n_ctx=pos))
    tokens = torch.randint(D_VOCAB, (batch, pos))
    return rise(lambda: model(tokens, return_type="loss").backward())


def main():
    for loss in (streamed_loss, plain_loss):
        of_loss(loss, 3)  # warm up
    all_logits, weight = FLOAT * ROWS * D_VOCAB, FLOAT * D_VOCAB * D_MODEL
    bound = FLOAT * CHUNK_LOGITS + 4 * weight  # a chunk; gradients of the weight before and after
    cases = [
        {"case": "streamed", "rise": of_loss(streamed_loss, ROWS), "bound": bound},
        {"case": "a model", "rise": of_model(7, ROWS // 7 + 1), "bound": bound + 2 * weight},
    ]
    plain = of_loss(plain_loss, ROWS)
    sys.stdout.write(json.dumps({"cases": cases, "plain": plain, "all_logits": all_logits}))


if __name__ == "__main__":
    main()
