"""Prints, as JSON, how far the resident memory rises during a scan, beside its bound (in bytes).

Run by test_scan.py in a process of its own, with MALLOC_MMAP_THRESHOLD_=65536.
"""

import json
import math
import sys
from pathlib import Path

import torch

from smearlens.nn.scan import block_length, selective_scan, selective_scan_plain

FLOAT = 4


def resident(kind):
    """VmRSS (now) or VmHWM (highest since the last reset)."""
    status = Path("/proc/self/status").read_text()
    return int(status.split(f"{kind}:")[1].split()[0]) * 1024


def rise(scan, rule, sizes, *, train):
    batch, pos, channel, d_state = sizes
    tensors = [
        torch.randn(batch, pos, channel),
        torch.rand(batch, pos, channel),
        -torch.rand(channel, d_state),
        torch.randn(batch, pos, d_state),
        torch.randn(batch, pos, d_state),
    ]
    weight = torch.randn(batch, pos, channel)
    if train:
        for x in tensors:
            x.requires_grad_()
    Path("/proc/self/clear_refs").write_text("5")
    before = resident("VmRSS")
    y, _ = scan(*tensors, rule=rule)
    if train:
        torch.autograd.grad(y, tensors, weight)
    return resident("VmHWM") - before


def main():
    cases = []
    blocked = [(1, 2048, 256, 16), (64, 24, 128, 16)]
    for sizes in blocked:
        batch, pos, channel, d_state = sizes
        length = block_length(batch, channel, d_state)
        sequence, state = FLOAT * batch * pos * channel, FLOAT * batch * channel * d_state
        bounds = {
            True: 6 * sequence + math.ceil(pos / length) * state + 12 * length * state,
            False: 4 * sequence + 6 * length * state,
        }
        for rule in ("mamba", "zoh", "bilinear"):
            for train, bound in bounds.items():
                rise(selective_scan, rule, (batch, 3, channel, d_state), train=train)  # warm up
                found = rise(selective_scan, rule, sizes, train=train)
                cases.append({"case": f"{rule} {sizes} {train}", "rise": found, "bound": bound})
    sizes = (4, 96, 128, 47)  # a step is well above the threshold of malloc
    rise(selective_scan_plain, "mamba", (4, 3, 128, 47), train=True)
    found = rise(selective_scan_plain, "mamba", sizes, train=True)
    cases.append({"case": f"plain {sizes}", "rise": found, "bound": 6 * FLOAT * math.prod(sizes)})
    sys.stdout.write(json.dumps(cases))


if __name__ == "__main__":
    main()
