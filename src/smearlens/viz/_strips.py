"""Widgets made of a line of tokens or lags: coloured text, step sizes, kernels.

Leaves out: maps (`widgets.py`, which is the module to import from).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float32

from smearlens._explain import explained
from smearlens.analysis.kernels import KernelProfile
from smearlens.viz._build import Look, View, build, names
from smearlens.viz._payload import Scale, Values, as_array, check_tokens, number
from smearlens.viz._widget import Widget


@explained
def tokens(
    tokens: Sequence[str],
    values: Values,
    *,
    labels: Sequence[str] | None = None,
    scale: Scale = "linear",
    title: str = "",
    max_width: int = 720,
) -> Widget:
    """Text with a colour behind each token: losses, scores, differences.

    Args:
        tokens: one string per position
        values: `[pos]`, or `[series pos]` for a slider over series on one colour scale
        labels: names of the series
        scale: `"sqrt"` lifts small values
        title: shown above, with the unit
        max_width: in CSS pixels
    """
    array = as_array("values", values, "[pos] or [series pos]")
    array = array.reshape(-1, array.shape[-1])
    view = View(
        rows=[""],
        cols=check_tokens("tokens", tokens, array.shape[1], "pos"),
        frames=names("labels", labels, len(array), "series"),
        words=("", "token"),
        strips=[{"keys": True, "word": ""}],
    )
    return build("tokens", array[:, None, None], Look(title, max_width, scale), view)


@explained
def delta_strip(
    delta: Values,
    tokens: Sequence[str],
    *,
    labels: Sequence[str] | None = None,
    title: str = "step size Δ",
    max_width: int = 720,
) -> Widget:
    """The step size Δ of a state-space layer as a bar above each token.

    A large step writes the token and forgets the past; a step near 0 passes it over.

    Args:
        delta: `[pos]`, or `[channel pos]` for a slider over channels, after the softplus
        tokens: one string per position
        labels: names of the channels
        title: shown above
        max_width: in CSS pixels
    """
    array = as_array("delta", delta, "[pos] or [channel pos]")
    array = array.reshape(-1, array.shape[-1])
    if array.min() < 0:
        raise ValueError(
            f"delta must be >= 0, got {array.min():.3g}; pass hook_delta, not hook_delta_raw"
        )
    top = float(array.max()) or 1.0
    view = View(
        rows=[""],
        cols=check_tokens("tokens", tokens, array.shape[1], "pos"),
        frames=names("labels", labels, len(array), "channel"),
        words=("", "token"),
        strips=[{"keys": True, "bars": 36, "word": f"bars from 0 to {number(top)}"}],
    )
    return build("delta_strip", array[:, None, None], Look(title, max_width), view, (0.0, top))


@explained
def kernel_profile(
    profile: KernelProfile | Values,
    lags: Sequence[int] | None = None,
    *,
    low: Values | None = None,
    high: Values | None = None,
    null: tuple[Values | float | int, Values | float | int] | None = None,
    labels: Sequence[str] | None = None,
    title: str = "RMS weight",
    max_width: int = 560,
) -> Widget:
    """A convolution kernel by lag: bar, interval, null band; future lags in orange.

    Args:
        profile: what `smearlens.kernel_profile` returns: its RMS by lag, interval and null; or
            numbers `[lag]`, or `[series lag]` for a slider over layers or checkpoints
        lags: of numbers, the lag of each entry in tokens; 1 is the previous token, negative is the
            future
        low: lower ends of the intervals, shaped as `profile`
        high: upper ends
        null: lower and upper end of the grey band, numbers or one per lag
        labels: names of the series
        title: shown above, with the quantity
        max_width: in CSS pixels

    Raises:
        ValueError: if shapes differ, lags are missing or repeat, or a lower end is above its upper
            one
    """
    if (lags is None) != isinstance(profile, KernelProfile):
        raise ValueError("lags belong to numbers, one for each; a KernelProfile has its own")
    if isinstance(profile, KernelProfile):
        if low is None and high is None:
            low, high = profile.low, profile.high
        null = (profile.null_rms, profile.null_high) if null is None else null
        profile, lags = profile.rms, profile.lags
    values = as_array("profile", profile, "[lag] or [series lag]")
    values = values.reshape(-1, values.shape[-1])
    order, known = _sorted_lags(lags or [], values.shape[1])
    ends = _ranges("low and high", low, high, values.shape, order)
    band = _ranges("null", *(null or (None, None)), values.shape, order)
    values = values[:, order]
    reach = np.concatenate([p.ravel() for p in (values, ends, band, np.zeros(1)) if p is not None])
    limits = (float(reach.min()), float(reach.max()) or float(not reach.any()))
    word = f"bars from {number(limits[0])} to {number(limits[1])}; lag 1 is the previous token"
    view = View(
        rows=[""],
        cols=[f"{lag}".replace("-", "−") for lag in known],
        frames=names("labels", labels, len(values), "series"),
        strips=[{"keys": True, "bars": 130, "wide": 40, "word": word + ", orange the future"}],
        says=_describe(values, known, ends, band),
        interval=None if ends is None else ends.tolist(),
        band=None if band is None else band[0].tolist(),
        future=sum(lag < 0 for lag in known),
    )
    return build("kernel_profile", values[:, None, None], Look(title, max_width), view, limits)


def _sorted_lags(lags: Sequence[int], count: int) -> tuple[list[int], list[int]]:
    """The order that sorts the lags, and the sorted lags."""
    if len(lags) != count or len(set(lags)) != count:
        raise ValueError(f"lags must be {count} different integers, got {list(lags)}")
    order = sorted(range(count), key=lambda i: lags[i])
    return order, [lags[i] for i in order]


def _ranges(
    name: str,
    low: Values | float | int | None,
    high: Values | float | int | None,
    shape: tuple[int, ...],
    order: list[int],
) -> Float32[np.ndarray, "series lag 2"] | None:
    """Lower and upper ends for each value in order, if given; numbers and one row are repeated."""
    if low is None and high is None:
        return None
    if low is None or high is None:
        raise ValueError(f"{name} must be given together, got only one of them")
    ends = []
    for end in (low, high):
        if isinstance(end, (int, float)):
            end = np.full(1, end)
        array = as_array(name, end, "[lag] or [series lag]")
        try:
            ends.append(np.broadcast_to(array, shape))
        except ValueError:
            raise ValueError(
                f"{name} must fit the profile of shape {shape}, got {array.shape}"
            ) from None
    if (ends[0] > ends[1]).any():
        series, lag = np.argwhere(ends[0] > ends[1])[0]
        raise ValueError(f"{name}: the lower end is above the upper one at [{series}, {lag}]")
    return np.stack(ends, -1)[:, order]


def _describe(
    values: Float32[np.ndarray, "series lag"],
    lags: list[int],
    interval: Float32[np.ndarray, "series lag 2"] | None,
    band: Float32[np.ndarray, "series lag 2"] | None,
) -> list[list[str]]:
    """A sentence per bar, such as `lag 1: 0.62 in [0.55, 0.7], null [0, 0.1]`."""

    def sentence(series: int, i: int) -> str:
        parts = [f"lag {lags[i]}: {values[series, i]:.3g}"]
        for ends, words in ((interval, " in [{:.3g}, {:.3g}]"), (band, ", null [{:.3g}, {:.3g}]")):
            if ends is not None:
                parts.append(words.format(*ends[series, i]))
        return "".join(parts).replace("-", "−") + (" (future)" if lags[i] < 0 else "")

    return [[sentence(series, i) for i in range(len(lags))] for series in range(len(values))]
