"""Views of attention, states, kernels and tokens that work offline in notebooks and pages.

Each function checks its input, packs it and returns a `Widget`. The script they share is
`assets/widgets.js`. Leaves out: matplotlib plots (`plots.py`) and metrics (`smearlens.analysis`).
"""

from __future__ import annotations

from collections.abc import Sequence

from smearlens._explain import explained
from smearlens.analysis.similarity import Similarity
from smearlens.viz._build import Look, Mask, View, attention, build, names
from smearlens.viz._payload import Scale, Values, as_array, check_tokens, number
from smearlens.viz._strips import delta_strip, kernel_profile, tokens
from smearlens.viz._widget import Widget, page_bundle

__all__ = [
    "Widget",
    "attention_heads",
    "attention_pattern",
    "delta_strip",
    "evolution",
    "kernel_profile",
    "layer_similarity",
    "page_bundle",
    "state_map",
    "tokens",
]


@explained
def attention_heads(
    pattern: Values,
    query_tokens: Sequence[str],
    key_tokens: Sequence[str] | None = None,
    *,
    mask: Mask = "none",
    labels: Sequence[str] | None = None,
    normalised: bool = True,
    scale: Scale = "linear",
    exact: bool = False,
    title: str = "",
    max_width: int = 720,
) -> Widget:
    """A grid of heads; hover to see one large, click to lock it, click another to compare.

    Under each head of self-attention stands the stripe with the largest mean weight: `lag 1: 0.93`
    is a previous-token head; an induction head on repeated blocks of T tokens shows lag T - 1.

    Args:
        pattern: `[head query key]` or `[layer head query key]` (slider over layers); to see all
            layers at once pass `pattern.flatten(0, 1)`. What a cache holds is `[batch head query
            key]`: one example is taken as it is, of several pick one, `pattern[0]`, or they are
            shown as if they were layers
        query_tokens: one string per query
        key_tokens: one string per key in cross attention, where lags have no meaning; `None` is
            self-attention
        mask: `"causal"` leaves out the keys after the query
        labels: names of the heads
        normalised: rows must sum to 1 (else a warning); False for signed or unnormalised maps.
            Negative values always get a diverging scale
        scale: `"sqrt"` lifts weak weights
        exact: 16 instead of 8 bits per weight
        title: shown above
        max_width: in CSS pixels

    Raises:
        ValueError: on shapes, tokens or masks that do not fit, non-finite values, too many cells
    """
    values = as_array("pattern", pattern, "[head query key] or [layer head query key]")
    values = values.reshape(-1, *values.shape[-3:])
    return attention(
        "attention_heads",
        values,
        (query_tokens, key_tokens),
        mask,
        Look(title, max_width, scale, 16 if exact else 8),
        labels=labels,
        frames=[f"layer {i}" for i in range(len(values))],
        normalised=normalised,
    )


@explained
def attention_pattern(
    pattern: Values,
    query_tokens: Sequence[str],
    key_tokens: Sequence[str] | None = None,
    *,
    mask: Mask = "none",
    normalised: bool = True,
    scale: Scale = "linear",
    exact: bool = False,
    title: str = "",
    max_width: int = 720,
) -> Widget:
    """One map `[query key]`, large, with its tokens; arguments as in `attention_heads`."""
    values = as_array("pattern", pattern, "[query key]")
    return attention(
        "attention_pattern",
        values[None, None],
        (query_tokens, key_tokens),
        mask,
        Look(title, max_width, scale, 16 if exact else 8),
        labels=None,
        frames=[""],
        normalised=normalised,
    )


@explained
def evolution(
    pattern: Values,
    steps: Sequence[int],
    query_tokens: Sequence[str],
    key_tokens: Sequence[str] | None = None,
    *,
    mask: Mask = "none",
    labels: Sequence[str] | None = None,
    normalised: bool = True,
    scale: Scale = "linear",
    exact: bool = False,
    title: str = "",
    max_width: int = 720,
) -> Widget:
    """Heads through training: a slider over checkpoints, which starts at the last one.

    Args:
        pattern: `[checkpoint head query key]` on the same tokens, one colour scale for all
        steps: the training step of each checkpoint
        query_tokens: this and all others as in `attention_heads`
        key_tokens: see `attention_heads`
        mask: see `attention_heads`
        labels: see `attention_heads`
        normalised: see `attention_heads`
        scale: see `attention_heads`
        exact: see `attention_heads`
        title: see `attention_heads`
        max_width: see `attention_heads`
    """
    values = as_array("pattern", pattern, "[checkpoint head query key]")
    if len(steps) != len(values):
        raise ValueError(f"steps has {len(steps)} entries, but pattern {len(values)} checkpoints")
    return attention(
        "evolution",
        values,
        (query_tokens, key_tokens),
        mask,
        Look(title, max_width, scale, 16 if exact else 8),
        labels=labels,
        frames=[f"step {step:,}" for step in steps],
        start=len(steps) - 1,
        normalised=normalised,
    )


@explained
def layer_similarity(
    similarity: Similarity | Values,
    labels: Sequence[str] | None = None,
    column_labels: Sequence[str] | None = None,
    *,
    title: str = "",
    max_width: int = 560,
) -> Widget:
    """A matrix of similarities between layers, checkpoints or models.

    Args:
        similarity: what `smearlens.layer_similarity` returns, or `[row column]`; negative values
            get a diverging scale
        labels: names of the rows; by default the layers of a `Similarity`, else `layer 0`, …
        column_labels: names of the columns; the rows' names if the matrix is square
        title: shown above; by default the measure of a `Similarity`, with the range of its null
        max_width: in CSS pixels
    """
    if isinstance(similarity, Similarity):
        labels, title = labels or similarity.layers, title or _measured(similarity)
        similarity = similarity.values
    values = as_array("similarity", similarity, "[row column]")
    rows, columns = values.shape
    if column_labels is None and rows == columns:
        column_labels = labels
    view = View(
        rows=names("labels", labels, rows, "layer"),
        cols=names("column_labels", column_labels, columns, "layer"),
        cell=min(44.0, 400 / rows),
    )
    return build("layer_similarity", values[None, None], Look(title, max_width), view)


@explained
def state_map(
    state: Values,
    tokens: Sequence[str],
    *,
    labels: Sequence[str] | None = None,
    scale: Scale = "linear",
    title: str = "",
    max_width: int = 720,
) -> Widget:
    """The state of a state-space layer after each token.

    Args:
        state: `[pos d_state]`, or `[channel pos d_state]` for a grid of channels
        tokens: one string per position
        labels: names of the channels
        scale: `"sqrt"` lifts small values
        title: shown above
        max_width: in CSS pixels
    """
    values = as_array("state", state, "[pos d_state] or [channel pos d_state]")
    values = values.reshape(-1, *values.shape[-2:]).swapaxes(1, 2)[None]
    channels, width, length = values.shape[1:]
    view = View(
        rows=[f"state {i}" for i in range(width)],
        cols=check_tokens("tokens", tokens, length, "pos"),
        heads=names("labels", labels, channels, "channel"),
        words=("", "token"),
        strips=[{"keys": True, "word": ""}],
        cell=18.0,
        tall=min(16.0, max(4.0, 200 / width)),
        ratio=0.5,
    )
    return build("state_map", values, Look(title, max_width, scale, 8), view)


def _measured(similarity: Similarity) -> str:
    """The measure, and between which values its null lies."""
    null = [null for *_, null in similarity.pairs() if null is not None and null == null]
    return similarity.name + (f"; null {number(min(null))} to {number(max(null))}" if null else "")
