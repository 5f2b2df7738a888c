"""From a cache to the mixing of each of its layers, by the names of its hooks.

Leaves out the mixings themselves (`kinds`, `state_space`) and what is read from them (`rows`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, get_args

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

    Attention comes from `hook_pattern`, or from `hook_q` and `hook_k` where the pattern was not
    cached; a convolution from `hook_kernel`, with its lags read off `hook_in` and `hook_out`; a
    state-space layer from `hook_A_bar`, `hook_B_bar` and `hook_C`.

    Args:
        cache: a mapping from hook names to tensors: a TransformerLens `ActivationCache`, a dict
        kind: which layers; convolutions (one "head" per channel) only when asked for
        causal: whether attention masks later keys. Default: as its pattern shows, True where it
            is rebuilt from q and k, False for cross attention and layers of an encoder

    Raises:
        ValueError: if the cache holds no such layer, or only part of what one needs
    """
    kinds = (kind,) if isinstance(kind, str) else tuple(kind)
    if unknown := set(kinds) - set(get_args(Kind)):
        raise ValueError(f"unknown kind {sorted(unknown)}; allowed: {list(get_args(Kind))}")
    require_cache("cache", cache)
    names = list(cache.keys())
    found: dict[str, Mixing] = {}
    for name in names:
        layer, _, point = name.rpartition(".")
        crossed = layer.endswith("cross_attn")
        masked = False if causal is None and (crossed or layer.startswith("encoder.")) else causal
        if "attention" in kinds and point == "hook_pattern":
            found[layer] = DenseMixing(_batched(_filled(cache, name), 4, name), causal=masked)
        elif "attention" in kinds and point == "hook_q" and f"{layer}.hook_pattern" not in names:
            if (key := f"{layer}.hook_k") not in names:
                raise ValueError(f"{name} is cached without {key}; cache both")
            q, k = (_batched(_filled(cache, n), 4, n) for n in (name, key))
            found[layer] = SoftmaxMixing(q, k, causal=masked is not False)
        elif "conv" in kinds and point == "hook_kernel":
            lags = kernel_lags(cache, layer)
            found[layer] = BandMixing(cache[name], lags, cache[f"{layer}.hook_out"].shape[-2])
        elif "ssm" in kinds and point == "hook_A_bar":
            parts = (_filled(cache, f"{layer}.{p}") for p in ("hook_A_bar", "hook_B_bar", "hook_C"))
            found[layer] = SSMMixing.from_steps(*parts)  # pyrefly: ignore[missing-attribute]
        if layer in found and crossed:
            found[layer].crossed = True
    if not found:
        raise ValueError(
            f"no {' or '.join(kinds)} layer in a cache of {len(names)} activations "
            f"({names[:4]}…); cache hook_pattern, or hook_q and hook_k (attention), hook_in, "
            "hook_kernel and hook_out (conv), or hook_A_bar, hook_B_bar and hook_C (ssm)"
        )
    return dict(sorted(found.items(), key=lambda item: _natural(item[0])))


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
