"""What the kernel of a convolution says about smearing, and how far it can be trusted.

Leaves out what becomes of it in the keys (`analysis.smearing`) and removing lags from a running
model (`causal.lags`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float
from torch import Tensor

from smearlens._explain import explained, require_cache
from smearlens.analysis.mixing.bands import checked_kernel, kernel_lags
from smearlens.analysis.stats import bootstrap_interval


@dataclass(frozen=True)
class KernelProfile:
    """A depthwise kernel summarised by lag, every array [lag].

    Attributes:
        lags: in tokens; 1 is the previous token, negative lags read the future
        rms: root mean square over channels
        share: Σ_c w² at the lag over Σ w²
        mean_abs: mean over channels of |w|
        signed_mean: mean over channels of w. Not identifiable: flipping the sign of a channel and
            of what reads it changes this number and not the function; never judge by it
        low, high: 95 % bootstrap interval of the RMS over channels
        null_rms: RMS of an untrained kernel (uniform within ±1/√K)
        null_high: 97.5 % quantile of the RMS of untrained kernels of this size
        null_signed: 97.5 % quantile of |signed mean| of untrained kernels of this size
    """

    lags: list[int]
    rms: Float[Tensor, " lag"]
    share: Float[Tensor, " lag"]
    mean_abs: Float[Tensor, " lag"]
    signed_mean: Float[Tensor, " lag"]
    low: Float[Tensor, " lag"]
    high: Float[Tensor, " lag"]
    null_rms: float
    null_high: float
    null_signed: float

    @property
    def future_share(self) -> float:
        """Share of the squared weight on taps that read the future."""
        return float(sum(s for lag, s in zip(self.lags, self.share, strict=True) if lag < 0))

    def records(self) -> list[dict[str, Any]]:
        """One dictionary per lag."""
        columns = ("rms", "low", "high", "share", "mean_abs", "signed_mean")
        return [
            {"lag": lag, **{c: float(getattr(self, c)[i]) for c in columns}}
            for i, lag in enumerate(self.lags)
        ]

    def __repr__(self) -> str:
        lines = [" lag     rms  [95% interval]   share  signed mean"]
        lines += [
            f"{r['lag']:>4} {r['rms']:>7.3f}  [{r['low']:>6.3f}, {r['high']:>6.3f}] "
            f"{r['share']:>7.3f} {r['signed_mean']:>12.3f}"
            for r in self.records()
        ]
        lines.append(
            f"untrained: rms {self.null_rms:.3f} (97.5 % below {self.null_high:.3f}), "
            f"|signed mean| 97.5 % below {self.null_signed:.3f}"
        )
        return "\n".join(lines)


@explained
def kernel_profile(
    source: Mapping[str, Tensor] | Float[Tensor, "channel tap"] | Any,
    *,
    layer: str | None = None,
    lags: Sequence[int] | None = None,
) -> KernelProfile:
    """Profile of a depthwise kernel by lag, with interval and the null at initialisation.

    Args:
        source: a cache with `{layer}.hook_kernel`, or the weights [channel tap]
        layer: which convolution ("blocks.0.conv"); needed only if the cache holds several
        lags: lag of each tap. Default for a cache: found from the activations; for weights 0..K-1

    Raises:
        ValueError: if the cache holds no kernel, or several and `layer` is not given
    """
    if isinstance(source, Tensor):
        kernel = checked_kernel("source", source)
        lags = list(range(source.shape[1])) if lags is None else list(lags)
    else:
        require_cache("source", source)
        layer = only_layer(source, "hook_kernel", layer)
        kernel = checked_kernel(f"{layer}.hook_kernel", source[f"{layer}.hook_kernel"])
        lags = kernel_lags(source, layer) if lags is None else list(lags)
    kernel = kernel.detach().double()
    if len(lags) != kernel.shape[1]:
        raise ValueError(f"{len(lags)} lags for {kernel.shape[1]} taps; give one lag per tap")
    order = sorted(range(len(lags)), key=lambda i: lags[i])
    kernel = kernel[:, order]
    square = bootstrap_interval(kernel.square()).sqrt()
    null = _untrained(*kernel.shape)
    return KernelProfile(
        lags=[lags[i] for i in order],
        rms=kernel.square().mean(0).sqrt(),
        share=kernel.square().sum(0) / kernel.square().sum(),
        mean_abs=kernel.abs().mean(0),
        signed_mean=kernel.mean(0),
        low=square[:, 0],
        high=square[:, 1],
        null_rms=float((3 * kernel.shape[1]) ** -0.5),  # s.d. of uniform ± 1/√K
        null_high=float(np.quantile(np.sqrt((null**2).mean(1)), 0.975)),
        null_signed=float(np.quantile(np.abs(null.mean(1)), 0.975)),
    )


def only_layer(cache: Any, point: str, layer: str | None = None) -> str:
    """The one layer of a cache that has `point`, or `layer` if it has."""
    found = [
        name.removesuffix(f".{point}") for name in list(cache.keys()) if name.endswith(f".{point}")
    ]
    if layer is not None and layer in found:
        return layer
    if layer is None and len(found) == 1:
        return found[0]
    raise ValueError(
        f"layer={layer!r}: {point} is cached for {found or 'no layer'}; "
        + ("name one of them" if found else "run the model with that hook in names_filter")
    )


def _untrained(channels: int, taps: int, draws: int = 400) -> np.ndarray:
    """One tap of `draws` untrained kernels, [draw channel]: uniform within ±1/√K."""
    return np.random.default_rng(0).uniform(-(taps**-0.5), taps**-0.5, (draws, channels))
