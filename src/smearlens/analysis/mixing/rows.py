"""The one path from rows of a mixing to `Scores`.

A per-head metric gives a value per row and says where it is defined. This file does the rest
alike: masks, signed maps, streaming (by channels, if many), chance (on uniform attention), control.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from smearlens.analysis.mixing.kinds import (
    BandMixing,
    DenseMixing,
    Mixing,
    SoftmaxMixing,
    UniformMixing,
)
from smearlens.analysis.mixing.layers import as_layers
from smearlens.analysis.mixing.options import RowOptions, fitted
from smearlens.analysis.mixing.state_space import (
    ROOM,
    ChannelMixing,
    require_weights,
    unsigned,
)
from smearlens.analysis.scores import Scores


@dataclass(frozen=True)
class RowBlock:
    """Some consecutive rows of a mixing, made ready for measuring.

    Attributes:
        weights: [batch head rows key]; keys that the options leave out are 0
        allowed: which keys each query may see, [batch or 1, 1, rows, key]
        full: which rows hold any weight and count as queries, [batch or mask, head, rows]
        start: query index of the first row
        n_queries: rows of the whole mixing
        crossed: whether queries and keys index different sequences
    """

    weights: Float[Tensor, "batch head rows key"]
    allowed: Bool[Tensor, "batch_or_1 1 rows key"]
    full: Bool[Tensor, "examples head rows"]
    start: int
    n_queries: int
    crossed: bool

    @property
    def query(self) -> Int[Tensor, "rows 1"]:
        """Query index of each row."""
        return torch.arange(self.start, self.start + self.weights.shape[-2])[:, None]

    @property
    def key(self) -> Int[Tensor, " key"]:
        """Key index of each column."""
        return torch.arange(self.weights.shape[-1])

    @property
    def lag(self) -> Int[Tensor, "rows key"]:
        """Query index minus key index; undefined, and an error, for cross attention."""
        if self.crossed:
            raise ValueError(
                "lags are undefined between two sequences; for cross attention give "
                "alignment_mass the alignment of target and source"
            )
        return self.query - self.key

    def at(self, target: Bool[Tensor, "..."]) -> tuple[Tensor, Tensor]:
        """Total weight on `target` [batch or 1, 1, rows, key], and where there is any target."""
        target = target & self.allowed
        return (self.weights * target).sum(-1), target.any(-1)


# Values, and where they are defined, each broadcastable to [batch head rows].
RowFunction = Callable[[RowBlock], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Metric:
    """A row function with the things a score is reported with."""

    name: str
    value: RowFunction
    control: RowFunction | None = None
    ceiling: Callable[[RowBlock], Tensor] | None = None  # None: 1 wherever it is defined
    divisor: Callable[[RowBlock], Tensor] | None = None  # what a row counts for; None: 1
    unit: str = "fraction"
    of_weights: bool = False  # means nothing for rows that do not sum to 1


def measure(source: Any, metric: Metric, options: RowOptions) -> Any:
    """`metric` of every layer in a cache as `Scores`, or of one pattern as a tensor.

    Args:
        source: a cache (mapping of hook names to tensors), a `Mixing`, or a pattern
            [batch head query key], [head query key] or [query key]
        metric: what to measure
        options: what to leave out

    Returns:
        `Scores`; for a tensor the values [batch head], without the axes it did not have
    """
    layers = as_layers(source, options)
    if isinstance(source, (Tensor, Mixing)):
        values = _measure_layer(layers[""], metric, options)[0]
        return values if isinstance(source, Mixing) else _drop_axes(values, source)
    measured = {name: _measure_layer(m, metric, options) for name, m in layers.items()}
    for name, mixing in layers.items():
        _require_examples(name, mixing, len(measured[name][0]))
    columns = list(zip(*([t.detach() for t in m] for m in measured.values()), strict=True))
    values, rows, chance, maximum, control = (
        dict(zip(measured, column, strict=True)) for column in columns
    )
    return Scores(
        metric.name, values, chance, maximum, control, rows, metric.unit, _note(layers, options)
    )


def row_block(mixing: Mixing, rows: Tensor, start: int, options: RowOptions) -> RowBlock:
    """Rows of `mixing` as weights, with `options` applied."""
    allowed = allowed_keys(mixing, start, rows.shape[-2], options).to(rows.device)
    if mixing.signed:
        seen = _seen(mixing, start, rows.shape[-2]).to(rows.device)
        rows = unsigned(rows, seen, options.normalise)
    plain = not (options.exclude_bos or options.exclude_self or options.key_mask is not None)
    if not plain:
        rows = rows * allowed
    raw = mixing.signed and options.normalise == "none"
    mass = (rows.abs() if raw else rows).sum(-1, keepdim=True)
    full = ((mass > 0) & mass.isfinite()).squeeze(-1)  # one bad entry spoils the sum
    if not plain and options.renormalise and not raw:
        rows = rows / mass.clamp_min(torch.finfo(mass.dtype).tiny)
    if options.query_mask is not None:
        mask = fitted("query_mask", options.query_mask, mixing, mixing.n_queries)
        full = full & mask[:, None, start : start + rows.shape[-2]]
    return RowBlock(rows, allowed, full, start, mixing.n_queries, mixing.crossed)


def row_blocks(mixing: Mixing, options: RowOptions) -> Iterator[RowBlock]:
    """All rows of `mixing`, block by block."""
    for start, stop, rows in mixing.blocks():
        _require_rows(mixing, rows, start, stop)
        yield row_block(mixing, rows, start, options)


def _require_rows(mixing: Mixing, rows: Tensor, start: int, stop: int) -> None:
    """Raise where a mixing of one's own does not hand out what its attributes announce."""
    if type(mixing).__module__.startswith("smearlens."):
        return
    kind = type(mixing).__name__
    wanted = [mixing.n_examples, mixing.n_heads, stop - start, mixing.n_keys]
    if list(rows.shape) != wanted or rows.dtype not in (torch.float32, torch.float64):
        raise ValueError(
            f"{kind}.rows({start}, {stop}) must be [batch head rows key] = {wanted} in float32 or "
            f"float64, got {list(rows.shape)} in {rows.dtype}"
        )
    if mixing.n_queries != mixing.n_keys and not mixing.crossed:
        raise ValueError(
            f"{kind} has {mixing.n_queries} queries and {mixing.n_keys} keys: set crossed = True, "
            "or hand out a row for every key"
        )
    if mixing.causal and bool((rows.triu(start + 1).abs() > 0).any()):
        raise ValueError(f"{kind} says causal = True, and rows({start}, {stop}) reads later keys")
    if mixing.signed:
        return
    if bool((rows < 0).any()) or bool((rows.sum(-1) > 1.01).any()):
        raise ValueError(
            f"rows({start}, {stop}) of {kind} are no weights (entries below 0, or sums above 1); "
            "set signed = True, and scores normalise them"
        )


def allowed_keys(
    mixing: Mixing, start: int, n_rows: int, options: RowOptions
) -> Bool[Tensor, "batch 1 rows key"]:
    """Keys that the mixing and the options leave to each query."""
    allowed, key = _seen(mixing, start, n_rows), torch.arange(mixing.n_keys)
    if options.exclude_self:
        if mixing.crossed:
            raise ValueError("exclude_self is undefined between two sequences (cross attention)")
        allowed = allowed & (key != torch.arange(start, start + n_rows)[:, None])
    if options.exclude_bos:
        allowed = allowed & (key > 0)
    allowed = allowed[None, None]
    if options.key_mask is not None:
        mask = fitted("key_mask", options.key_mask, mixing, mixing.n_keys)
        allowed = allowed & mask[:, None, None, :]
    return allowed


def _seen(mixing: Mixing, start: int, n_rows: int) -> Bool[Tensor, "rows key"]:
    """Keys that the mixing lets each query see."""
    seen = torch.ones(n_rows, mixing.n_keys, dtype=torch.bool)
    return seen.tril(start) if mixing.causal else seen


def _measure_layer(mixing: Mixing, metric: Metric, options: RowOptions) -> tuple[Tensor, ...]:
    """Values [example head], valid rows [example head], chance, maximum, control [head or 1]."""
    if metric.of_weights:
        require_weights(metric.name, mixing, options.normalise)
    parts = mixing.parts() if isinstance(mixing, (BandMixing, ChannelMixing)) else [mixing]
    columns = zip(*(_measure_heads(part, metric, options) for part in parts), strict=True)
    values, rows, maximum, control = (torch.cat(column, -1) for column in columns)
    return values, rows, _chance(mixing, metric, options), maximum, control


def _measure_heads(mixing: Mixing, metric: Metric, options: RowOptions) -> tuple[Tensor, ...]:
    """`_measure_layer` of all heads at once, chance left out."""
    sums = {key: _Mean(metric) for key in ("value", "maximum", "control")}
    for block in row_blocks(mixing, options):
        found, defined = metric.value(block)
        sums["value"].add(found, defined, block)
        best = torch.ones(()) if metric.ceiling is None else metric.ceiling(block)
        sums["maximum"].add(best, defined, block)
        if metric.control is not None:
            sums["control"].add(*metric.control(block), block)
    values = sums["value"].mean()
    values = values.expand(max(len(values), mixing.n_examples), mixing.n_heads).clone()
    rows = sums["value"].count.expand_as(values)
    maximum = sums["maximum"].mean().nanmean(0).expand(mixing.n_heads)
    control = sums["control"].mean().nanmean(0).expand(mixing.n_heads)  # NaN without a control
    return values, rows, maximum, control


def _chance(mixing: Mixing, metric: Metric, options: RowOptions) -> Float[Tensor, " one"]:
    """The metric of uniform attention over the same positions."""
    sizes = mixing.n_queries, mixing.n_keys
    uniform = UniformMixing(*sizes, causal=mixing.causal, crossed=mixing.crossed)
    mean = _Mean(metric)
    for start, _, rows in uniform.blocks(min(128, max(1, ROOM // mixing.n_keys // 2))):
        block = row_block(uniform, rows, start, options)
        mean.add(*metric.value(block), block)
    return mean.mean().nanmean(0)


class _Mean:
    """Sums and counts per [example head] over blocks of rows, in float64; NaN where no row."""

    def __init__(self, metric: Metric):
        self.divisor = metric.divisor
        self.total = self.count = torch.zeros((), dtype=torch.float64)

    def add(self, value: Tensor, defined: Tensor, block: RowBlock) -> None:
        share = torch.ones(()) if self.divisor is None else self.divisor(block)
        value, valid, share = torch.broadcast_tensors(value, defined & block.full, share)
        self.total = self.total + torch.where(valid, value, 0).sum(-1, dtype=torch.float64)
        self.count = self.count + torch.where(valid, share, 0).sum(-1, dtype=torch.float64)

    def mean(self) -> Tensor:
        return self.total / self.count


def _note(layers: dict[str, Mixing], options: RowOptions) -> str:
    """What a reader of the scores should know about the rows."""
    if any(m.signed for m in layers.values()):
        return f"signed maps normalised by {options.normalise!r}"
    dense = {name: m for name, m in layers.items() if isinstance(m, DenseMixing)}
    loose = [name for name, m in dense.items() if not m.sums_to_one]
    if loose:
        return f"rows of {', '.join(loose)} do not sum to 1"
    fewer = options.exclude_bos or options.exclude_self or options.key_mask is not None
    return "" if options.renormalise or not fewer else "rows not renormalised"


def _require_examples(name: str, mixing: Mixing, n_examples: int) -> None:
    """Raise if tokens or masks of several examples met one pattern that depends on its tokens."""
    if mixing.n_examples == 1 < n_examples and isinstance(mixing, (DenseMixing, SoftmaxMixing)):
        sizes = [mixing.n_heads, mixing.n_queries, mixing.n_keys]
        raise ValueError(
            f"{name} holds one example of [head query key] = {sizes}, but tokens or masks were "
            f"given for {n_examples}; cache [batch head query key] (nn.MultiheadAttention: "
            "average_attn_weights=False)"
        )


def _drop_axes(values: Tensor, pattern: Tensor) -> Tensor:
    """Values [batch head] without the axes that `pattern` does not have."""
    if pattern.ndim < 4 and len(values) > 1:
        raise ValueError(
            f"a pattern of shape {list(pattern.shape)} is one example, but tokens or masks were "
            f"given for {len(values)}; pass [batch head query key]"
        )
    return values.reshape(values.shape[4 - pattern.ndim :])
