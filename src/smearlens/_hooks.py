"""The one door to TransformerLens: no other file imports `transformer_lens`.

Contains `HookedRootModule` and `ActivationCache` as TransformerLens has them, its `HookPoint` made
strict: a hook may edit or replace what it is given, and can neither change its shape nor reach into
a tensor that somebody has cached; and the hook that caches. TransformerLens keeps these names
across its major versions; its model classes and components come and go, so we take no others.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformer_lens import ActivationCache, HookedRootModule
from transformer_lens.hook_points import HookPoint as LensHookPoint
from transformer_lens.hook_points import LensHandle
from transformer_lens.utilities import Slice

__all__ = ["ActivationCache", "HookPoint", "HookedRootModule", "caching_hook", "is_hooked"]


class HookPoint(LensHookPoint):
    """An identity through which one intermediate passes: the place to read or to edit it.

    A hook is called as `hook(tensor, hook=point)`. It may return a tensor of the same shape, edit
    the tensor in place, or return None. It works on a copy of its own, so that caches made before
    keep what they saw (several names can hold one tensor, as `hook_resid_post` of a block and
    `hook_resid_pre` of the next do). The model goes on with that copy: an edit in place counts, and
    a gradient reaches what a hook has put aside.
    """

    def __call__(self, value: Tensor) -> Tensor:
        """Hand `value` on; a third of the cost of a module call while nothing is attached."""
        return super().__call__(value) if is_hooked(self) else value

    def add_hook(
        self, hook: Callable, dir: Literal["fwd", "bwd"] = "fwd", *args, **kwargs
    ) -> LensHandle:
        """Attach `hook` as TransformerLens does, wrapped with the checks."""
        if not callable(hook):
            raise TypeError(
                f"a hook is called as hook(tensor, hook=point); got {hook!r} for {self.name!r}"
            )
        if dir not in ("fwd", "bwd"):
            raise ValueError(f"dir must be 'fwd' or 'bwd', got {dir!r}")
        safe = hook if getattr(hook, "reads_only", False) else _checked(hook, dir)
        handle = super().add_hook(safe, dir, *args, **kwargs)
        handle.user_hook = hook
        return handle


def is_hooked(point: nn.Module) -> bool:
    """Whether anything, forward or backward, is attached to `point`, by whatever call."""
    return bool(
        point._forward_hooks
        or point._backward_hooks
        or point._forward_pre_hooks
        or point._backward_pre_hooks
    )


def caching_hook(
    cache: dict[str, Tensor],
    *,
    backward: bool = False,
    device: torch.device | str | None = None,
    remove_batch_dim: bool = False,
    pos_slice: Any = None,
) -> Callable:
    """A hook that puts what it sees into `cache` under its name, or `name_grad` if `backward`.

    `remove_batch_dim` and `pos_slice` leave weights, which have at most two axes, as they are.
    """
    try:
        positions = Slice.unwrap(pos_slice)
    except ValueError as error:
        raise ValueError(
            f"pos_slice must be a position, (start, stop) or a list of positions, got {pos_slice!r}"
        ) from error

    def save(value: Tensor, hook: LensHookPoint) -> None:
        name, kept = str(hook.name), value.detach().to(device)
        activation = kept.ndim > 2  # [batch ...]
        if activation and pos_slice is not None:
            axis = 2 if name.endswith(("hook_attn_scores", "hook_pattern")) else 1
            try:
                kept = positions.apply(kept, dim=axis).clone()  # a view would hold on to the rest
            except IndexError as error:
                raise ValueError(
                    f"pos_slice={pos_slice!r} is outside the {kept.shape[axis]} positions of {name}"
                ) from error
        if activation and remove_batch_dim:
            kept = kept[0]
        cache[f"{name}_grad" if backward else name] = kept

    save.reads_only = True  # pyrefly: ignore[missing-attribute]
    return save


def _checked(hook: Callable, dir: str) -> Callable:
    """`hook` on a private copy, its result checked."""

    def checked(value: Tensor, hook: LensHookPoint) -> Tensor | None:
        own = value.clone()
        untouched = own._version if dir == "bwd" else None
        result = call(own, hook=hook)
        if dir == "bwd" and isinstance(result, tuple) and len(result) == 1:
            (result,) = result  # as torch has it
        if result is None:
            return None if dir == "bwd" and own._version == untouched else own
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
