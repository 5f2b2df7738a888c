"""Multi-head attention, self or cross, with every intermediate behind a hook.

Contains the layer and its two equal cores: the fused one of torch, used while nobody looks at the
scores or the pattern (except where the other is faster), and the explicit one that passes them
through their hooks. Leaves out positions (`nn.positions`) and the convolution (`nn.conv`).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F

from smearlens._explain import describe, explained
from smearlens._hooks import HookPoint, is_hooked
from smearlens._tracing import is_transformed
from smearlens.nn.conv import DepthwiseConv, KeySmear
from smearlens.nn.positions import Rotary

SHORT = 32  # keys; up to here the explicit core costs a CPU no more, and less if heads are narrow


@explained
class Attention(nn.Module):
    r"""z = softmax(q k' / √d_head) v per head, then an output projection.

    Before the scores, each of q, k and v may pass a depthwise convolution of its own, the keys may
    be smeared (Olsson et al. 2022), and q and k may be rotated, in this order.

    Args:
        d_model: width of the residual stream
        n_heads: heads; must divide d_model
        causal: whether a query sees only keys at or before its position
        rotary: whether q and k are rotated by their positions
        smear: whether each head mixes the previous key into every key by a learned weight
        conv_on: roles ("q", "k", "v") that pass a depthwise convolution after the projection
        kernel_size: taps of those convolutions
        conv_causal: False gives them the "same" padding that reads ahead
        bias: whether the projections have biases
    """

    def __init__(
        self,
        d_model: int,
        n_heads: int,
        *,
        causal: bool = True,
        rotary: bool = False,
        smear: bool = False,
        conv_on: Sequence[str] = (),
        kernel_size: int = 3,
        conv_causal: bool = True,
        bias: bool = False,
    ):
        super().__init__()
        if n_heads < 1 or d_model < 1 or d_model % n_heads:
            raise ValueError(f"n_heads={n_heads} must be at least 1 and divide d_model={d_model}")
        for role in conv_on:
            if role not in ("q", "k", "v"):
                raise ValueError(f"conv_on takes 'q', 'k' and 'v', got {role!r}")
            if list(conv_on).count(role) > 1:
                raise ValueError(f"conv_on={conv_on!r} names {role!r} twice; each role has one")
        self.n_heads, self.causal, self.bias = n_heads, causal, bias
        self.name = ""  # the model's setup() writes the module's path here; it prefixes `state`
        self.d_head = d_model // n_heads
        self.in_proj = nn.Linear(d_model, 3 * d_model, bias=bias)  # q, k, v stacked
        self.out_proj = nn.Linear(d_model, d_model, bias=bias)
        self.convs = tuple(conv_on)
        for role in self.convs:
            conv = DepthwiseConv(d_model, kernel_size, causal=conv_causal)
            conv.name = f"conv_{role}"  # of a layer on its own; a model's setup() writes its path
            self.add_module(f"conv_{role}", conv)
        self.smear = KeySmear(n_heads) if smear else None
        self.rotary = Rotary(self.d_head) if rotary else None
        self.hook_q = HookPoint()  # [batch pos head d_head], as it enters the scores
        self.hook_k = HookPoint()  # [batch pos head d_head]
        self.hook_v = HookPoint()  # [batch pos head d_head]
        self.hook_attn_scores = HookPoint()  # [batch head query key], -inf where masked
        self.hook_pattern = HookPoint()  # [batch head query key]
        self.hook_z = HookPoint()  # [batch pos head d_head]

    def forward(
        self,
        x: Float[Tensor, "batch pos d_model"],
        source: Float[Tensor, "batch key d_model"] | None = None,
        *,
        key_mask: Bool[Tensor, "batch key"] | None = None,
        state: dict[str, Tensor] | None = None,
    ) -> Float[Tensor, "batch pos d_model"]:
        """Attend from `x` to itself, or to `source`.

        Args:
            x: queries, and keys and values too unless `source` is given
            source: what a cross-attention layer reads
            key_mask: True where a key may be seen; every query must see at least one
            state: what earlier tokens left behind (keys, values, convolution buffers); read and
                updated in place, under names that start with this layer's own. Keys and values of
                a source are projected once and read from there later

        Raises:
            ValueError: if a causal layer is given a source, whose positions it cannot compare, a
                layer with causal=False a state without a source (later keys are part of what its
                queries see), or one with convolutions, smearing or rotation a source and a state
        """
        self._check("x", x, x)
        if source is not None and self.causal:
            raise ValueError(
                "source is another sequence, which has no past and no future here: "
                "build the layer with causal=False for cross attention"
            )
        if source is None and state is not None and not self.causal:
            raise ValueError(
                "self-attention with causal=False reads keys that do not exist yet: run it on the "
                "whole sequence with state=None, or build it with causal=True"
            )
        past = 0
        if source is None:
            past = 0 if state is None else _length(state.get(f"{self.name}.k"))
            q, k, v = self._shape(self.in_proj(x).chunk(3, dim=-1), state, past)
        else:
            self._check("source", source, x)
            q, k, v = self._cross(x, source, state)
        q, k, v = self.hook_q(q), self.hook_k(k), self.hook_v(v)
        if state is not None and source is None:
            k, v = _append(state, f"{self.name}.k", k), _append(state, f"{self.name}.v", v)
        z = self._mix(q, k, v, past, key_mask)
        return self.out_proj(self.hook_z(z).flatten(2))  # [batch pos (head d_head)]

    @property
    def fused(self) -> bool:
        """Whether the next forward may take the fused core: neither scores nor pattern hooked.

        Under a transform of `torch.func` it is the explicit one: torch cannot follow its own there.
        """
        hooked = is_hooked(self.hook_attn_scores) or is_hooked(self.hook_pattern)
        return not (hooked or is_transformed())

    @property
    def W_Q(self) -> Float[Tensor, "head d_model d_head"]:
        """Query weights in TransformerLens' layout."""
        return self._weights(0)

    @property
    def W_K(self) -> Float[Tensor, "head d_model d_head"]:
        """Key weights in TransformerLens' layout."""
        return self._weights(1)

    @property
    def W_V(self) -> Float[Tensor, "head d_model d_head"]:
        """Value weights in TransformerLens' layout."""
        return self._weights(2)

    @property
    def W_O(self) -> Float[Tensor, "head d_head d_model"]:
        """Output weights in TransformerLens' layout."""
        return rearrange(self.out_proj.weight, "model (head d) -> head d model", d=self.d_head)

    def _weights(self, role: int) -> Float[Tensor, "head d_model d_head"]:
        return rearrange(
            self.in_proj.weight, "(role head d) model -> role head model d", role=3, d=self.d_head
        )[role]

    def _check(self, name: str, given: Tensor, x: Tensor) -> None:
        """Raise unless argument `name` is as wide as this layer and as many sequences as `x`."""
        width = self.out_proj.in_features
        if not isinstance(given, Tensor) or given.ndim != 3 or given.shape[2] != width:
            raise ValueError(f"{name} must be [batch pos d_model={width}], got {describe(given)}")
        if not given.numel() or len(given) != len(x) or not given.is_floating_point():
            raise ValueError(
                f"{name} must be {len(x) or 1} sequences of at least 1 position of floating "
                f"numbers, got {describe(given)}"
            )

    def _cross(self, x: Tensor, source: Tensor, state: dict | None) -> tuple[Tensor, ...]:
        """Queries of `x`, keys and values of `source`; these only once if there is a `state`."""
        w_q, w_kv = self.in_proj.weight.tensor_split([x.shape[-1]])
        b_q, b_kv = self.in_proj.bias.tensor_split([x.shape[-1]]) if self.bias else (None, None)
        q = F.linear(x, w_q, b_q)
        if state is None:
            return self._shape((q, *F.linear(source, w_kv, b_kv).chunk(2, -1)), None, 0)
        if self.convs or self.smear is not None or self.rotary is not None:
            raise ValueError(
                "a cross-attention layer with conv_on, smear or rotary keeps no state: "
                "pass state=None and all of x at once"
            )
        names = [f"{self.name}.source_{role}" for role in ("k", "v")]
        if names[0] not in state:
            state.update(zip(names, F.linear(source, w_kv, b_kv).chunk(2, -1), strict=True))
        return self._shape((q, *(state[name] for name in names)), None, 0)

    def _shape(self, parts: Sequence[Tensor], state: dict | None, past: int) -> tuple[Tensor, ...]:
        """q, k and v as [batch pos head d_head], convolved, smeared and rotated."""
        roles = dict(zip(("q", "k", "v"), parts, strict=True))
        for role in self.convs:
            roles[role] = self.get_submodule(f"conv_{role}")(roles[role], state=state)
        q, k, v = (t.view(*t.shape[:2], -1, self.d_head) for t in roles.values())
        if self.smear is not None:
            k = self.smear(k, state=state)
        if self.rotary is not None:
            q, k = self.rotary(q, past), self.rotary(k, past)
        return q, k, v

    def _mix(self, q: Tensor, k: Tensor, v: Tensor, past: int, key_mask: Tensor | None) -> Tensor:
        """Softmax attention by whichever core the hooks allow; [batch pos head d_head]."""
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))  # [batch head pos d_head]
        n_queries, n_keys = q.shape[2], k.shape[2]
        triangle = self.causal and n_queries > 1
        fused = self.fused and (n_keys > SHORT or k.device.type != "cpu")
        if fused and key_mask is None and (not triangle or past == 0):
            z = F.scaled_dot_product_attention(q, k, v, is_causal=triangle)
            return z.transpose(1, 2)
        mask = q.new_zeros(1, 1, n_queries, n_keys)
        if triangle:
            ahead = torch.ones(n_queries, n_keys, dtype=torch.bool, device=q.device).triu(1 + past)
            mask = mask.masked_fill(ahead, -torch.inf)
        if key_mask is not None:
            fits = isinstance(key_mask, Tensor) and key_mask.shape == (len(q), n_keys)
            if not fits or key_mask.dtype != torch.bool:
                raise ValueError(
                    f"key_mask must be a bool tensor [batch key] = {[len(q), n_keys]}, got "
                    f"{describe(key_mask)}; True where a key may be seen"
                )
            mask = mask.masked_fill(~key_mask[:, None, None, :], -torch.inf)
        if fused:
            return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2)
        scale = self.d_head**-0.5
        z = explicit_attention(q, k, v, mask, scale, self.hook_attn_scores, self.hook_pattern)
        return z.transpose(1, 2)


def explicit_attention(
    q: Float[Tensor, "batch head query d_head"],
    k: Float[Tensor, "batch head key d_head"],
    v: Float[Tensor, "batch head key d_head"],
    mask: Float[Tensor, "#batch 1 #query #key"],
    scale: float,
    hook_scores: nn.Module,
    hook_pattern: nn.Module,
) -> Float[Tensor, "batch head query d_head"]:
    """The plain twin of fused attention: scores and pattern exist and pass their hooks.

    Args:
        q: queries
        k: keys
        v: values
        mask: added to the scores; 0 where a key may be seen, -inf where not
        scale: factor on q k', usually d_head ** -0.5
        hook_scores: called on the masked scores [batch head query key]
        hook_pattern: called on their softmax
    """
    batch, head, query, _ = q.shape
    key = k.shape[2]
    flat = [t.reshape(batch * head, t.shape[2], t.shape[3]) for t in (q, k, v)]
    added = (
        mask.expand(batch, head, query, key).reshape(batch * head, query, key)
        if (mask.shape[0] > 1)
        else mask[0].expand(batch * head, query, key)
    )
    scores = torch.baddbmm(added, flat[0], flat[1].transpose(1, 2), alpha=scale)
    scores = hook_scores(scores.view(batch, head, query, key))
    pattern = hook_pattern(scores.softmax(dim=-1))
    z = torch.bmm(pattern.reshape(batch * head, query, key), flat[2])
    return z.view(batch, head, query, -1)


def _length(keys: Tensor | None) -> int:
    return 0 if keys is None else keys.shape[1]


def _append(state: dict[str, Tensor], name: str, new: Tensor) -> Tensor:
    """Put `new` behind what `state` holds under `name`, along the positions."""
    old = state.get(name)
    state[name] = new if old is None else torch.cat((old, new), dim=1)
    return state[name]
