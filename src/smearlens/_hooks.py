"""The one door to TransformerLens: no other file imports `transformer_lens`.

Contains `HookedRootModule` and `ActivationCache` as TransformerLens has them, and its `HookPoint`
made strict: a hook may edit or replace what it is given, and can neither change its shape nor
reach into a tensor that somebody has cached. TransformerLens keeps these names across its major
versions; its model classes and components come and go, so we take no others.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor
from transformer_lens import ActivationCache, HookedRootModule
from transformer_lens.hook_points import HookPoint as LensHookPoint
from transformer_lens.hook_points import LensHandle

__all__ = ["ActivationCache", "HookPoint", "HookedRootModule", "is_hooked", "reads_only"]


class HookPoint(LensHookPoint):
    """An identity through which one intermediate passes: the place to read or to edit it.

    A hook is called as `hook(tensor, hook=point)`. It may return a tensor of the same shape, edit
    the tensor in place, or return None. It works on a copy of its own, so that caches made before
    keep what they saw (several names can hold one tensor, as `hook_resid_post` of a block and
    `hook_resid_pre` of the next do).
    """

    def add_hook(self, hook: Callable, dir: str = "fwd", *args, **kwargs) -> LensHandle:
        """Attach `hook` as TransformerLens does; forward hooks are wrapped with the checks."""
        safe = hook if dir == "bwd" or getattr(hook, "reads_only", False) else _checked(hook)
        handle = super().add_hook(safe, dir, *args, **kwargs)
        handle.user_hook = hook
        return handle


def is_hooked(point: LensHookPoint) -> bool:
    """Whether anything, forward or backward, is attached to `point`, by whatever call."""
    return bool(point._forward_hooks or point._backward_hooks)


def reads_only(hook: Callable) -> Callable:
    """Mark `hook` as one that never edits what it is given, which spares it the private copy."""
    hook.reads_only = True  # pyrefly: ignore[missing-attribute]
    return hook


def _checked(hook: Callable) -> Callable:
    """`hook` on a private copy, its result checked."""

    def checked(value: Tensor, hook: LensHookPoint) -> Tensor | None:
        own = value.clone()
        untouched = own._version
        result = call(own, hook=hook)
        if result is None:
            return None if own._version == untouched else own  # an edit in place counts too
        if not isinstance(result, Tensor):
            raise TypeError(
                f"hook on {hook.name!r} returned {type(result).__name__}; "
                "return a tensor of the same shape, or None to leave the activation as it is"
            )
        if result.shape != value.shape:
            raise ValueError(
                f"hook on {hook.name!r} returned shape {tuple(result.shape)} for an activation of "
                f"shape {tuple(value.shape)}; return a tensor of the same shape"
            )
        return result

    call = hook
    return checked
