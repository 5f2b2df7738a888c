"""Exact statistics of softmax attention from q and k, without a [query, key] array.

Rows are made in blocks of 128, used and forgotten: memory grows with the length and not with its
square, and a pass costs less than one fused attention forward. Contains statistics of rows
(`row_statistics`), entries (`diagonal`, `pattern_rows`) and two patterns compared row by row
(`js_rows`, `inner`). Leaves out how a block is made (`softmax_blocks`), averages over rows, and
what they say about a head.

Everywhere: q and k are [batch head pos d_head], views of any stride; `scale` multiplies q·k and
defaults to d_head**-0.5; `causal=True` lets query i see keys 0..i; `key_mask` [batch key] is True
where a key may be seen. float64 stays float64, everything else is computed in float32. A row that
may see no key is NaN. Nothing records gradients.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from smearlens.analysis.mixing.softmax_blocks import (
    BUCKET,
    ENTRIES,
    Block,
    Options,
    ahead,
    bucket_masses,
    check,
    lag_sum,
    span,
    stream,
    wide,
)

Queries = Float[Tensor, "batch head query d_head"]
Keys = Float[Tensor, "batch head key d_head"]
Rows = Float[Tensor, "batch head query"]
Mask = Bool[Tensor, "batch key"]


@dataclass(frozen=True, eq=False)
class RowStatistics:
    """What each row of a pattern P says; NaN where the query may see no key.

    Positions are indices: of two different sequences (cross attention), `distance`, `span`,
    `self_mass` and `future_mass` mean something only if both are counted alike.

    Attributes:
        lse: logarithm of the softmax denominator, log Σ_k exp(scale q·k)
        entropy: -Σ_k P log P, in nats
        distance: Σ_k P |q - k|, in tokens
        span: smallest w with Σ_{q-w <= k <= q} P at least `mass`, in tokens; NaN where the keys
            up to q hold less
        self_mass: P[q, q]; NaN where there is no key q
        first_mass: P[q, 0]
        future_mass: Σ_{k > q} P
        n_allowed: keys that each query may see
    """

    lse: Rows
    entropy: Rows
    distance: Rows
    span: Rows
    self_mass: Rows
    first_mass: Rows
    future_mass: Rows
    n_allowed: Int[Tensor, "batch query"]

    @property
    def n_undefined(self) -> int:
        """How many rows (batch × query) may see no key and are NaN in every head."""
        return int((self.n_allowed == 0).sum())


@dataclass(frozen=True, eq=False)
class InnerProducts:
    """Inner products of the rows of two patterns: Σ_k P Q, Σ_k P² and Σ_k Q²."""

    cross: Rows
    first: Rows
    second: Rows

    @property
    def cosine(self) -> Rows:
        """Cosine similarity of each row of P and Q, in [0, 1]."""
        return (self.cross / (self.first * self.second).sqrt()).clamp_max(1)


@torch.no_grad()
def row_statistics(
    q: Queries,
    k: Keys,
    *,
    causal: bool,
    scale: float | None = None,
    key_mask: Mask | None = None,
    mass: float = 0.9,
) -> RowStatistics:
    """Entropy, mean distance, span, self, first-key and future mass of every row, in one pass.

    Args:
        q: queries
        k: keys
        causal: whether query i sees keys 0..i only
        scale: factor on q·k
        key_mask: True where a key may be seen
        mass: share of a row that its span must hold, between 0 and 1

    Raises:
        ValueError: if shapes, mask or mass do not fit

    Source:
        mean distance: Vig and Belinkov 2019, "Analyzing the Structure of Attention"
    """
    if not 0 < mass < 1:
        raise ValueError(f"mass must lie between 0 and 1, exclusive, got {mass}")
    options = Options(causal, scale, key_mask)
    values, n_allowed = stream([(q, k)], options, 7, lambda block: _statistics(block, mass))
    return RowStatistics(*values.unbind(), n_allowed=n_allowed)


@torch.no_grad()
def log_normaliser(
    q: Queries,
    k: Keys,
    *,
    causal: bool,
    scale: float | None = None,
    key_mask: Mask | None = None,
) -> Rows:
    """Logarithm of Σ_k exp(scale q·k) of every row: `RowStatistics.lse` alone, in less time."""
    options = Options(causal, scale, key_mask)
    values, _ = stream([(q, k)], options, 1, lambda block: [block.lse(block.weights.sum(-1))])
    return values[0]


@torch.no_grad()
def diagonal(
    q: Queries,
    k: Keys,
    lag: int,
    lse: Rows,
    *,
    causal: bool,
    scale: float | None = None,
    key_mask: Mask | None = None,
) -> Float[Tensor, "batch head entry"]:
    """P[i, i - lag] wherever both exist, first query first, in O(pos · d_head).

    Lag 0 is the token itself, 1 the one before it; negative lags read the future. `lse` comes from
    `log_normaliser` or `row_statistics`, called with the same options.

    Raises:
        ValueError: if no query has a key at this lag
    """
    check([(q, k)], key_mask, lse)
    n_query, n_key = q.shape[2], k.shape[2]
    first, last = max(0, lag), min(n_query, n_key + lag)
    if first >= last:
        raise ValueError(
            f"lag={lag} is outside {n_query} queries and {n_key} keys; "
            f"allowed: {1 - n_key}..{n_query - 1}"
        )
    step = max(1, ENTRIES // (q.shape[0] * q.shape[1] * q.shape[3]))
    scores = torch.empty(*q.shape[:2], last - first, dtype=lse.dtype, device=q.device)
    for start in range(first, last, step):
        stop = min(start + step, last)
        products = q[:, :, start:stop].to(lse.dtype) * k[:, :, start - lag : stop - lag]
        torch.sum(products, -1, out=scores[..., start - first : stop - first])
    scores *= q.shape[3] ** -0.5 if scale is None else scale
    if key_mask is not None:
        hidden = ~key_mask[:, None, first - lag : last - lag]
        scores.masked_fill_(hidden, -torch.inf)
    if causal and lag < 0:
        scores.fill_(-torch.inf)
    return scores.sub_(lse[..., first:last]).exp_()


@torch.no_grad()
def pattern_rows(
    q: Queries,
    k: Keys,
    start: int,
    stop: int,
    lse: Rows | None = None,
    *,
    causal: bool,
    scale: float | None = None,
    key_mask: Mask | None = None,
) -> Float[Tensor, "batch head rows key"]:
    """The pattern of queries `start` to `stop`; `lse`, if known, saves the normalisation."""
    check([(q, k)], key_mask, lse)
    if not 0 <= start <= stop <= q.shape[2]:
        raise ValueError(f"rows {start}..{stop} are not within the {q.shape[2]} queries")
    dtype = wide(q, k)
    scale = q.shape[3] ** -0.5 if scale is None else scale
    scores = (q[:, :, start:stop].to(dtype) * scale) @ k.to(dtype).mT
    if causal:
        scores.masked_fill_(ahead(start, stop, 0, k.shape[2], q.device), -torch.inf)
    if key_mask is not None:
        scores.masked_fill_(~key_mask[:, None, None], -torch.inf)
    if lse is None:
        return scores.softmax(-1)
    return scores.sub_(lse[:, :, start:stop, None]).exp_()


@torch.no_grad()
def js_rows(
    q1: Queries,
    k1: Keys,
    q2: Float[Tensor, "batch head query d_head2"],
    k2: Float[Tensor, "batch head key d_head2"],
    *,
    causal: bool,
    scale: float | None = None,
    key_mask: Mask | None = None,
) -> Rows:
    """Jensen-Shannon divergence of each row of two patterns, in nats: 0 (equal) to log 2.

    H((P + Q) / 2) - (H(P) + H(Q)) / 2. Head h of one is compared with head h of the other; index or
    expand the heads for other pairs. In float32, values below 1e-6 are rounding.
    """
    options = Options(causal, scale, key_mask)
    values, _ = stream([(q1, k1), (q2, k2)], options, 1, lambda *blocks: [_js(*blocks)])
    return values[0]


@torch.no_grad()
def inner(
    q1: Queries,
    k1: Keys,
    q2: Float[Tensor, "batch head query d_head2"],
    k2: Float[Tensor, "batch head key d_head2"],
    *,
    causal: bool,
    scale: float | None = None,
    key_mask: Mask | None = None,
) -> InnerProducts:
    """Inner products of each row of two patterns with the other and with itself."""
    options = Options(causal, scale, key_mask)
    values, _ = stream([(q1, k1), (q2, k2)], options, 3, _inner)
    return InnerProducts(*values.unbind())


def _statistics(block: Block, mass: float) -> tuple[Tensor, ...]:
    """The seven statistics of `RowStatistics`, in its order, each [flat row]."""
    weights, start = block.weights, block.start
    query = torch.arange(start, block.stop, dtype=weights.dtype, device=weights.device)
    masses = bucket_masses(weights)
    total = masses.sum(-1)
    entropy = block.entropy(total)
    first = weights[..., 0] / total
    itself = torch.full_like(total, torch.nan)
    there = max(0, min(block.stop, block.n_key) - start)  # queries that have a key q
    itself[:, :there] = (
        weights[..., start:].diagonal(dim1=-2, dim2=-1)[:, :there] / total[:, :there]
    )
    lags = lag_sum(weights, masses, query)
    past = weights
    if not block.causal:  # Σ P |q - k| = 2 Σ_{k <= q} P (q - k) - Σ P (q - k)
        past = weights[..., : -(-block.stop // BUCKET) * BUCKET]
        past[..., start:].tril_()
        masses = bucket_masses(past)
        lags = 2 * lag_sum(past, masses, query) - lags
    future = (1 - masses.sum(-1) / total).clamp_min(0)
    reach = span(weights, masses, mass * total, query)
    return block.lse(total), entropy, lags / total, reach, itself, first, future


def _js(one: Block, two: Block) -> Tensor:
    totals = one.weights.sum(-1), two.weights.sum(-1)
    apart = (one.entropy(totals[0]) + two.entropy(totals[1])) / 2
    mean = one.weights.mul_(0.5 / totals[0][..., None])
    mean.addcmul_(two.weights, 0.5 / totals[1][..., None])
    logs = torch.clamp(mean, min=torch.finfo(mean.dtype).tiny, out=one.shifted).log2_()
    together = -logs.mul_(mean).sum(-1) * math.log(2)
    return (together - apart).clamp(0, math.log(2))


def _inner(one: Block, two: Block) -> tuple[Tensor, Tensor, Tensor]:
    first, second = one.weights.sum(-1), two.weights.sum(-1)

    def product(a: Tensor, b: Tensor) -> Tensor:
        return torch.mul(a, b, out=one.shifted).sum(-1)

    return (
        product(one.weights, two.weights) / (first * second),
        product(one.weights, one.weights) / first.square(),
        product(two.weights, two.weights) / second.square(),
    )
