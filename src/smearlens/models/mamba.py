"""Mamba: embedding → n × [norm → convolution → selective SSM, gated] → norm → unembedding.

The short convolution before the state-space layer is what `ConvAttn` has before attention: both can
put the previous token into the present one.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from smearlens._explain import explained
from smearlens._hooks import HookPoint
from smearlens.models.base import Preset
from smearlens.models.decoder import ABSOLUTE, Decoder, check_choice
from smearlens.nn.conv import DepthwiseConv
from smearlens.nn.discretize import rule_named
from smearlens.nn.ssm import SelectiveSSM


@explained
@dataclass(frozen=True, kw_only=True)
class MambaConfig:
    """Sizes and switches of a Mamba."""

    d_vocab: int  # kinds of tokens
    d_model: int = 64  # width of the residual stream
    n_layers: int = 2  # Mamba blocks
    n_ctx: int = 256  # longest sequence, in tokens
    kernel_size: int = 4  # taps of the short convolution; 1 sees only the present token
    expand: int = 2  # d_inner = expand · d_model
    d_state: int = 16  # states per channel
    rule: Literal["mamba", "zoh", "bilinear", "bilinear-clamped"] = "mamba"  # discretisation
    a: Literal["learned", "minus-one"] = "learned"  # A = -exp(A_log), or -1: Δ alone decides
    # Δ read off the token, one learned per channel, or read off the position
    delta: Literal["selective", "constant", "position"] = "selective"
    scale_delta: bool = False  # divide Δ by √d_inner
    scan: str = "fused"  # or a method of nn.scan_variants.linear_scan
    # added to the embedding: trained, fixed, or trained from the fixed on
    positions: Literal["learned", "sinusoidal", "learned-sinusoidal"] | None = None
    dropout: float = 0.0  # on the embedding and on what each sublayer adds
    tied: bool = False  # unembed with the embedding

    def __post_init__(self):
        for name in ("d_vocab", "d_model", "n_layers", "n_ctx", "kernel_size", "expand", "d_state"):
            if type(getattr(self, name)) is not int or getattr(self, name) < 1:
                raise ValueError(f"{name} must be a positive int, got {getattr(self, name)!r}")
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"dropout must be in [0, 1), got {self.dropout}")
        for name in ("scale_delta", "tied"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} must be True or False, got {getattr(self, name)!r}")
        rule_named(self.rule)
        check_choice("a", self.a, ("learned", "minus-one"))
        check_choice("delta", self.delta, ("selective", "constant", "position"))
        check_choice("scan", self.scan, ("fused", "sequential", "doubling", "logspace",
                                         "logspace-floor"))  # fmt: skip
        check_choice("positions", self.positions, (*ABSOLUTE, None))

    @property
    def d_inner(self) -> int:
        """Channels of convolution and state-space layer."""
        return self.expand * self.d_model

    @property
    def dt_rank(self) -> int:
        """Rank of the map to Δ: ⌈d_model / 16⌉."""
        return math.ceil(self.d_model / 16)

    @property
    def n_heads(self) -> int:
        """Every channel mixes by its own matrix, as a head does."""
        return self.d_inner

    @property
    def norm(self) -> bool:
        """A norm stands before the unembedding."""
        return True


class MambaBlock(nn.Module):
    """x + out(SSM(SiLU(conv(in(norm x)))) · SiLU(gate)).

    Source:
        Gu & Dao 2023, "Mamba", figure 3
    """

    def __init__(self, config: MambaConfig):
        super().__init__()
        self.ln1 = nn.RMSNorm(config.d_model, eps=1e-5)
        self.in_proj = nn.Linear(config.d_model, 2 * config.d_inner, bias=False)
        self.conv = DepthwiseConv(config.d_inner, config.kernel_size, bias=True)
        self.ssm = SelectiveSSM(
            config.d_inner,
            d_state=config.d_state,
            dt_rank=config.dt_rank,
            rule=config.rule,
            a=config.a,
            delta=config.delta,
            scale_delta=config.scale_delta,
            n_ctx=config.n_ctx,
            method=config.scan,
        )
        self.out_proj = nn.Linear(config.d_inner, config.d_model, bias=False)
        self.drop = nn.Dropout(config.dropout)
        self.hook_resid_pre = HookPoint()  # [batch pos d_model]
        self.hook_ssm_out = HookPoint()  # [batch pos d_model]
        self.hook_resid_post = HookPoint()  # [batch pos d_model]

    def forward(
        self, x: Float[Tensor, "batch pos d_model"], state: dict[str, Tensor] | None = None
    ) -> Float[Tensor, "batch pos d_model"]:
        """Pass the stream through the block; `state` as in `Decoder.forward`."""
        x = self.hook_resid_pre(x)
        inner, gate = self.in_proj(self.ln1(x)).chunk(2, dim=-1)
        u = F.silu(self.conv(inner, state=state))
        out = self.out_proj(self.ssm(u, gate, state=state))
        return self.hook_resid_post(x + self.hook_ssm_out(self.drop(out)))


class Mamba(Decoder):
    """A stack of Mamba blocks."""

    config_class = MambaConfig
    presets = {  # noqa: RUF012
        "pig-latin-small": Preset(
            "Mamba of the Pig Latin write-up, 162 K parameters: 3 layers, kernel 16",
            {"d_vocab": 29, "n_layers": 3, "kernel_size": 16, "n_ctx": 64},
        ),
        "pig-latin-large": Preset(
            "the same with 4 layers, 276 K parameters by the write-up",
            {"d_vocab": 29, "n_layers": 4, "kernel_size": 16, "n_ctx": 64},
        ),
        "cpu": Preset(
            "trains in a minute on repeated tokens",
            {"d_vocab": 64, "d_model": 48, "n_layers": 1, "n_ctx": 64},
        ),
    }
    config: MambaConfig

    def __init__(self, config: MambaConfig):
        self._require(config)
        super().__init__(config, [MambaBlock(config) for _ in range(config.n_layers)])
        self.ln_final = nn.RMSNorm(config.d_model, eps=1e-5)
        if config.tied:
            self.unembed.weight = self.embed.weight
        self.setup()
