"""What hooks cost: nothing attached, one activation kept, all of them kept.

    python benchmarks/bench_hooks.py

Nothing attached: the peer is a copy of the model in which every HookPoint is replaced by a plain
function that returns its argument, so that not even the look for hooks is paid. With a cache: the
peers are the same model's plain forward, and TransformerLens' bridge around a GPT-2 of its sizes.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator

import torch
from peers import bridge, gpt2
from timing import Row, compare, report
from torch import nn

from smearlens import AttnAttn, AttnAttnConfig, CharGPT, ConvAttn, ConvAttnConfig, Mamba
from smearlens._hooks import HookPoint

BAR = 1.05
WHY = "each hook point is a call, which costs most where the tensors are small"
CACHE_WHY = "the attention core that has scores and pattern runs in place of the fused one"
STATES_WHY = "the states of every step are formed and kept in place of the fused scan"
CASES = {
    "ConvAttn, 64 wide": (
        lambda: ConvAttn(ConvAttnConfig(d_vocab=64, d_model=64, n_heads=4, n_ctx=48)),
        (32, 48, 64),
    ),
    "AttnAttn, 2 layers, 64 wide": (
        lambda: AttnAttn(AttnAttnConfig(d_vocab=64, d_model=64, n_heads=4, n_ctx=48)),
        (32, 48, 64),
    ),
    "ConvAttn, 256 wide": (
        lambda: ConvAttn(ConvAttnConfig(d_vocab=512, d_model=256, n_heads=8, n_ctx=256)),
        (8, 256, 512),
    ),
    "CharGPT, 4 layers, 128 wide": (lambda: CharGPT.from_preset("cpu"), (12, 64, 65)),
    "Mamba, 3 layers, 64 wide": (lambda: Mamba.from_preset("pig-latin-small"), (32, 64, 29)),
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


def unhooked_rows() -> Iterator[Row]:
    for name, (make, (batch, pos, d_vocab)) in CASES.items():
        torch.manual_seed(0)
        model = make().eval()
        bare = without_hook_points(model)
        tokens = torch.randint(d_vocab, (batch, pos))
        with torch.no_grad():
            assert torch.equal(model(tokens), bare(tokens))
        forward = torch.no_grad()(lambda model=model, tokens=tokens: model(tokens))
        peer = torch.no_grad()(lambda bare=bare, tokens=tokens: bare(tokens))
        yield compare(
            f"forward with / without HookPoints: {name}", (batch, pos), forward, peer, BAR,
            rounds=25, why=WHY,
        )  # fmt: skip


def cache_rows() -> Iterator[Row]:
    for name in ("CharGPT, 4 layers, 128 wide", "Mamba, 3 layers, 64 wide"):
        make, (batch, pos, d_vocab) = CASES[name]
        model, tokens = make().eval(), torch.randint(d_vocab, (batch, pos))
        kinds = {"one activation": "blocks.0.hook_resid_post", "all activations": None}
        forward = torch.no_grad()(lambda m=model, t=tokens: m(t))
        for kind, names in kinds.items():
            cached = torch.no_grad()(
                lambda m=model, t=tokens, n=names: m.run_with_cache(t, names_filter=n)
            )
            title = f"run_with_cache of {kind} / forward: {name}"
            why = WHY if names else STATES_WHY if "Mamba" in name else CACHE_WHY
            yield compare(title, (batch, pos), cached, forward, None, why=why)


def bridge_rows(batch: int = 12, pos: int = 64) -> Iterator[Row]:
    model = CharGPT.from_preset("cpu").eval()
    theirs = bridge(gpt2(model.config).eval(), "GPT2LMHeadModel")
    tokens = torch.randint(65, (batch, pos))
    for what in ("forward", "run_with_cache"):
        ours, peer = (
            torch.no_grad()(lambda m=m, w=what: getattr(m, w)(tokens)) for m in (model, theirs)
        )
        title = f"{what} / TransformerLens' bridge around GPT-2, 4 layers, 128 wide"
        yield compare(title, (batch, pos), ours, peer)


def main() -> list[Row]:
    """Rows of every case."""

    def rows() -> Iterator[Row]:
        yield from unhooked_rows()
        yield from cache_rows()
        yield from bridge_rows()

    return report(rows())


if __name__ == "__main__":
    main()
