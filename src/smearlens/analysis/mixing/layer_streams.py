"""All heads of all layers measured and compared in a few passes over blocks of rows, from q and k.

What `analysis.patterns` and `analysis.similarity` say of a cache, at the cost of a look during
training: no [query, key] array is kept, and every pattern is made once for all comparisons, so that
memory grows with the length of the context. Leaves out signed mixings, masks and cross attention,
which those files treat, and where the tensors come from.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from smearlens.analysis.mixing import streaming
from smearlens.analysis.mixing.kinds import SoftmaxMixing
from smearlens.analysis.similarity import LOG2, NO_DIRECTION

ENTRIES = 2**22  # of the patterns of all layers and heads that exist at a time


def head_statistics(
    layer: SoftmaxMixing, *, rows: slice = slice(None), mass: float = 0.9
) -> dict[str, Float[Tensor, "batch head"]]:
    """Means over rows of what each head of a layer does.

    Args:
        layer: self-attention
        rows: the queries that count
        mass: share of a row that its span holds

    Returns:
        by name, each [batch head] and NaN where no row counts. "entropy": nats;
        "normalised_entropy": over log of the allowed keys, rows with one key left out; "distance":
        Σ_k A |q - k|, tokens; "span": tokens back that hold `mass` of the row; "sink": weight on
        the first key; "previous": on the token before, rows from 1 on; "…_without_first" of the
        first three: the first key dropped and the rest renormalised
    """
    found = layer.statistics(mass=mass)
    mask = torch.ones(layer.n_examples, layer.n_keys, dtype=torch.bool, device=layer.q.device)
    mask[:, 0] = False
    rest = layer.statistics(mass=mass, key_mask=mask)
    previous = found.entropy[..., 1:]  # empty for one position
    if previous.numel():
        previous = streaming.diagonal(
            layer.q, layer.k, 1, found.lse, causal=layer.causal, scale=layer.scale
        )
    chosen = {
        "entropy": found.entropy,
        "normalised_entropy": _normalised(found),
        "distance": found.distance,
        "span": found.span,
        "sink": found.first_mass,
        "previous": torch.nn.functional.pad(previous, (1, 0), value=torch.nan),
        "entropy_without_first": rest.entropy,
        "normalised_entropy_without_first": _normalised(rest),
        "distance_without_first": rest.distance,
    }
    stacked = torch.stack(list(chosen.values()))[..., rows].double().nanmean(-1)
    return dict(zip(chosen, stacked, strict=True))


@dataclass(frozen=True, eq=False)
class LayerComparison:
    """How far the heads of each layer differ, and how alike every two layers are, per example.

    Attributes:
        layers: in order
        diversity: mean over pairs of heads and rows of JS / log 2; NaN for one head
        js: 1 - JS / log 2 of the layers' mean patterns, mean over rows of more than one key
        cosine: of the mean patterns, flattened
        centred: the same after subtracting uniform attention, NaN for a layer that is uniform
        matched: centred cosines of single heads, in the best one-to-one matching
    """

    layers: list[str]
    diversity: Float[Tensor, "batch layer"]
    js: Float[Tensor, "batch layer layer"]
    cosine: Float[Tensor, "batch layer layer"]
    centred: Float[Tensor, "batch layer layer"]
    matched: Float[Tensor, "batch layer layer"]


@torch.no_grad()
def compare_layers(
    layers: Mapping[str, SoftmaxMixing], *, rows: slice = slice(None)
) -> LayerComparison:
    """Compare all layers in one pass over their patterns; with itself a layer gives 1.

    Centred and matched cosines are NaN where a pattern is uniform: nothing is left to compare.

    Args:
        layers: self-attention layers over the same sequences, all causal or none
        rows: the queries that count

    Raises:
        ValueError: for layers that differ in examples, positions or causality
    """
    given = list(layers.values())
    shapes = {(m.n_examples, m.n_queries, m.n_keys, m.causal) for m in given}
    if len(shapes) != 1 or given[0].crossed:
        raise ValueError(
            "layers must be one or more self-attentions over the same sequences, got "
            f"(examples, queries, keys, causal) = {sorted(shapes)}"
        )
    ((batch, n_queries, n_keys, causal),) = shapes
    n_heads = [m.n_heads for m in given]
    size = max(1, ENTRIES // (batch * sum(n_heads) * n_keys))
    first, last, step = rows.indices(n_queries)
    if step != 1 or first >= last:
        raise ValueError(f"rows must be a slice of step 1 with some of {n_queries}, got {rows}")
    sums = _Sums(n_heads)
    for start in range(first, last, size):
        stop = min(start + size, last)
        seen = stop if causal else n_keys
        pattern = torch.cat([_rows(m, start, stop, seen) for m in given], 1)
        n_allowed = (
            torch.arange(start + 1, stop + 1) if causal else torch.full((stop - start,), n_keys)
        )
        sums.add(pattern, start if causal else n_keys, n_allowed.to(pattern))
    return sums.compared(list(layers))


def cka_table(
    streams: Sequence[Float[Tensor, "batch pos _"]],
) -> Float[Tensor, "layer layer"]:
    """Linear CKA of every two activations on the same tokens, in memory of tokens x width.

    The numbers of `analysis.similarity.linear_cka` at its default, debiased below 10 tokens per
    column: with centred columns, sums over the rows of a Gram matrix are its diagonal negated.
    """
    flat = [_centred(x.flatten(0, 1).double()) for x in streams]
    n, n_layers = len(flat[0]), len(flat)
    norms = torch.stack([x.square().sum(1) for x in flat])  # diagonals of the Gram matrices
    total = norms.sum(1)
    plain, unbiased = torch.zeros(2, n_layers, n_layers, dtype=torch.float64)
    for i, j in zip(*torch.triu_indices(n_layers, n_layers).tolist(), strict=True):
        value = (flat[i].T @ flat[j]).square().sum()
        plain[i, j] = plain[j, i] = value
        cross = (norms[i] * norms[j]).sum()  # Song et al. 2012, equation 5
        value = value + total[i] * total[j] / ((n - 1) * (n - 2)) - cross * (1 + 2 / (n - 2))
        unbiased[i, j] = unbiased[j, i] = value
    width = torch.tensor([x.shape[1] for x in flat])
    few = n < 10 * torch.maximum(width[:, None], width)
    return torch.where(few, _scaled(unbiased), _scaled(plain))


def _scaled(hsic: Float[Tensor, "one one"]) -> Float[Tensor, "one one"]:
    """Each entry over the root of the two on the diagonal."""
    scale = hsic.diagonal().abs().sqrt()
    return hsic / scale[:, None] / scale


class _Sums:
    """What `compare_layers` adds up over blocks of rows, in float64."""

    def __init__(self, n_heads: list[int]):
        self.n_heads = n_heads
        self.pairs = [torch.triu_indices(n, n, 1).unbind() for n in n_heads]
        self.layer_pairs = torch.triu_indices(len(n_heads), len(n_heads), 1).unbind()
        zero = torch.zeros((), dtype=torch.float64)
        self.diversity = self.js = self.n_several = zero  # over rows of more than one key
        self.inner = self.uniform = zero  # products of what is not uniform, and of what is

    def add(
        self,
        pattern: Float[Tensor, "batch head rows key"],
        ahead: int,
        n_allowed: Float[Tensor, " rows"],
    ) -> None:
        """Take in some rows; row i sees keys up to `ahead` + i, `n_allowed` of them."""
        several = n_allowed > 1
        heads = pattern.split(self.n_heads, 1)
        mean = torch.stack([p.mean(1) for p in heads], 1)
        diversity = [_js(p, *pair)[..., several] for p, pair in zip(heads, self.pairs, strict=True)]
        js = _js(mean, *self.layer_pairs)[..., several]
        self.diversity = self.diversity + torch.stack([_mean_over_pairs(d) for d in diversity], 1)
        self.js = self.js + js.sum(-1, dtype=torch.float64)
        self.n_several = self.n_several + several.sum()
        self.uniform = self.uniform + (1 / n_allowed.double()).sum()
        flat = (pattern - 1 / n_allowed[:, None]).tril_(ahead).flatten(2)
        self.inner = self.inner + (flat @ flat.mT).double()

    def compared(self, layers: list[str]) -> LayerComparison:
        """The sums as means and cosines."""
        n_layers, batch = len(layers), len(self.inner)
        share = torch.block_diag(*(torch.full((1, n), 1 / n) for n in self.n_heads)).to(self.inner)
        mean = share @ self.inner @ share.T  # products of the mean patterns of layers
        js = torch.ones(batch, n_layers, n_layers, dtype=torch.float64)
        first, second = self.layer_pairs
        js[:, first, second] = js[:, second, first] = 1 - self.js / self.n_several / LOG2
        return LayerComparison(
            layers,
            self.diversity / self.n_several / LOG2,
            js,
            _cosine(mean + self.uniform),
            _cosine(mean),
            self._matched(_cosine(self.inner)),
        )

    def _matched(
        self, cosine: Float[Tensor, "batch head head"]
    ) -> Float[Tensor, "batch layer layer"]:
        from scipy.optimize import linear_sum_assignment

        n_layers = len(self.n_heads)
        found = torch.ones(len(cosine), n_layers, n_layers, dtype=torch.float64)
        blocks = [rows.split(self.n_heads, 2) for rows in cosine.split(self.n_heads, 1)]
        for i, j in zip(*(t.tolist() for t in self.layer_pairs), strict=True):
            for example, table in enumerate(blocks[i][j].cpu()):
                one, other = linear_sum_assignment(table.nan_to_num().numpy(), maximize=True)
                found[example, i, j] = found[example, j, i] = table[one, other].mean()
        return found


def _rows(layer: SoftmaxMixing, start: int, stop: int, seen: int) -> Tensor:
    """Rows of the pattern over the keys up to `seen`."""
    return streaming.pattern_rows(
        layer.q, layer.k[:, :, :seen], start, stop, causal=layer.causal, scale=layer.scale
    )


def _js(
    p: Float[Tensor, "batch part rows key"], one: Tensor, other: Tensor
) -> Float[Tensor, "batch pair rows"]:
    """Jensen-Shannon divergence of each row of parts `one` and parts `other`."""
    own = _entropy(p.clone())
    both = _entropy((p[:, one] + p[:, other]).div_(2))
    return (both - (own[:, one] + own[:, other]) / 2).clamp_min(0)


def _entropy(p: Float[Tensor, "batch part rows key"]) -> Float[Tensor, "batch part rows"]:
    """-Σ_k p log p of each row, in nats; uses up `p`."""
    logs = p.clamp_min(torch.finfo(p.dtype).tiny).log_()
    return -p.mul_(logs).sum(-1)


def _mean_over_pairs(js: Float[Tensor, "batch pair rows"]) -> Float[Tensor, " batch"]:
    """Sum over rows, mean over pairs: NaN without a pair."""
    return js.sum(-1, dtype=torch.float64).mean(1)


def _centred(x: Float[Tensor, "token width"]) -> Float[Tensor, "token width"]:
    return x - x.mean(0)


def _cosine(inner: Float[Tensor, "batch one one"]) -> Float[Tensor, "batch one one"]:
    """Inner products over the lengths of both; NaN where one is nothing but rounding."""
    squares = inner.diagonal(dim1=1, dim2=2)
    length = torch.where(squares > NO_DIRECTION, squares, torch.nan).sqrt()
    return inner / length[:, :, None] / length[:, None]


def _normalised(found: streaming.RowStatistics) -> Float[Tensor, "batch head query"]:
    """Entropy over that of uniform attention; NaN where there is one key, or none."""
    most = torch.where(found.n_allowed > 1, found.n_allowed, torch.nan).log()
    return found.entropy / most[:, None]
