"""Token mixing: the matrix over positions that a layer applies, M[example, head, query, key].

Attention has it as its pattern, a depthwise convolution as a band (one "head" per channel), a
state-space layer as its hidden attention. Scores, statistics, similarities and pictures read such a
matrix through this file's `Mixing` and never ask where it came from; it hands out rows in blocks,
diagonals, or the dense array, so that long contexts need no [query, key] array. Leaves out the
state-space mixing (`state_space`), finding mixings in a cache (`layers`) and what is computed from
the rows (`rows`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from smearlens._explain import explained
from smearlens.analysis.mixing import streaming


class Mixing(ABC):
    """Rows of M[example, head, query, key], on request.

    Attributes:
        n_examples: sequences (1 where the matrix does not depend on the input)
        n_heads: heads, or channels
        n_queries: rows
        n_keys: columns
        causal: whether M[q, k] = 0 for every k > q
        signed: whether entries can be negative and rows need not sum to 1
        crossed: whether queries and keys index different sequences (cross attention)
    """

    n_examples: int
    n_heads: int
    n_queries: int
    n_keys: int
    causal: bool
    signed: bool = False
    crossed: bool = False

    @abstractmethod
    def rows(self, start: int, stop: int) -> Float[Tensor, "batch head rows key"]:
        """Rows `start` to `stop`, all keys, in float32 or wider; nothing is written into them."""

    def blocks(self, size: int = 128) -> Iterator[tuple[int, int, Tensor]]:
        """Go through all rows, `size` at a time, as (start, stop, rows)."""
        if not isinstance(size, int) or size < 1:
            raise ValueError(f"size must be at least 1 row, got {size!r}")
        for start in range(0, self.n_queries, size):
            stop = min(start + size, self.n_queries)
            yield start, stop, self.rows(start, stop)

    def diagonal(self, lag: int) -> Float[Tensor, "batch head entry"]:
        """Entries M[q, q - lag] for every q where both exist; a negative lag reads the future."""
        first, last = self._extent(lag)
        pieces = []
        for start, stop, rows in self.blocks():
            lo, hi = max(start, first), min(stop, last)
            if lo < hi:
                part = rows[..., lo - start : hi - start, lo - lag : hi - lag]
                pieces.append(part.diagonal(dim1=-2, dim2=-1))
        return torch.cat(pieces, dim=-1)

    def dense(self) -> Float[Tensor, "batch head query key"]:
        """The whole matrix."""
        return self.rows(0, self.n_queries)

    def _extent(self, lag: int) -> tuple[int, int]:
        """First query that has a key at `lag`, and one past the last."""
        first, last = max(0, lag), min(self.n_queries, self.n_keys + lag)
        if first >= last:
            raise ValueError(
                f"lag={lag} is outside a {self.n_queries} x {self.n_keys} mixing; "
                f"allowed: {1 - self.n_keys}..{self.n_queries - 1}"
            )
        return first, last


@explained
class DenseMixing(Mixing):
    """A matrix that exists: an attention pattern [batch head query key].

    Args:
        pattern: its rows are weights, unless they are `signed`
        signed: whether entries may be negative and rows need not sum to 1
        causal: whether later keys are masked. Default: read off the entries

    Raises:
        ValueError: for negative entries that are not announced as `signed`
    """

    def __init__(
        self,
        pattern: Float[Tensor, "batch head query key"],
        *,
        signed: bool = False,
        causal: bool | None = None,
    ):
        if not signed and bool((pattern < 0).any()):
            raise ValueError(
                f"pattern has negative entries (least {float(pattern.nan_to_num().min()):.2g}), so "
                "its rows are no weights; pass DenseMixing(pattern, signed=True), several layers "
                "as a dictionary of them"
            )
        self.pattern, self.signed, self._judged = pattern, signed, causal is None
        self.n_examples, self.n_heads, self.n_queries, self.n_keys = pattern.shape
        self.crossed = self.n_queries != self.n_keys
        ahead = causal is None and (pattern.triu(1).abs_() > 0).any()  # not NaN: a row without keys
        self.causal = not self.crossed and (causal is not False) and not bool(ahead)

    @property
    def sums_to_one(self) -> bool:
        """Whether every row does that has any weight, within 1 %."""
        sums = self.pattern.sum(-1, dtype=torch.float32)
        return not bool((((sums - 1).abs() > 0.01) & (sums > 0)).any())

    def among(self, queries: Bool[Tensor, "batch_or_1 query"]) -> DenseMixing:
        """Judged by these queries alone: the row of a padded one may be uniform over all keys."""
        if self.causal or self.crossed or not self._judged:
            return self
        ahead = (self.pattern.triu(1).abs_() > 0).any(-1)  # [batch head query]
        seen = bool((ahead & queries[:, None].to(ahead.device)).any())
        return DenseMixing(self.pattern, signed=self.signed, causal=not seen)

    def rows(self, start: int, stop: int) -> Float[Tensor, "batch head rows key"]:
        """A copy of the rows, at least float32."""
        return _wide(self.pattern[:, :, start:stop]).clone()

    def diagonal(self, lag: int) -> Float[Tensor, "batch head entry"]:
        """The diagonal itself."""
        self._extent(lag)
        return _wide(self.pattern.diagonal(-lag, dim1=-2, dim2=-1)).clone()


class SoftmaxMixing(Mixing):
    """softmax(scale · q k') computed row block by row block from q and k.

    Args:
        q: queries as cached, [batch query head d_head]
        k: keys, [batch key head d_head]
        causal: whether keys after the query are masked
        scale: factor on q k'; default d_head ** -0.5
    """

    def __init__(
        self,
        q: Float[Tensor, "batch query head d_head"],
        k: Float[Tensor, "batch key kv_head d_head"],
        *,
        causal: bool = True,
        scale: float | None = None,
    ):
        self.q, self.k = (_wide(t).transpose(1, 2) for t in (q, k))
        if self.k.shape[1] != self.q.shape[1]:  # grouped queries: each key head serves several
            self.k = self.k.repeat_interleave(self.q.shape[1] // self.k.shape[1], dim=1)
        self.n_examples, self.n_heads, self.n_queries, _ = self.q.shape
        self.n_keys = self.k.shape[2]
        self.causal, self.scale = causal, scale
        self.crossed = self.n_queries != self.n_keys

    def rows(self, start: int, stop: int) -> Float[Tensor, "batch head rows key"]:
        """Softmax of these rows' scores."""
        return streaming.pattern_rows(
            self.q, self.k, start, stop, causal=self.causal, scale=self.scale
        )

    def statistics(self, **options: Any) -> streaming.RowStatistics:
        """Entropy, mean distance and span of every row in one pass (`streaming.row_statistics`)."""
        return streaming.row_statistics(
            self.q, self.k, causal=self.causal, scale=self.scale, **options
        )

    def diagonal(self, lag: int) -> Float[Tensor, "batch head entry"]:
        """exp(s[q, q - lag] - logsumexp s[q]): O(pos · d_head) once the normaliser is known."""
        if not hasattr(self, "_lse"):
            self._lse = streaming.log_normaliser(
                self.q, self.k, causal=self.causal, scale=self.scale
            )
        return streaming.diagonal(
            self.q, self.k, lag, self._lse, causal=self.causal, scale=self.scale
        )


class BandMixing(Mixing):
    """A depthwise convolution as a matrix: M[c, q, k] = kernel[c, i] where q - k = lags[i].

    Args:
        kernel: weights [channel tap]
        lags: lag that each tap reads; negative ones read the future
        length: positions
    """

    signed = True

    def __init__(self, kernel: Float[Tensor, "channel tap"], lags: Sequence[int], length: int):
        if len(lags) != kernel.shape[1]:
            raise ValueError(f"{len(lags)} lags for {kernel.shape[1]} taps; give one lag per tap")
        self.kernel, self.lags = _wide(kernel), list(lags)
        self.n_examples, self.n_heads = 1, kernel.shape[0]
        self.n_queries = self.n_keys = length
        self.causal = min(self.lags) >= 0

    def rows(self, start: int, stop: int) -> Float[Tensor, "batch head rows key"]:
        """The band, written into zeros."""
        rows = self.kernel.new_zeros(1, self.n_heads, stop - start, self.n_keys)
        query = torch.arange(start, stop)
        for tap, lag in enumerate(self.lags):
            key = query - lag
            inside = (key >= 0) & (key < self.n_keys)
            rows[0, :, (query - start)[inside], key[inside]] = self.kernel[:, tap, None]
        return rows

    def parts(self) -> Iterator[BandMixing]:
        """All channels, as many at a time as make a block of rows of a few MB."""
        at_once = max(1, 2**21 // (128 * self.n_keys))
        for kernel in self.kernel.split(at_once):
            yield BandMixing(kernel, self.lags, self.n_keys)


class ComposedMixing(Mixing):
    r"""Convolution, then attention: E[h, q, s] = Σ_l A[h, q, s + l] g[h, l].

    Args:
        attention: A, the mixing of the attention layer
        gain: g, how strongly each head reads each lag of the convolution, [head lag]; see
            `analysis.smearing.composition_gain`
        lags: the lag of each column of `gain`
    """

    def __init__(self, attention: Mixing, gain: Float[Tensor, "head lag"], lags: Sequence[int]):
        wanted = [attention.n_heads, len(lags)]
        if list(gain.shape) != wanted:
            raise ValueError(f"gain must be [head lag] = {wanted}, got {list(gain.shape)}")
        self.attention, self.gain, self.lags = attention, gain, list(lags)
        self.n_examples, self.n_heads = attention.n_examples, attention.n_heads
        self.n_queries, self.n_keys = attention.n_queries, attention.n_keys
        self.causal = attention.causal and min(self.lags) >= 0
        self.signed = attention.signed or bool((gain < 0).any())
        self.crossed = attention.crossed

    def rows(self, start: int, stop: int) -> Float[Tensor, "batch head rows key"]:
        """Rows of A, shifted by each lag and weighted."""
        source = self.attention.rows(start, stop)
        total = torch.zeros_like(source)
        for column, lag in enumerate(self.lags):
            first, last = max(0, lag), min(self.n_keys, self.n_keys + lag)  # keys of A that count
            if first < last:
                piece = source[..., first:last] * self.gain[:, column, None, None]
                total[..., first - lag : last - lag] += piece
        return total


class UniformMixing(Mixing):
    """Equal weight on every allowed key: what a head scores that looks at nothing in particular."""

    n_examples = n_heads = 1

    def __init__(self, n_queries: int, n_keys: int, *, causal: bool, crossed: bool = False):
        self.n_queries, self.n_keys, self.causal = n_queries, n_keys, causal
        self.crossed = crossed

    def rows(self, start: int, stop: int) -> Float[Tensor, "batch head rows key"]:
        """1 / (number of allowed keys) on each of them."""
        allowed = torch.ones(stop - start, self.n_keys, dtype=torch.float64)
        allowed = allowed.tril(start) if self.causal else allowed
        return (allowed / allowed.sum(-1, keepdim=True))[None, None]


def _wide(x: Tensor) -> Tensor:
    """At least float32: half precision is raised, float64 stays."""
    return x if x.dtype in (torch.float32, torch.float64) else x.float()
