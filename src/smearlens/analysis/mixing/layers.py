"""From a cache to the mixing of each of its layers, by the names of its hooks.

Leaves out the mixings themselves: `kinds`, `state_space`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

from torch import Tensor

from smearlens._explain import explained, require_cache
from smearlens.analysis.mixing.bands import kernel_lags
from smearlens.analysis.mixing.kinds import BandMixing, DenseMixing, Mixing, SoftmaxMixing
from smearlens.analysis.mixing.state_space import SSMMixing

Kind = Literal["attention", "conv", "ssm"]


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
        causal: of attention rebuilt from q and k. Default: True, except for cross attention and
            layers of an encoder

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
        if "attention" in kinds and point == "hook_pattern":
            found[layer] = DenseMixing(_batched(_filled(cache, name), 4, name))
        elif "attention" in kinds and point == "hook_q" and f"{layer}.hook_pattern" not in names:
            if (key := f"{layer}.hook_k") not in names:
                raise ValueError(f"{name} is cached without {key}; cache both")
            q, k = (_batched(_filled(cache, n), 4, n) for n in (name, key))
            found[layer] = SoftmaxMixing(q, k, causal=causal is not False)
        elif "conv" in kinds and point == "hook_kernel":
            lags = kernel_lags(cache, layer)
            found[layer] = BandMixing(cache[name], lags, cache[f"{layer}.hook_out"].shape[-2])
        elif "ssm" in kinds and point == "hook_A_bar":
            parts = (_filled(cache, f"{layer}.{p}") for p in ("hook_A_bar", "hook_B_bar", "hook_C"))
            found[layer] = SSMMixing.from_steps(*parts)  # pyrefly: ignore[missing-attribute]
        if layer in found and layer.endswith("attn"):
            found[layer].crossed |= layer.endswith("cross_attn")
            if causal is None and (found[layer].crossed or layer.startswith("encoder.")):
                found[layer].causal = False  # whatever zeros a square pattern happens to hold
    if not found:
        raise ValueError(
            f"no {' or '.join(kinds)} layer in a cache of {len(names)} activations "
            f"({names[:4]}…); cache hook_pattern, or hook_q and hook_k (attention), hook_in, "
            "hook_kernel and hook_out (conv), or hook_A_bar, hook_B_bar and hook_C (ssm)"
        )
    return dict(sorted(found.items(), key=lambda item: _natural(item[0])))


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
