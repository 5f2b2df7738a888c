"""What hooks cost while nothing is attached: the models beside the same modules without HookPoints.

    python benchmarks/bench_hooks.py

The peer is a copy of the model in which every HookPoint is replaced by a plain function that
returns its argument, so that not even a module call is paid.
"""

from __future__ import annotations

import copy

import torch
from timing import Row, compare, report
from torch import nn

from smearlens import AttnAttn, AttnAttnConfig, ConvAttn, ConvAttnConfig
from smearlens._hooks import HookPoint

BAR = 1.05
CASES = {
    "ConvAttn 32x48, 64 wide": (
        lambda: ConvAttn(ConvAttnConfig(d_vocab=64, d_model=64, n_heads=4, n_ctx=48)),
        (32, 48, 64),
    ),
    "AttnAttn 32x48, 64 wide, 2 layers": (
        lambda: AttnAttn(AttnAttnConfig(d_vocab=64, d_model=64, n_heads=4, n_ctx=48)),
        (32, 48, 64),
    ),
    "ConvAttn 8x256, 256 wide": (
        lambda: ConvAttn(ConvAttnConfig(d_vocab=512, d_model=256, n_heads=8, n_ctx=256)),
        (8, 256, 512),
    ),
}


def without_hook_points(model: nn.Module) -> nn.Module:
    """A copy whose hook points are plain functions."""
    bare = copy.deepcopy(model)
    for module in list(bare.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, HookPoint):
                delattr(module, name)
                object.__setattr__(module, name, _Nothing())
    return bare


class _Nothing:
    """Stands where a HookPoint stood: callable, never hooked."""

    _forward_hooks = _backward_hooks = _forward_pre_hooks = _backward_pre_hooks = ()
    fwd_hooks = bwd_hooks = ()

    def __call__(self, value):
        return value


def main() -> list[Row]:
    """Rows of every case."""
    rows = []
    for name, (make, (batch, pos, d_vocab)) in CASES.items():
        torch.manual_seed(0)
        model = make().eval()
        bare = without_hook_points(model)
        tokens = torch.randint(d_vocab, (batch, pos))
        with torch.no_grad():
            assert torch.equal(model(tokens), bare(tokens))
        forward = torch.no_grad()(lambda model=model, tokens=tokens: model(tokens))
        peer = torch.no_grad()(lambda bare=bare, tokens=tokens: bare(tokens))
        rows.append(
            compare(f"forward with / without HookPoints: {name}", (batch, pos), forward, peer, BAR,
                    rounds=25)
        )  # fmt: skip
    return report(rows)


if __name__ == "__main__":
    main()
