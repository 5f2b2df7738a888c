"""Which lag does tap i of a convolution read? Answered from its cached activations alone.

A kernel of K taps can look only back (causal) or also ahead ("same" padding); the weights do not
tell. Leaves out what is made of the kernel: `analysis.mixing`, `analysis.kernels`.
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
        ValueError: if `hook_in` or `hook_out` is not cached, or no f fits (something edited them)
    """
    names = [f"{layer}.{point}" for point in ("hook_in", "hook_kernel", "hook_out")]
    missing = [name for name in names if name not in list(cache.keys())]
    if missing:
        raise ValueError(f"lags of {layer!r} need {missing} in the cache; or pass lags=[0, 1, …]")
    x, kernel, out = (cache[name].double() for name in names)
    x, out = (t[0] if t.ndim == 3 else t for t in (x, out))
    errors = {f: _misfit(x, kernel, out, f) for f in range(kernel.shape[1])}
    future, error = min(errors.items(), key=lambda item: item[1])
    if error > 1e-3:
        raise ValueError(
            f"{layer}: hook_out is not hook_in convolved with hook_kernel for any padding (best "
            f"misfit {error:.1e}); was one of them edited by a hook? pass lags=[0, 1, …] instead"
        )
    return [i - future for i in range(kernel.shape[1])]


def _misfit(x: Tensor, kernel: Tensor, out: Tensor, future: int) -> float:
    """Relative error of the convolution with `future` taps ahead, a constant per channel aside."""
    length = x.shape[0]
    made = torch.zeros_like(out)
    for tap in range(kernel.shape[1]):
        lag = tap - future
        lo, hi = max(0, lag), min(length, length + lag)
        if lo < hi:
            made[lo:hi] += kernel[:, tap] * x[lo - lag : hi - lag]
    rest = out - made
    rest = rest - rest.mean(0)
    return float(rest.norm() / (out - out.mean(0)).norm().clamp_min(1e-30))
