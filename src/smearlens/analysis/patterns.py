"""Statistics of rows that need no target: entropy, span, sinks, lags, diversity of heads.

Leaves out scores with a target (`analysis.heads`) and comparisons of layers
(`analysis.similarity`).
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from smearlens._explain import explained
from smearlens.analysis.mixing.kinds import Mixing
from smearlens.analysis.mixing.layers import as_layers
from smearlens.analysis.mixing.options import RowOptions
from smearlens.analysis.mixing.rows import Metric, RowBlock, measure, row_blocks
from smearlens.analysis.mixing.state_space import require_weights


@explained
def attention_entropy(
    source: Any, *, normalised: bool = False, base: float | None = None, **options: Any
) -> Any:
    r"""Mean entropy of the rows, -Σ_k A log A.

    Args:
        source: a cache, or a pattern [batch head query key]
        normalised: divide each row's entropy by log n_q, n_q its number of allowed keys; rows with
            one key are left out. Averages of plain entropy are not comparable across lengths
        base: of the logarithm; None is e (nats)
        **options: fields of `RowOptions`

    Returns:
        `Scores` in nats (or fractions); uniform causal attention over L tokens has lgamma(L+1)/L
    """
    if base is not None and not (base > 0 and base != 1):
        raise ValueError(f"base must be positive and not 1, got {base}; None gives nats")
    scale = 1.0 if base is None else 1 / math.log(base)

    def value(block: RowBlock) -> tuple[Tensor, Tensor]:
        entropy, most = entropies(block.weights), block.allowed.sum(-1)
        if normalised:
            return entropy / most.clamp_min(2).double().log(), most > 1
        return entropy * scale, most > 0

    def ceiling(block: RowBlock) -> Tensor:
        return block.allowed.sum(-1).clamp_min(1).double().log() * scale

    unit = "fraction of log n" if normalised else "nats" if base is None else f"log base {base:g}"
    name = "attention_entropy" + ("(normalised)" if normalised else "")
    best = None if normalised else ceiling
    metric = Metric(name, value, ceiling=best, unit=unit, of_weights=True)
    return measure(source, metric, RowOptions(**options))


@explained
def attention_span(
    source: Any,
    *,
    kind: Literal["distance", "relative", "mass", "effective"] = "distance",
    mass: float = 0.9,
    **options: Any,
) -> Any:
    r"""How far back the rows reach.

    Args:
        source: a cache, or a pattern [batch head query key]
        kind: "distance": Σ_k A |q - k|, in tokens (default); "relative": the same divided by q;
            "mass": the smallest w such that the keys q-w..q hold `mass` of the row (rows whose
            keys up to q hold less are left out); "effective": exp(entropy), a number of keys.
            First-token sinks inflate it: see `exclude_bos`
        mass: for kind="mass"
        **options: fields of `RowOptions`

    Returns:
        `Scores`; uniform causal attention over L tokens has distance (L - 1) / 4

    Source:
        Vig & Belinkov 2019, mean attention distance
    """
    if kind not in ("distance", "relative", "mass", "effective"):
        raise ValueError(
            f"kind must be distance, relative, mass or effective, got {kind!r}; to choose layers, "
            "measure mixings(cache, kind=…)"
        )
    if not 0 < mass <= 1:
        raise ValueError(f"mass must be in (0, 1], got {mass}")

    def value(block: RowBlock) -> tuple[Tensor, Tensor]:
        some = block.allowed.any(-1)
        if kind == "effective":
            return entropies(block.weights).exp(), some
        if kind == "mass":
            span, reached = _mass_span(block, mass)
            return span, some & reached
        distance = (block.weights * block.lag.abs()).sum(-1)
        if kind == "relative":
            query = block.query[:, 0]
            return distance / query.clamp_min(1), some & (query > 0)
        return distance, some

    def ceiling(block: RowBlock) -> Tensor:
        if kind == "effective":
            return block.allowed.sum(-1).double()
        lag = block.lag.clamp_min(0) if kind == "mass" else block.lag.abs()
        furthest = (lag * block.allowed).amax(-1).double()
        return furthest / block.query[:, 0].clamp_min(1) if kind == "relative" else furthest

    unit = {"relative": "fraction of the context", "effective": "keys"}.get(kind, "tokens")
    weights = kind in ("mass", "effective")
    name = f"attention_span({kind})"
    metric = Metric(name, value, ceiling=ceiling, unit=unit, of_weights=weights)
    return measure(source, metric, RowOptions(**options))


@explained
def sink_mass(source: Any, **options: Any) -> Any:
    """Mean weight on the first key, over all queries (the first has no choice): attention sink."""
    return measure(source, Metric("sink_mass", lambda b: b.at(b.key == 0)), RowOptions(**options))


@explained
def self_mass(source: Any, **options: Any) -> Any:
    """Mean weight on the query's own position."""
    return measure(source, Metric("self_mass", lambda b: b.at(b.lag == 0)), RowOptions(**options))


@explained
def future_mass(source: Any, **options: Any) -> Any:
    """Mean weight on keys after the query, over all queries: 0 for a causal layer."""

    def value(block: RowBlock) -> tuple[Tensor, Tensor]:
        return (block.weights * (block.lag < 0)).sum(-1), torch.ones_like(block.full)

    def ceiling(block: RowBlock) -> Tensor:
        return (block.allowed & (block.lag < 0)).any(-1).double()

    return measure(source, Metric("future_mass", value, ceiling=ceiling), RowOptions(**options))


@explained
def lag_profile(source: Any, *, max_lag: int = 32, **options: Any) -> Any:
    """Mean weight at each lag q - k, over the rows where that key exists.

    Args:
        source: a cache, or a pattern [batch head query key]
        max_lag: furthest lag; non-causal layers are profiled from -max_lag on
        **options: fields of `RowOptions`

    Returns:
        `Profile`s by layer name for a cache, one `Profile` for a pattern
    """
    chosen = RowOptions(**options)
    profiles = {
        name: _profile_of(mixing, max_lag, chosen)
        for name, mixing in as_layers(source, chosen).items()
    }
    return profiles[""] if list(profiles) == [""] else profiles


class Profile:
    """Mean weight by lag.

    Attributes:
        lags: the lags, in tokens
        values: mean over the rows that have a key at the lag, [example head lag]
        share: mean over all rows, where a key that does not exist has weight 0; it sums to at most
            1 over the lags, [example head lag]
    """

    def __init__(
        self,
        lags: list[int],
        values: Float[Tensor, "example head lag"],
        share: Float[Tensor, "example head lag"],
    ):
        self.lags, self.values, self.share = lags, values, share

    def mean(self) -> Float[Tensor, "head lag"]:
        """Mean over examples."""
        return self.values.nanmean(0)

    def at(self, lag: int) -> Float[Tensor, " head"]:
        """Mean weight at one lag."""
        if lag not in self.lags:
            raise ValueError(f"lag {lag} was not profiled; lags: {self.lags[0]}..{self.lags[-1]}")
        return self.mean()[:, self.lags.index(lag)]

    def __repr__(self) -> str:
        means = self.mean()
        lines = [f"{'lag':>4}" + "".join(f"{f'head {h}':>9}" for h in range(min(8, len(means))))]
        for column, lag in list(enumerate(self.lags))[:24]:
            lines.append(f"{lag:>4}" + "".join(f"{float(m):>9.3f}" for m in means[:8, column]))
        if len(means) > 8 or len(self.lags) > 24:
            lines.append(f"… of {len(means)} heads, lags {self.lags[0]}..{self.lags[-1]}: .mean()")
        return "\n".join(lines)


@explained
def head_diversity(source: Any, *, kind: Literal["js", "variance"] = "js", **options: Any) -> Any:
    """How much the heads of a layer differ: 0 where all attend alike.

    Args:
        source: a cache, or a pattern [batch head query key]
        kind: "js": mean over pairs of heads and rows of the Jensen-Shannon divergence over log 2,
            in [0, 1], rows with one allowed key left out; "variance": mean over (query, key) of the
            variance across heads, which shrinks as the context grows and is kept for comparison
            with published figures
        **options: fields of `RowOptions`

    Returns:
        values [example] by layer name for a cache, or [example] for a pattern; NaN for one head
    """
    if kind not in ("js", "variance"):
        raise ValueError(
            f"kind must be 'js' or 'variance', got {kind!r}; to choose layers, measure "
            "mixings(cache, kind=…)"
        )
    chosen = RowOptions(**options)
    found = {
        name: _diversity(mixing, kind, chosen) for name, mixing in as_layers(source, chosen).items()
    }
    return found[""] if list(found) == [""] else found


def entropies(weights: Float[Tensor, "... key"]) -> Float[Tensor, "..."]:
    """-Σ w log w of each row, in nats, with 0 log 0 = 0."""
    return -(weights * weights.clamp_min(1e-38).log()).sum(-1)


def _mass_span(block: RowBlock, mass: float) -> tuple[Tensor, Tensor]:
    """Smallest w with at least `mass` of each row on keys q-w..q, and whether there is one."""
    near = torch.where(block.lag >= 0, block.weights, 0)
    total = near.sum(-1, keepdim=True)
    inside = near.cumsum(-1)  # weight on keys 0..k
    before = inside - near  # on keys before k
    enough = (total - before >= mass - 1e-6) & (block.lag >= 0)  # float32 sums are that exact
    widths = torch.where(enough, block.lag, torch.iinfo(torch.int32).max)
    return widths.amin(-1).to(block.weights.dtype), enough.any(-1)


def _profile_of(mixing: Mixing, max_lag: int, options: RowOptions) -> Profile:
    if max_lag < 1:
        raise ValueError(f"max_lag must be at least 1, got {max_lag}")
    if mixing.crossed:
        raise ValueError("lags are undefined between two sequences (cross attention)")
    last = min(max_lag, mixing.n_queries - 1)
    lags = list(range(0 if mixing.causal else -last, last + 1))
    sums = [torch.zeros((), dtype=torch.float64)] * 3  # of weights, rows with that key, all rows
    for block in row_blocks(mixing, options):
        key = block.query - torch.tensor(lags)  # [rows lag]
        there = (key >= 0) & (key < mixing.n_keys)
        index = key.clamp(0, mixing.n_keys - 1).expand(*block.weights.shape[:2], -1, -1)
        valid = there & block.full[..., None]
        weights = torch.where(valid, block.weights.gather(-1, index), 0)
        parts = (weights, valid, block.full[..., None])
        sums = [s + p.sum(-2, dtype=torch.float64) for s, p in zip(sums, parts, strict=True)]
    total, existing, everything = sums
    return Profile(lags, total / existing, total / everything)


def _diversity(mixing: Mixing, kind: str, options: RowOptions) -> Float[Tensor, " example"]:
    if kind == "js":
        require_weights("head_diversity(js)", mixing, options.normalise)
    if mixing.n_heads < 2:
        return torch.full((mixing.n_examples,), torch.nan, dtype=torch.float64)
    total, count = torch.zeros(mixing.n_examples, dtype=torch.float64), torch.zeros(())
    first, second = torch.triu_indices(mixing.n_heads, mixing.n_heads, 1)
    for block in row_blocks(mixing, options):
        valid = block.full.all(1)
        if kind == "variance":
            entries = block.allowed[:, 0] & valid[..., None]
            spread = torch.where(entries, block.weights.double().var(1), 0)
            total, count = total + spread.sum((-1, -2)), count + entries.sum((-1, -2))
            continue
        own = entropies(block.weights)
        js = torch.zeros(len(own), own.shape[-1], dtype=torch.float64)
        for i, j in zip(first.tolist(), second.tolist(), strict=True):
            both = (block.weights[:, i] + block.weights[:, j]) / 2
            js += entropies(both) - (own[:, i] + own[:, j]) / 2
        valid = valid & (block.allowed.sum(-1) > 1)[:, 0]  # with one key all heads agree
        total, count = total + torch.where(valid, js, 0).sum(-1) / len(first), count + valid.sum(-1)
    scale = 1.0 if kind == "variance" else math.log(2)
    return total / count / scale
