"""What a cached run needs: the memory of its activations, estimated; a loss to run backward from.

Works for any model with hooks. Leaves out the run itself (`models.base`) and the hook that caches.
"""

from __future__ import annotations

import inspect
import traceback
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

REFUSED = ("out of memory", "can't allocate memory", "not enough memory")  # how torch says it


class CacheMemoryError(MemoryError):
    """The activations of a cached run do not fit: says how large they are and what to do.

    Attributes:
        estimate: bytes of the activations that were asked for; None where it could not be made
    """

    def __init__(self, message: str, estimate: int | None):
        super().__init__(message, estimate)
        self.estimate = estimate

    def __str__(self) -> str:
        return self.args[0]


def cache_bytes(model: Any, *inputs: Tensor, names_filter: Any = None, **options: Any) -> int:
    """Bytes that `run_with_cache` of the same arguments keeps, found without computing anything.

    Shapes run through the model on torch's meta device, hooks included; no activation is made.

    >>> from smearlens import AttnAttn
    >>> model = AttnAttn.from_preset("cpu", d_vocab=64, n_ctx=32, n_heads=2)
    >>> cache_bytes(model, torch.zeros(5, 7).long(), names_filter="blocks.0.attn.hook_pattern")
    1960

    Args:
        model: a `HookedModel`
        *inputs: arguments of its forward pass
        names_filter: as of `run_with_cache`; default all
        **options: further arguments of the forward pass

    Returns:
        the sum over activations; gradients (`incl_bwd`) take as much again

    Raises:
        ValueError: as `run_with_cache`
    """
    kept: dict[str, int] = {}

    wanted = set(model._match(names_filter, "names_filter"))

    def count(tensor: Tensor, hook: Any) -> None:
        if hook.name in wanted:
            kept[hook.name] = tensor.numel() * tensor.element_size()

    weights = {name: t.to("meta") for name, t in model.state_dict(keep_vars=True).items()}
    buffers = {name: t.to("meta") for name, t in model.named_buffers()}
    given = [t.to("meta") if isinstance(t, Tensor) else t for t in inputs]
    more = {n: t.to("meta") if isinstance(t, Tensor) else t for n, t in options.items()}
    if "return_type" in inspect.signature(model.forward).parameters:
        more["return_type"] = "logits"  # a loss reads values
    with torch.no_grad(), model.hooks([(lambda name: True, count)]):  # no fused path: plain torch
        torch.func.functional_call(
            model, {**weights, **buffers}, tuple(given), more, tie_weights=False
        )
    return sum(kept.values())


@contextmanager
def memory_explained(
    model: Any,
    inputs: tuple,
    options: dict[str, Any],
    names: Iterable[str],
    kept: dict[str, Tensor],
    incl_bwd: bool,
) -> Iterator[None]:
    """Turn torch's answer to too little memory into a `CacheMemoryError`, and let go of `kept`."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:  # torch.OutOfMemoryError is a RuntimeError
        if isinstance(error, CacheMemoryError) or not _refused(error):
            raise
        kept.clear()
        traceback.clear_frames(error.__traceback__)  # the tensors that the failed run still holds
        size = _estimate(model, inputs, options, list(names))
        text = "of unknown size" if size is None else f"{size / 2**20:,.1f} MiB"
        raise CacheMemoryError(
            f"out of memory while caching {text} of activations"
            + (", and gradients as large" if incl_bwd else "")
            + f" ({str(error).splitlines()[0][:120]}); name fewer hooks in names_filter, keep some "
            "positions only with pos_slice, or run fewer or shorter sequences at a time",
            size,
        ) from error


def require_scalar(output: Any) -> None:
    """Raise a ValueError unless `output` is something to run backward from."""
    if not (isinstance(output, Tensor) and output.numel() == 1 and output.requires_grad):
        given = list(output.shape) if isinstance(output, Tensor) else type(output).__name__
        raise ValueError(
            f"incl_bwd runs backward from a scalar that depends on weights, got {given}; "
            "pass return_type='loss', and enable gradients"
        )


def _refused(error: Exception) -> bool:
    return isinstance(error, MemoryError) or any(words in str(error) for words in REFUSED)


def _estimate(model: Any, inputs: tuple, options: dict, names: list[str]) -> int | None:
    """`cache_bytes`, or None where the model cannot run without values."""
    plain = {name: value for name, value in options.items() if name != "return_type"}
    try:
        return cache_bytes(model, *inputs, names_filter=names, **plain)
    except Exception:  # the error that is being explained matters more
        return None
