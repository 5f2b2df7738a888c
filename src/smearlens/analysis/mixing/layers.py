"""From a cache to the mixing of each of its layers, by the names of its hooks.

Leaves out the mixings themselves (`kinds`, `state_space`) and what is read from them (`rows`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, get_args

import torch
from torch import Tensor

from smearlens._explain import explained, require_cache
from smearlens.analysis.mixing.bands import kernel_lags
from smearlens.analysis.mixing.kinds import BandMixing, DenseMixing, Mixing, SoftmaxMixing
from smearlens.analysis.mixing.options import Kind, RowOptions, fitted
from smearlens.analysis.mixing.state_space import SSMMixing


@explained
def mixings(
    cache: Mapping[str, Tensor] | Any,
    *,
    kind: Kind | Sequence[Kind] = ("attention", "ssm"),
    causal: bool | None = None,
) -> dict[str, Mixing]:
    """The mixing of every layer in a cache, by layer name ("blocks.0.attn", "blocks.0.conv", …).

    Attention comes from `hook_pattern`; where that was not cached from `hook_attn_scores`, or from
    `hook_q` and `hook_k` (rotated: `hook_rot_q`, `hook_rot_k`); a convolution from `hook_kernel`,
    with its lags read off `hook_in` and `hook_out`; a state-space layer from `hook_A_bar`,
    `hook_B_bar` and `hook_C`.

    Args:
        cache: a mapping from hook names to tensors: a TransformerLens `ActivationCache`, a dict
        kind: which layers; convolutions (one "head" per channel) only when asked for
        causal: whether attention masks later keys. Default: as its pattern shows, True where it
            is rebuilt from q and k, False for cross attention and layers of an encoder

    Raises:
        ValueError: if the cache holds no such layer, or only part of what one needs, such as some
            of the queries
    """
    kinds = (kind,) if isinstance(kind, str) else tuple(kind)
    if unknown := set(kinds) - set(get_args(Kind)):
        raise ValueError(f"unknown kind {sorted(unknown)}; allowed: {list(get_args(Kind))}")
    require_cache("cache", cache)
    names = list(cache.keys())
    found: dict[str, Mixing] = {}
    for name in names:
        layer = name.rpartition(".")[0]
        crossed = layer.endswith("cross_attn")
        apart = crossed or layer.startswith("encoder.")
        mixing = _made(cache, name, kinds, False if causal is None and apart else causal)
        if mixing is None:
            continue
        if mixing.crossed and not crossed:
            raise ValueError(
                f"{name} has {mixing.n_queries} queries and {mixing.n_keys} keys. Cached with "
                "pos_slice, or with a state: which keys its queries saw is unknown; cache the "
                "whole sequence and choose by query_mask=. Cross attention: let the layer's name "
                "end in 'cross_attn'"
            )
        mixing.crossed = crossed
        found[layer] = mixing
    if not found:
        raise ValueError(
            f"no {' or '.join(kinds)} layer in a cache of {len(names)} activations "
            f"({names[:4]}…); cache hook_pattern, or hook_q and hook_k (attention), hook_in, "
            "hook_kernel and hook_out (conv), or hook_A_bar, hook_B_bar and hook_C (ssm)"
        )
    return dict(sorted(found.items(), key=lambda item: _natural(item[0])))


def _made(cache: Any, name: str, kinds: tuple, causal: bool | None) -> Mixing | None:
    """The mixing that starts from this activation; None if it starts from another, or from none."""
    layer, _, point = name.rpartition(".")
    if "attention" in kinds and point == "hook_pattern":
        return DenseMixing(_batched(_filled(cache, name), 4, name), causal=causal)
    if "attention" in kinds and point in ("hook_attn_scores", "hook_q"):
        return _rebuilt(cache, layer, point, causal)
    if "conv" in kinds and point == "hook_kernel":
        lags = kernel_lags(cache, layer)
        return BandMixing(cache[name], lags, cache[f"{layer}.hook_out"].shape[-2])
    if "ssm" in kinds and point == "hook_A_bar":
        axes = {f"{layer}.{p}": n for p, n in (("hook_A_bar", 4), ("hook_B_bar", 4), ("hook_C", 3))}
        if missing := [needed for needed in axes if needed not in cache.keys()]:  # noqa: SIM118
            raise ValueError(f"{name} is cached without {missing}; cache all three")
        parts = (_batched(_filled(cache, needed), n, needed) for needed, n in axes.items())
        return SSMMixing.from_steps(*parts)  # pyrefly: ignore[missing-attribute]
    return None


def _rebuilt(cache: Any, layer: str, point: str, causal: bool | None) -> Mixing | None:
    """The attention of a layer from its scores, or from queries and keys; None if better is there.

    TransformerLens keeps queries and keys before the rotation in `hook_q` and `hook_k`, and after
    it in `hook_rot_q` and `hook_rot_k`.
    """
    names = set(cache.keys())
    scores = f"{layer}.hook_attn_scores"
    if f"{layer}.hook_pattern" in names or (point == "hook_q" and scores in names):
        return None
    if point == "hook_attn_scores":
        rows = _batched(_filled(cache, scores), 4, scores)
        wide = torch.promote_types(rows.dtype, torch.float32)
        return DenseMixing(rows.to(wide).softmax(-1).nan_to_num(), causal=causal)
    turned = "rot_" if f"{layer}.hook_rot_q" in names else ""
    query, key = (f"{layer}.hook_{turned}{role}" for role in ("q", "k"))
    if key not in names:
        raise ValueError(f"{query} is cached without {key}; cache both")
    q, k = (_batched(_filled(cache, name), 4, name) for name in (query, key))
    return SoftmaxMixing(q, k, causal=causal is not False)


def as_layers(source: Any, options: RowOptions) -> dict[str, Mixing]:
    """Whatever a metric was given, as mixings by layer name; one pattern or mixing has name ""."""
    layers = _found(source, options)
    if options.query_mask is None:
        return layers
    return {
        name: m.among(fitted("query_mask", options.query_mask, m, m.n_queries))
        if isinstance(m, DenseMixing)
        else m
        for name, m in layers.items()
    }


def _found(source: Any, options: RowOptions) -> dict[str, Mixing]:
    if isinstance(source, Tensor):
        return {"": _pattern_mixing(source)}
    if isinstance(source, Mixing):
        return {"": source}
    if not callable(getattr(source, "keys", None)):
        raise TypeError(
            "source must be a cache (hook names to tensors), a Mixing or a pattern tensor, "
            f"got {type(source).__name__}"
        )
    given = list(source.values()) if isinstance(source, Mapping) else []
    if any(isinstance(m, Mixing) for m in given):
        if not all(isinstance(m, Mixing) for m in given):
            raise TypeError("source holds mixings and other things; give mixings, or activations")
        return dict(source)
    return mixings(source, kind=options.kind)


def _pattern_mixing(pattern: Tensor) -> DenseMixing:
    """One pattern tensor as a mixing, with the axes that it lacks."""
    if pattern.ndim not in (2, 3, 4) or not pattern.numel():
        raise ValueError(
            "a pattern is [batch head query key], [head query key] or [query key], no axis empty, "
            f"got shape {tuple(pattern.shape)}"
        )
    if not pattern.is_floating_point():
        raise TypeError(f"a pattern holds probabilities, got dtype {pattern.dtype}")
    return DenseMixing(pattern[(None,) * (4 - pattern.ndim)])


def _batched(x: Tensor, ndim: int, name: str) -> Tensor:
    """`x` with its batch axis, which a cache may have dropped."""
    if x.ndim not in (ndim, ndim - 1):
        raise ValueError(f"{name} must have {ndim} axes (or {ndim - 1}), got {tuple(x.shape)}")
    return x if x.ndim == ndim else x[None]


def _filled(cache: Any, name: str) -> Tensor:
    """An activation that holds something."""
    if not cache[name].numel():
        found = tuple(cache[name].shape)
        raise ValueError(f"{name} is empty: {found}; run the model on at least one token")
    return cache[name]


def _natural(name: str) -> list[tuple[int, str]]:
    """Sort key that puts blocks.2 before blocks.10."""
    return [(int(p), "") if p.isdigit() else (0, p) for p in name.split(".")]
