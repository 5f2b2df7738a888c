"""From TransformerLens bridges: what they cache, under the names that every score reads.

Contains the name map of attention families (decoders, encoders, encoder-decoders) and of Mamba.
Needs `transformer_lens` only in the caller's hands: nothing here imports it. Leaves out Mamba-2 and
mixers with norms of their own on Δ, B and C (Jamba, FalconMamba).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from smearlens._explain import explained, require_cache
from smearlens.analysis.mixing.kinds import Mixing
from smearlens.analysis.mixing.layers import mixings
from smearlens.analysis.mixing.state_space import SSMMixing

BLOCK = re.compile(r"(?:(encoder|decoder)_)?blocks\.(\d+)")
NOT_PLAIN = (  # fields of a Hugging Face configuration: attention is no plain softmax of q k
    "sliding_window", "attn_logit_softcapping", "query_pre_attn_scalar", "attention_multiplier",
    "alibi", "relative_attention_num_buckets", "scale_attn_by_inverse_layer_idx",
)  # fmt: skip
ATTENTION = re.compile(
    BLOCK.pattern + r"\.(?:(?:self_)?(attn)|(cross_attn))\.(hook_(?:pattern|attn_scores|v|z))"
)
ROTATED = re.compile(BLOCK.pattern + r"\.(?:self_)?(attn)\.hook_rot_([qk])")
STREAM = re.compile(
    BLOCK.pattern + r"\.(hook_resid_pre|hook_resid_post|hook_attn_out|hook_mlp_out)"
)
PROJECTION = re.compile(r"blocks\.(\d+)\.mixer\.x_proj\.hook_out")


@explained
def bridge_cache(
    cache: Mapping[str, Tensor] | Any, bridge: Any = None, *, steps: bool = True
) -> dict[str, Tensor]:
    """What a `TransformerBridge` cached, under our names.

    Attention: `hook_pattern`, `hook_attn_scores`, `hook_v`, `hook_z`, and `hook_q`, `hook_k` where
    the bridge has them as they enter the scores (after rotary). Queries before that are left out: a
    pattern rebuilt from them would be wrong. Mamba: everything of our `blocks.0.conv` and
    `blocks.0.ssm` but write, state and y, made from what the projections put out and the weights.

    Args:
        cache: as `bridge.run_with_cache(tokens)` returns it
        bridge: the model; needed for a Mamba, whose weights are in no cache, and for queries and
            keys without their pattern
        steps: include `hook_A_bar` and `hook_B_bar`, each [batch pos channel d_state] per layer;
            `bridge_mixings` does without

    Raises:
        ValueError: if nothing in the cache has a name here, a state-space layer is not Mamba's, or
            only queries and keys are cached of attention that is not known to be their softmax
    """
    require_cache("cache", cache)
    found: dict[str, Tensor] = {}
    for name in cache.keys():  # noqa: SIM118, an ActivationCache is no mapping
        if (ours := _our_name(name)) is not None:
            found[ours] = cache[name]
    for name in [n for n in found if n.endswith(("attn.hook_q", "attn.hook_k"))]:
        layer = name.rpartition(".")[0]
        seen = {f"{layer}.hook_pattern", f"{layer}.hook_attn_scores"} & found.keys()
        if not seen and not _plain_softmax(bridge):
            why = "pass bridge=, or" if bridge is None else "this model windows, caps or rescales;"
            raise ValueError(
                f"the pattern of {layer} cannot be rebuilt from its queries and keys alone: {why} "
                f"cache {layer}.hook_pattern"
            )
    for layer, mixer in _mixers(cache, bridge):
        found |= _mamba_layer(cache, layer, mixer)
        if steps:
            ssm = f"blocks.{layer}.ssm"
            delta, B = found[f"{ssm}.hook_delta"].unsqueeze(-1), found[f"{ssm}.hook_B"]
            found[f"{ssm}.hook_A_bar"] = torch.exp(delta * _decay(mixer))
            found[f"{ssm}.hook_B_bar"] = delta * B.unsqueeze(-2)
    if not found:
        names = list(cache.keys())
        raise ValueError(
            f"none of the {len(names)} cached names ({names[:3]}…) is one of a bridge that this "
            "library knows; cache blocks.0.attn.hook_pattern, or for a Mamba blocks.0.mixer.in_proj"
            ".hook_out, x_proj.hook_in and x_proj.hook_out"
        )
    return found


@explained
def bridge_mixings(cache: Mapping[str, Tensor] | Any, bridge: Any = None) -> dict[str, Mixing]:
    """The mixing of every layer a bridge cached; any score takes it in the place of a cache.

    For a Mamba this holds no [batch pos channel d_state] tensor. Arguments and errors as in
    `bridge_cache`.
    """
    ours = bridge_cache(cache, bridge, steps=False)
    found: dict[str, Mixing] = {}
    if any(name.endswith("hook_pattern") for name in ours):
        found |= mixings(ours, kind="attention")
    for layer, mixer in _mixers(cache, bridge):
        ssm = f"blocks.{layer}.ssm"
        delta, B, C = (ours[f"{ssm}.{point}"] for point in ("hook_delta", "hook_B", "hook_C"))
        found[ssm] = SSMMixing.from_delta(delta, _decay(mixer), B, C)
    if not found:
        raise ValueError(
            f"no pattern and no Mamba layer among {sorted(ours)[:4]}…; cache "
            "blocks.0.attn.hook_pattern"
        )
    return found


def _plain_softmax(bridge: Any) -> bool:
    """Whether attention is known to be softmax(q k / √d_head) over all earlier keys."""
    config = getattr(getattr(bridge, "original_model", None), "config", None)
    return config is not None and not any(getattr(config, name, None) for name in NOT_PLAIN)


def _our_name(theirs: str) -> str | None:
    """Our name of an attention activation or of the residual stream, if it has one."""
    if match := ATTENTION.fullmatch(theirs):
        part, index, own, cross, point = match.groups()
        return f"{_block(part, index)}.{own or cross}.{point}"
    if match := ROTATED.fullmatch(theirs):
        part, index, own, role = match.groups()
        return f"{_block(part, index)}.{own}.hook_{role}"
    if match := STREAM.fullmatch(theirs):
        part, index, point = match.groups()
        return f"{_block(part, index)}.{point}"
    return theirs if theirs in ("hook_embed", "hook_pos_embed") else None


def _block(part: str | None, index: str) -> str:
    return f"{part}.blocks.{index}" if part else f"blocks.{index}"


def _mixers(cache: Any, bridge: Any) -> Iterator[tuple[int, Any]]:
    """Index and bridge of each Mamba layer in the cache."""
    names = list(cache.keys())
    other = [n for n in names if ".mixer." in n and n.replace("in_proj", "x_proj") not in names]
    for name in names:
        if not (match := PROJECTION.fullmatch(name)):
            continue
        if bridge is None:
            raise ValueError(f"{name} is a Mamba's: pass bridge=, its weights are needed too")
        mixer = bridge.blocks[int(match[1])].mixer
        if getattr(mixer, "rms_eps", None) is not None or hasattr(mixer, "b_layernorm"):
            raise ValueError(f"{name}: a mixer with norms on its own Δ, B, C is not supported")
        yield int(match[1]), mixer
    if other and not any(PROJECTION.fullmatch(name) for name in names):
        raise ValueError(f"{other[0]} is cached without an x_proj.hook_out: not a Mamba (1) layer")


def _mamba_layer(cache: Any, layer: int, mixer: Any) -> dict[str, Tensor]:
    """Convolution and state-space layer of one block, from three cached activations."""
    theirs, block = f"blocks.{layer}.mixer", f"blocks.{layer}"
    needed = [f"{theirs}.{p}" for p in ("in_proj.hook_out", "x_proj.hook_in", "x_proj.hook_out")]
    if missing := [name for name in needed if name not in cache]:
        raise ValueError(f"{block} of this Mamba needs {missing} in the cache")
    inner, u, projected = (cache[name] for name in needed)
    x, gate = inner.chunk(2, -1)
    d_state = mixer.A_log.shape[1]
    low, B, C = projected.split([projected.shape[-1] - 2 * d_state, d_state, d_state], -1)
    raw = F.linear(low, mixer.dt_proj.weight.detach(), mixer.dt_proj.bias.detach())
    kernel = mixer.conv1d.weight.detach()
    bias = None if mixer.conv1d.bias is None else mixer.conv1d.bias.detach()
    padded = F.pad(x.mT, (kernel.shape[-1] - 1, 0))
    return {
        f"{block}.conv.hook_in": x,
        f"{block}.conv.hook_kernel": kernel[:, 0].flip(-1),  # theirs correlates
        f"{block}.conv.hook_out": F.conv1d(padded, kernel, bias, groups=len(kernel)).mT,
        f"{block}.ssm.hook_u": u,
        f"{block}.ssm.hook_delta_raw": raw,
        f"{block}.ssm.hook_delta": F.softplus(raw),
        f"{block}.ssm.hook_B": B,
        f"{block}.ssm.hook_C": C,
        f"{block}.ssm.hook_gate": F.silu(gate),
    }


def _decay(mixer: Any) -> Float[Tensor, "channel d_state"]:
    """A, negative."""
    return -torch.exp(mixer.A_log.detach().float())
