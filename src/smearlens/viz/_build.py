"""From checked arrays to a `Widget`: the fields that the script and the picture read.

Leaves out: the public functions and their arguments (`widgets.py`), packing (`_payload.py`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, TypeAlias

import numpy as np
from jaxtyping import Float32

from smearlens._explain import warn
from smearlens.viz._payload import (
    check_tokens,
    colour_stops,
    number,
    pack,
    visible,
)
from smearlens.viz._png import margin
from smearlens.viz._widget import Widget

Mask: TypeAlias = Literal["none", "causal"]
Maps: TypeAlias = Float32[np.ndarray, "frame head query key"]

ROW_SUM_TOLERANCE = 0.02  # a softmax in bfloat16 is off by up to 0.01


@dataclass(frozen=True)
class Look:
    """What does not change the numbers: title, width, colour scale, bits per number."""

    title: str
    max_width: int
    scale: str = "linear"
    bits: int = 16


@dataclass(frozen=True, kw_only=True)
class View:
    """What the script and the picture read beside the numbers. Absent fields do not apply."""

    rows: list[str]  # names of the queries, or one empty name
    cols: list[str] | None = None  # names of the keys; None: those of the rows
    heads: list[str] = field(default_factory=lambda: [""])
    frames: list[str] = field(default_factory=lambda: [""])  # slider: layers, checkpoints, series
    start: int = 0  # the frame shown first
    words: tuple[str, str] = ("", "")  # "query", "key": what rows and columns are; "" is obvious
    strips: list[dict[str, Any]] = field(default_factory=list)  # tokens as lines of text
    cell: float = 0.0  # largest width of a cell in pixels; 0: no map, strips only
    tall: float = 0.0  # height of a cell; 0: square
    ratio: float = 1.0  # height of a small map over its width
    lags: bool = False  # rows and columns are the same positions
    causal: bool = False
    notes: list[list[str]] | None = None  # per frame and head, under the small map
    says: list[list[str]] | None = None  # per frame and column, in place of the usual words
    interval: list[list[list[float]]] | None = None  # per frame and bar
    band: list[list[float]] | None = None  # null, per bar
    future: int = 0  # the first bars, which read the future


def build(
    kind: str,
    values: Maps,
    look: Look,
    view: View,
    limits: tuple[float, float] | None = None,
) -> Widget:
    """Pack `values`; `limits` is the range of bars, which have no colour scale."""
    signed = bool(values.min() < 0)
    top = float(np.abs(values).max()) or 1.0
    packed = pack(values, *(limits or (-top if signed else 0.0, top)), look.bits)
    cols = view.cols or view.rows
    payload = {
        **{name: value for name, value in asdict(view).items() if value is not None},
        **packed,
        "title": visible(look.title) if look.title else "",
        "shape": list(values.shape),
        "columns": math.ceil(len(view.heads) / math.ceil(len(view.heads) / 8)),
        "notes": view.notes or [[""] * len(view.heads)] * len(view.frames),
        "left": margin(view.rows),
        "foot": margin(cols),
        "colors": colour_stops(signed, look.scale),
    }
    if limits is None:
        payload["ends"] = [number(packed["low"]), number(packed["high"])]
    size = " x ".join(str(n) for n in values.shape if n > 1) or "1"
    summary = f"{kind}: {size} values from {values.min():.3g} to {values.max():.3g}"
    return Widget(payload, values, summary, look.max_width)


def attention(
    kind: str,
    values: Maps,
    token_lists: tuple[Sequence[str], Sequence[str] | None],
    mask: str,
    look: Look,
    *,
    labels: Sequence[str] | None,
    frames: list[str],
    start: int = 0,
    normalised: bool,
) -> Widget:
    """Maps from queries to keys, with lags where both are the same tokens."""
    heads, queries, keys = values.shape[1:]
    rows, cols, strips = _axes(queries, keys, *token_lists)
    cross = cols is not None
    _check_mask(values, mask)
    if normalised:
        _check_row_sums(values)
    view = View(
        rows=rows,
        cols=cols,
        heads=names("labels", labels, heads, "head"),
        frames=frames,
        start=start,
        words=("query", "key"),
        strips=strips,
        cell=min(28.0, 400 / queries),
        ratio=min(2.0, max(0.25, queries / keys)),
        lags=not cross,
        causal=mask == "causal",
        notes=None if cross else _peaks(values, mask),
    )
    return build(kind, values, look, view)


def _axes(
    queries: int, keys: int, query_tokens: Sequence[str], key_tokens: Sequence[str] | None
) -> tuple[list[str], list[str] | None, list[dict[str, Any]]]:
    """Row names, column names (None: the rows') and the token strips to hover."""
    rows = check_tokens("query_tokens", query_tokens, queries, "query")
    if key_tokens is not None:
        cols = check_tokens("key_tokens", key_tokens, keys, "key")
        return rows, cols, [
            {"queries": True, "word": "query tokens"}, {"keys": True, "word": "key tokens"}
        ]  # fmt: skip
    if queries != keys:
        raise ValueError(
            f"pattern has {queries} queries and {keys} keys; pass key_tokens for cross attention"
        )
    word = "hover a token: its attention to the others"
    return rows, None, [{"queries": True, "keys": True, "word": word}]


def names(name: str, labels: Sequence[str] | None, count: int, word: str) -> list[str]:
    """The labels, checked, or `word 0`, `word 1`, …; one unnamed thing has no name."""
    if labels is None:
        return [f"{word} {i}" for i in range(count)] if count > 1 else [""]
    return check_tokens(name, labels, count, word)


def _check_mask(values: Maps, mask: str) -> None:
    if mask not in ("none", "causal"):
        raise ValueError(f"mask must be 'none' or 'causal', got {mask!r}")
    queries, keys = values.shape[2:]
    if mask == "none":
        return
    if queries != keys:
        raise ValueError(f"mask='causal' needs a square pattern, got {queries} x {keys}")
    hidden = np.abs(np.triu(values, 1)).sum(-1)
    if hidden.max() > ROW_SUM_TOLERANCE:
        frame, head, query = np.unravel_index(hidden.argmax(), hidden.shape)
        warn(
            f"mask='causal' hides up to {hidden.max():.3g} of a row (frame {frame}, head {head}, "
            f"query {query}); this pattern reads the future, pass mask='none'"
        )


def _check_row_sums(values: Maps) -> None:
    error = np.abs(values.sum(-1, dtype=np.float64) - 1)
    if error.max() > ROW_SUM_TOLERANCE:
        frame, head, query = np.unravel_index(error.argmax(), error.shape)
        total = values[frame, head, query].sum()
        warn(
            f"rows of an attention pattern should sum to 1, but frame {frame}, head {head}, query "
            f"{query} sums to {total:.3g}; pass normalised=False for signed or unnormalised maps"
        )


def _peaks(values: Maps, mask: str) -> list[list[str]]:
    """Per frame and head the stripe with the largest mean weight: a lag or the first key.

    Only lags that at least a quarter of the queries have, or else a corner of one cell would win.
    """
    length = values.shape[-1]
    most = length - math.ceil(length / 4)
    lags = range(0 if mask == "causal" else -most, most + 1)
    means = [values.diagonal(-lag, 2, 3).mean(-1) for lag in lags]
    means.append(values[:, :, 1:, 0].mean(-1) if length > 1 else 0 * means[0])
    stripes = [*(f"lag {lag}" for lag in lags), "key 0"]
    best = np.abs(means).argmax(0)
    return [
        [
            f"{stripes[i]}: {means[i][frame, head]:.2f}".replace("-", "−")
            for head, i in enumerate(row)
        ]
        for frame, row in enumerate(best)
    ]
