"""Which lag does tap i of a convolution read? Answered from its cached activations alone.

A kernel of K taps can look only back (causal) or also ahead ("same" padding); the weights do not
tell. Leaves out what is made of the kernel: `kinds`, `analysis.kernels`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


def kernel_lags(cache: Mapping[str, Tensor] | Any, layer: str) -> list[int]:
    """Lags of the taps of `{layer}.hook_kernel`, found by convolving `hook_in` into `hook_out`.

    Tap i reads lag i - f for some number f of future taps; f is the one for which
    out[t, c] = Σ_i kernel[c, i] · in[t - i + f, c] (+ a constant per channel) holds.

    Raises:
        ValueError: if `hook_in` or `hook_out` is not cached, no f fits (something edited them), or
            several do (one position, a kernel of zeros)
    """
    names = [f"{layer}.{point}" for point in ("hook_in", "hook_kernel", "hook_out")]
    missing = [name for name in names if name not in list(cache.keys())]
    if missing:
        raise ValueError(f"lags of {layer!r} need {missing} in the cache")
    rounding = max(torch.finfo(cache[name].dtype).eps for name in names)
    x, kernel, out = (cache[name].double() for name in names)
    x, out = (t if t.ndim == 3 else t[None] for t in (x, out))
    checked_kernel(names[1], kernel)
    if x.shape != out.shape or x.shape[-1] != len(kernel):
        raise ValueError(
            f"{layer}: hook_in {list(x.shape)} and hook_out {list(out.shape)} must be "
            f"[batch pos channel] with the channels of hook_kernel {list(kernel.shape)}"
        )
    errors = [_misfit(x, kernel, out, f) for f in range(kernel.shape[1])]
    fitting = [f for f, error in enumerate(errors) if error <= max(1e-3, 4 * rounding)]
    if not fitting:
        flipped = min(_misfit(x, kernel.flip(-1), out, f) for f in range(kernel.shape[1]))
        advice = (
            "its taps stand in reverse, oldest first, as in nn.Conv1d: cache weight.flip(-1)"
            if flipped <= max(1e-3, 4 * rounding)
            else "was one of them edited by a hook?"
        )
        raise ValueError(
            f"{layer}: hook_out is not hook_in convolved with hook_kernel for any padding (best "
            f"misfit {min(errors):.1e}); {advice}"
        )
    if len(fitting) > 1:
        raise ValueError(
            f"{layer}: paddings with {fitting} taps ahead all turn hook_in {list(x.shape)} into "
            "hook_out; cache a longer sequence"
        )
    return [i - fitting[0] for i in range(kernel.shape[1])]


def _misfit(x: Tensor, kernel: Tensor, out: Tensor, future: int) -> float:
    """Relative error of the convolution with `future` taps ahead, a constant per channel aside."""
    length = x.shape[1]
    made = torch.zeros_like(out)
    for tap in range(kernel.shape[1]):
        lag = tap - future
        lo, hi = max(0, lag), min(length, length + lag)
        if lo < hi:
            made[:, lo:hi] += kernel[:, tap] * x[:, lo - lag : hi - lag]
    rest = out - made
    rest = rest - rest.mean((0, 1))
    return float(rest.norm() / (out - out.mean((0, 1))).norm().clamp_min(1e-30))


def checked_kernel(name: str, kernel: Tensor) -> Tensor:
    """A kernel of the right number of axes."""
    if kernel.ndim != 2 or not kernel.numel():
        raise ValueError(f"{name} must be [channel tap], got {list(kernel.shape)}")
    return kernel
