"""How alike two layers are (or two checkpoints, or two models), each similarity beside its null.

Patterns are compared row by row (Jensen-Shannon, cosine), activations by linear CKA. Leaves out
statistics of one layer alone (`analysis.patterns`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from smearlens._explain import explained, require_cache
from smearlens.analysis.mixing.kinds import Mixing
from smearlens.analysis.mixing.layers import as_layers
from smearlens.analysis.mixing.options import RowOptions
from smearlens.analysis.mixing.rows import row_block
from smearlens.analysis.mixing.state_space import require_weights
from smearlens.analysis.patterns import entropies

LOG2 = 0.6931471805599453
SPLIT = (  # activations with two axes behind the positions
    "hook_q", "hook_k", "hook_v", "hook_z", "hook_A_bar", "hook_B_bar", "hook_write", "hook_state"
)  # fmt: skip
NO_DIRECTION = 1e-10  # squared length: below it a centred pattern, a uniform one, is rounding


@dataclass(frozen=True)
class Similarity:
    """A symmetric table of similarities between layers.

    Attributes:
        name: of the measure
        layers: in order
        values: [layer layer], mean over examples
        null: the same between layers of a null source, or None if none was given
    """

    name: str
    layers: list[str]
    values: Float[Tensor, "layer layer"]
    null: Float[Tensor, "layer layer"] | None = None

    def pairs(self) -> list[tuple[str, str, float, float | None]]:
        """(layer, layer, similarity, null) of every pair, in order."""
        return [
            (
                self.layers[i], self.layers[j], float(self.values[i, j]),
                None if self.null is None else float(self.null[i, j]),
            )
            for i in range(len(self.layers))
            for j in range(i + 1, len(self.layers))
        ]  # fmt: skip

    def __repr__(self) -> str:
        lines = [f"layer similarity ({self.name})"]
        for one, other, value, null in self.pairs():
            beside = "null not given" if null is None else f"null {null:.3f}"
            lines.append(f"{one:<24} {other:<24} {value:>7.3f}  {beside}")
        return "\n".join(lines)


@explained
def layer_similarity(
    source: Any,
    *,
    kind: Literal["js", "cosine", "cka"] = "js",
    centred: bool = True,
    heads: Literal["mean", "match"] = "mean",
    null: Any = None,
    point: str = "hook_resid_post",
    **options: Any,
) -> Similarity:
    r"""Similarity between every two layers.

    Args:
        source: a cache, or mixings by layer name
        kind: "js": 1 - JS(P, Q) / ln 2, mean over rows with more than one allowed key; "cosine":
            of the flattened patterns over allowed entries; "cka": linear CKA of the activations
            at `point`
        centred: subtract uniform attention before the cosine. Two random causal heads (softmax of
            unit normal scores) have a raw cosine of 0.7 / 0.6 / 0.5 at 16 / 64 / 256 tokens, give
            or take 0.06 / 0.04 / 0.02 from pair to pair; centred it is near 0
        heads: how heads become one distribution: their mean, or the best one-to-one matching
        null: what the same numbers are measured on for comparison: the cache of an untrained model
            of the same shape, or of the model on shuffled tokens
        point: hook whose activations "cka" compares
        **options: fields of `RowOptions`; for "cka" `exclude_bos` and `query_mask` choose its rows

    Raises:
        ValueError: for fewer than two layers, or a null with other layers
    """
    if kind not in ("js", "cosine", "cka") or heads not in ("mean", "match"):
        raise ValueError(
            f"kind={kind!r} (js, cosine, cka), heads={heads!r} (mean, match); to choose layers, "
            "compare mixings(cache, kind=…)"
        )
    chosen = RowOptions(**options)

    def table(given: Any) -> tuple[list[str], Tensor]:
        if kind == "cka":
            return _cka_table(given, point, chosen)
        return _pattern_table(given, kind, centred, heads, chosen)

    layers, values = table(source)
    beside, null_values = (layers, None) if null is None else table(null)
    if beside != layers:
        raise ValueError(f"null must have the layers of source, {layers}, got {beside}")
    cosine = "centred cosine" if centred else "raw cosine"
    name = (
        "linear CKA"
        if kind == "cka"
        else f"{cosine if kind == 'cosine' else kind}, heads by {heads}"
    )
    return Similarity(name, layers, values, null_values)


def js_similarity(p: Float[Tensor, "... key"], q: Float[Tensor, "... key"]) -> Float[Tensor, "..."]:
    """1 - JS / ln 2 of each pair of rows: 1 for equal rows, 0 for disjoint ones."""
    return 1 - (entropies((p + q) / 2) - (entropies(p) + entropies(q)) / 2) / LOG2


@explained
def linear_cka(
    x: Float[Tensor, "token one"], y: Float[Tensor, "token two"], *, debiased: bool | None = None
) -> float:
    r"""‖Yᵀ X‖² / (‖Xᵀ X‖ ‖Yᵀ Y‖) of centred columns, in Frobenius norms.

    Args:
        x: activations, one row per token (no padding, no BOS)
        y: other activations on the same tokens
        debiased: use the unbiased HSIC estimator. Plain CKA of random 64-wide data is 0.56 at 50
            tokens and 0.03 at 2,000; default: debiased below 10 tokens per column

    Source:
        Kornblith et al. 2019; unbiased HSIC of Song et al. 2012
    """
    if x.ndim != 2 or y.ndim != 2 or len(x) != len(y):
        raise ValueError(
            f"x and y must be [token width] on the same tokens, got {x.shape}, {y.shape}"
        )
    if debiased is None:
        debiased = len(x) < 10 * max(x.shape[1], y.shape[1])
    x, y = (t.double() - t.double().mean(0) for t in (x, y))
    if not debiased:
        cross = (y.T @ x).norm() ** 2
        return float(cross / ((x.T @ x).norm() * (y.T @ y).norm()))
    if len(x) < 4:
        raise ValueError(f"the unbiased estimator needs at least 4 tokens, got {len(x)}")
    k, l = (t @ t.T for t in (x, y))  # noqa: E741
    return float(_hsic(k, l) / (_hsic(k, k) * _hsic(l, l)).abs().sqrt())


def _hsic(k: Tensor, l: Tensor) -> Tensor:  # noqa: E741
    """Unbiased HSIC of two Gram matrices (Song et al. 2012, equation 5), up to 1/(n(n-3))."""
    n = len(k)
    k, l = (t - torch.diag(t.diag()) for t in (k, l))  # noqa: E741
    return (
        (k * l).sum()
        + k.sum() * l.sum() / ((n - 1) * (n - 2))
        - 2 * (k.sum(0) * l.sum(0)).sum() / (n - 2)
    )


def _cka_table(cache: Any, point: str, options: RowOptions) -> tuple[list[str], Tensor]:
    require_cache("source", cache)
    names = [n for n in list(cache.keys()) if n.endswith(point)]
    if len(names) < 2:
        raise ValueError(f"cka needs at least two cached activations at {point!r}, found {names}")
    flat = [_token_rows(cache[n], n, options) for n in names]
    values = torch.eye(len(names), dtype=torch.float64)
    for i in range(len(names)):
        for j in range(i):
            values[i, j] = values[j, i] = linear_cka(flat[i], flat[j])
    return names, values


def _token_rows(x: Tensor, point: str, options: RowOptions) -> Float[Tensor, "token width"]:
    """Activations [batch pos …] (or [pos width]) as one row per token that counts."""
    if x.ndim < 2 or not x.numel():
        raise ValueError(f"activations must be [batch pos …] or [pos width], got {list(x.shape)}")
    split = point.rpartition(".")[2] in SPLIT
    x = x[None] if x.ndim == 2 + split else x
    x = x.flatten(2)
    keep = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device)
    if options.query_mask is not None:
        if options.query_mask.shape not in (keep.shape, keep.shape[1:]):
            raise ValueError(
                f"query_mask {list(options.query_mask.shape)} does not fit activations of "
                f"[batch pos] = {list(keep.shape)}"
            )
        keep = keep & options.query_mask
    keep[:, 0] &= not options.exclude_bos
    return x[keep]


def _pattern_table(
    source: Any, kind: str, centred: bool, heads: str, options: RowOptions
) -> tuple[list[str], Tensor]:
    found: Mapping[str, Mixing] = as_layers(source, options)
    layers = list(found)
    if len(layers) < 2:
        raise ValueError(f"similarity needs at least two layers, found {layers}")
    values = torch.eye(len(layers), dtype=torch.float64)
    for i in range(len(layers)):
        for j in range(i):
            pair = _compare(found[layers[i]], found[layers[j]], kind, centred, heads, options)
            values[i, j] = values[j, i] = pair
    return layers, values


def _compare(
    one: Mixing, other: Mixing, kind: str, centred: bool, heads: str, options: RowOptions
) -> float:
    """Similarity of two layers, streamed over blocks of rows, mean over examples."""
    if (one.n_queries, one.n_keys) != (other.n_queries, other.n_keys):
        raise ValueError(
            f"layers over {one.n_queries} x {one.n_keys} and {other.n_queries} x {other.n_keys} "
            "positions cannot be compared row by row; use kind='cka'"
        )
    if 1 != one.n_examples != other.n_examples != 1:
        raise ValueError(
            f"layers of {one.n_examples} and {other.n_examples} examples cannot be compared; "
            "give activations of the same tokens"
        )
    for layer in (one, other):
        if kind == "js":
            require_weights("layer_similarity(js)", layer, options.normalise)
    sums: list[Tensor] = []
    for start, stop, rows in one.blocks():
        a = row_block(one, rows, start, options)
        b = row_block(other, other.rows(start, stop), start, options)
        allowed = a.allowed | b.allowed
        valid = (a.full.all(1) & b.full.all(1))[:, None]  # [batch 1 rows]
        p, q = (torch.where(valid[..., None], m.weights.double(), 0) for m in (a, b))
        if heads == "mean":
            p, q = p.mean(1, keepdim=True), q.mean(1, keepdim=True)
        if kind == "js":
            part = _js_sums(p, q, valid & (allowed.sum(-1) > 1))
        else:
            part = _cosine_sums(p, q, allowed & valid[..., None], centred)
        sums = [s + t for s, t in zip(sums, part, strict=True)] if sums else part
    table = sums[0] / sums[1] if kind == "js" else _cosine(*sums)
    return float(_matched(table).nanmean())


def _cosine(cross: Tensor, one: Tensor, other: Tensor) -> Tensor:
    """NaN where either is nothing but rounding: a uniform layer, centred, has no direction."""
    return torch.where(
        torch.minimum(one, other) > NO_DIRECTION, cross / (one * other).sqrt(), torch.nan
    )


def _js_sums(p: Tensor, q: Tensor, several: Tensor) -> list[Tensor]:
    # every head of one against every head of the other, one head at a time
    js = torch.stack([js_similarity(head[:, None], q) for head in p.unbind(1)], 1)
    several = several[:, None].expand_as(js)
    return [torch.where(several, js, 0).sum(-1), several.sum(-1).double()]


def _cosine_sums(p: Tensor, q: Tensor, allowed: Tensor, centred: bool) -> list[Tensor]:
    if centred:
        uniform = allowed.double() / allowed.sum(-1, keepdim=True).clamp_min(1)
        p, q = p - uniform, q - uniform
    squares = [x.square().sum((-1, -2)) for x in (p, q)]
    return [p.flatten(2) @ q.flatten(2).mT, squares[0][:, :, None], squares[1][:, None]]


def _matched(table: Float[Tensor, "example one other"]) -> Float[Tensor, " example"]:
    """Mean similarity of the best one-to-one matching of heads (the entry itself for 1 x 1)."""
    if table.shape[1:] == (1, 1):
        return table[:, 0, 0]
    from scipy.optimize import linear_sum_assignment

    best = []
    for example in table.detach().cpu():
        rows, columns = linear_sum_assignment(example.nan_to_num().numpy(), maximize=True)
        best.append(example[rows, columns].mean())
    return torch.stack(best)
