"""Hooks that fail and hooks that write: nothing stays attached, and nothing cached changes.

    python benchmarks/stress_hooks.py

Contains an exception at every hook point of every model, forward and backward, and hooks that
write in place behind a cache. Leaves out wrong hooks: `stress_input`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from campaign import Campaign, script

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from tests.models.zoo import VARIANTS, Variant  # every configuration that the tests know

from smearlens._hooks import caching_hook


class Boom(Exception):
    """What the hooks below raise."""


def boom(tensor: torch.Tensor, hook: Any) -> None:
    hook.ctx["left behind"] = tensor
    raise Boom(hook.name)


def forward(model: Any, inputs: Sequence, name: str) -> None:
    model.run_with_hooks(*inputs, fwd_hooks=[(name, boom)])


def forward_cached(model: Any, inputs: Sequence, name: str) -> None:
    with model.hooks([(name, boom)]):
        model.run_with_cache(*inputs, names_filter=[name])


def backward(model: Any, inputs: Sequence, name: str) -> None:
    with model.hooks(bwd_hooks=[(name, boom)]):
        model(*inputs, return_type="loss").backward()


def backward_cached(model: Any, inputs: Sequence, name: str) -> None:
    with model.hooks(bwd_hooks=[(name, boom)]):
        model.run_with_cache(*inputs, return_type="loss", incl_bwd=True, names_filter=[name])


RUNS: tuple[Callable, ...] = (forward, forward_cached, backward, backward_cached)


def exceptions(variants: Iterable[Variant]) -> Campaign:
    """Raise at every hook of every model, in four kinds of runs."""
    found = Campaign(
        claim="A failing hook leaves nothing behind",
        tried="an exception raised at every hook point of every model configuration, forward and "
        "backward, in hooked and in cached runs; two hooks of the user attached before",
        target="0 hooks and 0 context entries left; the user's hooks and notes survive; outputs "
        "bitwise unchanged",
    )
    with found.timed():
        for variant in variants:
            model = variant.factory().eval()
            first = next(iter(model.hook_dict))
            model.add_perma_hook(first, lambda t, hook: t * 2)
            model.add_hook(first, lambda t, hook: t + 1)
            model.hook_dict[first].ctx["mine"] = 1
            before, attached = model(*variant.inputs), list(model._handles())
            found.count("configurations")
            for name in model.hook_dict:
                found.count("hook points")
                for run in RUNS:
                    found.count("exceptions")
                    where = f"{variant.name} {name} {run.__name__}"
                    try:
                        run(model, variant.inputs, name)
                        found.expect(False, f"{where}: nothing was raised")
                    except Boom:
                        pass
                    _inspect(found, model, attached, first, where)
                model.zero_grad(set_to_none=True)
                same = torch.equal(model(*variant.inputs), before)
                found.expect(same, f"{variant.name} {name}: the output changed")
    return found


def _inspect(found: Campaign, model: Any, attached: list, first: str, where: str) -> None:
    """What is attached, and what hooks left in their contexts."""
    found.expect(list(model._handles()) == attached, f"{where}: other hooks are attached")
    contexts = {name: point.ctx for name, point in model.hook_dict.items() if point.ctx}
    found.expect(contexts == {first: {"mine": 1}}, f"{where}: contexts {list(contexts)}")
    torch_hooks = sum(len(p._forward_hooks) + len(p._backward_hooks) for p in model.hook_points())
    found.expect(torch_hooks == 2, f"{where}: {torch_hooks} torch hooks instead of 2")


def writers(tensor: torch.Tensor, hook: Any) -> None:
    tensor.mul_(1.5)


def writers_through_data(tensor: torch.Tensor, hook: Any) -> None:
    tensor.data.mul_(1.5)


def aliasing(variants: Iterable[Variant]) -> Campaign:
    """Write in place behind every cached tensor."""
    found = Campaign(
        claim="A cached tensor never changes",
        tried="at every hook point of every model configuration a hook that caches, then hooks "
        "that write in place (also through .data), then another that caches; then an in-place "
        "update of all weights",
        target="0 cached tensors that differ from what their hook saw; the edits count",
    )
    with found.timed():
        for variant in variants:
            model = variant.factory().eval()
            found.count("configurations")
            for write in (writers, writers_through_data):
                _write_behind(found, model, variant, write)
    return found


def _write_behind(found: Campaign, model: Any, variant: Variant, write: Callable) -> None:
    caches: tuple[dict, dict] = ({}, {})
    seen: tuple[dict, dict] = ({}, {})
    hooks: list = []
    for name in model.hook_dict:
        for turn in (0, 1):
            keep = lambda t, hook, s=seen[turn]: s.update({hook.name: t.clone()})  # noqa: E731
            hooks += [(name, caching_hook(caches[turn])), (name, keep)]
            hooks += [(name, write)] if turn == 0 else []
    try:
        model.run_with_hooks(*variant.inputs, fwd_hooks=hooks)
    except RuntimeError as error:  # autograd refuses a write into what it needs
        found.expect(False, f"{variant.name}: {error}")
        return
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.01)
    for name in model.hook_dict:
        for turn in (0, 1):
            found.count("cached tensors")
            same = torch.equal(caches[turn][name], seen[turn][name])
            found.expect(same, f"{variant.name} {name}: the cached tensor changed")
        finite = caches[0][name].isfinite() & (caches[0][name] != 0)
        off = caches[1][name][finite] - 1.5 * caches[0][name][finite]
        acted = not off.numel() or float(off.abs().max()) <= 1e-4
        found.expect(acted, f"{variant.name} {name}: the edit did not count")


def main(variants: Sequence[Variant] = tuple(VARIANTS)) -> Iterable[Campaign]:
    yield exceptions(variants)
    yield aliasing(variants)


if __name__ == "__main__":
    script(main)
