"""The previous token in the keys: smear coefficients, scores split by lag, what composition reads.

Leaves out the kernel by itself (`analysis.kernels`) and removing lags from a running model
(`causal.lags`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from smearlens._explain import explained, require_cache
from smearlens.analysis.mixing.bands import checked_kernel, kernel_lags


@dataclass(frozen=True)
class SmearFit:
    """Least squares k'_t ≈ a k_t + b k_{t-1} per head, each [head]."""

    a: Float[Tensor, " head"]
    b: Float[Tensor, " head"]
    r2: Float[Tensor, " head"]

    @property
    def coefficient(self) -> Float[Tensor, " head"]:
        """Weight b / (|a| + |b|): 0 without smearing, 0.5 for equal parts, below 0 a difference."""
        return self.b / (self.a.abs() + self.b.abs())


@explained
def smear_coefficient(
    smeared: Float[Tensor, "batch pos head d_head"], plain: Float[Tensor, "batch pos head d_head"]
) -> SmearFit:
    """How much of each key is the previous token's key, whatever module put it there.

    Args:
        smeared: keys as they enter the scores (`hook_k` of a run)
        plain: keys without the module: `hook_k` of a run with it cut (`causal.lags`)

    Returns:
        the fit; R² says how far "a mixture of this key and the last" describes the module at all
    """
    if smeared.shape != plain.shape or smeared.ndim != 4:
        raise ValueError(
            f"smeared and plain keys must both be [batch pos head d_head], got "
            f"{list(smeared.shape)} and {list(plain.shape)}"
        )
    y, now, before = (t.double() for t in (smeared[:, 1:], plain[:, 1:], plain[:, :-1]))

    def dot(p: Tensor, q: Tensor) -> Tensor:
        return (p * q).sum((0, 1, 3))

    det = dot(now, now) * dot(before, before) - dot(now, before) ** 2
    a = (dot(y, now) * dot(before, before) - dot(y, before) * dot(now, before)) / det
    b = (dot(y, before) * dot(now, now) - dot(y, now) * dot(now, before)) / det
    rest = y - a[:, None] * now - b[:, None] * before
    return SmearFit(a, b, 1 - dot(rest, rest) / dot(y, y))


@explained
def score_by_lag(
    cache: Mapping[str, Tensor] | Any,
    w_k: Float[Tensor, "head d_model d_head"],
    *,
    conv: str = "blocks.0.conv",
    attn: str = "blocks.0.attn",
    carried: float = 0.0,
) -> dict[int, Float[Tensor, "batch head query key"]]:
    r"""Attention scores split exactly by the lag of the convolution tap that carried them.

    A key is a linear map of the convolution's output, so
    $$S[q, k] = \sum_l S_l[q, k], \qquad
    S_l[q, k] = q_q \cdot W_K^\top (w_l \odot x_{k - l}) / \sqrt{d}$$
    for a convolution of the stream without bias, and nothing (a norm, a rotation, smeared keys)
    between it and the keys.

    Args:
        cache: with `{conv}.hook_in`, `hook_kernel`, `hook_out` and `{attn}.hook_q`
        w_k: key weights of the attention layer (`model.blocks[0].attn.W_K`)
        conv: name of the convolution
        attn: name of the attention layer
        carried: weight of the skip connection around the convolution (1 in a residual stack),
            which belongs to lag 0

    Returns:
        lag to scores; their sum is `hook_attn_scores` before masking

    Raises:
        ValueError: if something is not in the cache, or `hook_attn_scores` is and differs from the
            sum: by a skip connection (`carried`) or by what cannot be split
    """
    names = (f"{conv}.hook_in", f"{attn}.hook_q", f"{conv}.hook_kernel")
    require_cache("cache", cache)
    if missing := [name for name in names if name not in list(cache.keys())]:
        raise ValueError(f"conv={conv!r}, attn={attn!r}: {missing} are not in the cache")
    given = [cache[name].detach() for name in names] + [w_k.detach()]
    wide = torch.float64 if any(t.dtype == torch.float64 for t in given) else torch.float32
    x, q, kernel, w_k = (t.to(wide) for t in given)
    x, q = (t if t.ndim == ndim else t[None] for t, ndim in ((x, 3), (q, 4)))
    checked_kernel(names[2], kernel)
    if w_k.shape != (q.shape[2], x.shape[2], q.shape[3]):
        wanted = [q.shape[2], x.shape[2], q.shape[3]]
        raise ValueError(f"w_k must be [head d_model d_head] = {wanted}, got {list(w_k.shape)}")
    parts = {}
    for tap, lag in enumerate(kernel_lags(cache, conv)):
        moved = shifted(x, lag) * (kernel[:, tap] + (carried if lag == 0 else 0.0))
        keys = torch.einsum("bkm,hmd->bkhd", moved, w_k)
        parts[lag] = torch.einsum("bqhd,bkhd->bhqk", q, keys) * q.shape[-1] ** -0.5
    _require_sum(parts, cache, attn)
    return parts


@explained
def smear_evidence(
    by_lag: Mapping[int, Float[Tensor, "batch head query key"]],
    tokens: Int[Tensor, "batch pos"],
) -> dict[int, Float[Tensor, "example head"]]:
    """Per lag: mean score on the induction key minus that on the other keys up to the query.

    Args:
        by_lag: from `score_by_lag`
        tokens: what the model was run on

    Returns:
        lag to [example head], in units of the scores (nats); key smearing means that lag 1 leads
    """
    for lag, scores in by_lag.items():
        if (len(scores), *scores.shape[-2:]) != (*tokens.shape, tokens.shape[1]):
            raise ValueError(
                f"tokens {list(tokens.shape)} do not belong to scores {list(scores.shape)} of lag "
                f"{lag}; pass the tokens the model was run on"
            )
    target = _induction_keys(tokens)[:, None]
    position = torch.arange(tokens.shape[1])
    past = (position[:, None] >= position) & ~target
    rows = target.any(-1)
    evidence = {}
    for lag, scores in by_lag.items():
        on = (scores * target).sum(-1) / target.sum(-1).clamp_min(1)
        off = (scores * past).sum(-1) / past.sum(-1).clamp_min(1)
        evidence[lag] = ((on - off) * rows).sum(-1) / rows.sum(-1)
    return evidence


def _require_sum(parts: dict[int, Tensor], cache: Any, attn: str) -> None:
    """Raise a ValueError if the scores are cached and are not the sum of their parts."""
    if (name := f"{attn}.hook_attn_scores") not in list(cache.keys()):
        return
    whole = cache[name].detach()
    seen = whole.isfinite()
    whole = torch.where(seen, whole, 0).double()
    gap = torch.where(seen, sum(parts.values()) - whole, 0).abs().max()
    if gap > 0.05 * whole.abs().max():  # rounding of half precision stays far below
        raise ValueError(
            f"the parts miss {name} by up to {float(gap):.2g}; pass carried=1 if a skip connection "
            "goes around the convolution, carried=0 if none does. A norm, a rotation, a bias or "
            "smeared keys in between cannot be split by lag"
        )


def composition_gain(
    kernel: Float[Tensor, "channel tap"],
    w_v: Float[Tensor, "head d_model d_head"],
    w_o: Float[Tensor, "head d_head d_model"],
) -> Float[Tensor, "head tap"]:
    """g[h, l] = ‖W_O W_V diag(w_l)‖_F, normalised over l: how much each lag feeds a head's output.

    For `mixing.ComposedMixing`, which carries attention through the convolution to the tokens.
    """
    ov = w_v @ w_o  # [head d_model d_model]
    norms = torch.einsum("ct,hcm->htcm", kernel, ov).flatten(2).norm(dim=-1)
    return norms / norms.sum(-1, keepdim=True)


def shifted(x: Float[Tensor, "batch pos channel"], lag: int) -> Float[Tensor, "batch pos channel"]:
    """x[t - lag] at position t, 0 where that does not exist."""
    out = torch.zeros_like(x)
    length = x.shape[1]
    lo, hi = max(0, lag), min(length, length + lag)
    if lo < hi:
        out[:, lo:hi] = x[:, lo - lag : hi - lag]
    return out


def _induction_keys(tokens: Int[Tensor, "batch pos"]) -> Bool[Tensor, "batch query key"]:
    """True at (q, k + 1) where k < q holds the query's token."""
    match = (tokens[:, :, None] == tokens[:, None, :]).tril(-1)
    moved = torch.zeros_like(match)
    moved[..., 1:] = match[..., :-1]
    return moved
