"""ConvAttn: embedding → depthwise convolution → one attention layer → unembedding.

One layer of attention cannot do induction: to find what followed an earlier occurrence, its keys
must know which token stood before them. The convolution can tell them. `smear=True` gives the keys
that knowledge by one learned weight per head instead (Olsson et al. 2022), and with neither the
model is the one-layer control.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from smearlens.models.base import Preset
from smearlens.models.decoder import Decoder, check_choice, check_sizes
from smearlens.nn.attention import Attention
from smearlens.nn.conv import DepthwiseConv
from smearlens.nn.layers import Block


@dataclass(frozen=True, kw_only=True)
class ConvAttnConfig:
    """Sizes and switches of a ConvAttn."""

    d_vocab: int  # kinds of tokens
    d_model: int = 512  # width of the residual stream
    n_heads: int = 8  # each d_model / n_heads wide
    kernel_size: int = 5  # taps: the token itself and 4 before it
    n_ctx: int = 256  # longest sequence, in tokens
    causal: bool = True  # of the convolution; False pads "same", as the write-ups did: reads ahead
    conv_on: Literal["stream", "q", "k", "v"] | None = "stream"  # what is convolved; None: nothing
    smear: bool = False  # mix each key with the one before it, by one learned weight per head
    # added to the embedding: trained, fixed, or trained from the fixed on; rotary turns Q and K
    positions: Literal["learned", "sinusoidal", "learned-sinusoidal", "rotary"] | None = "learned"
    residual: bool = False  # each sublayer adds to its input instead of replacing it
    norm: bool = False  # LayerNorm before attention, MLP and unembedding
    mlp: bool = False  # 4 · d_model wide, after attention
    dropout: float = 0.0  # on the embedding and on what attention and MLP add

    def __post_init__(self):
        check_sizes(self, "d_vocab", "d_model", "n_heads", "kernel_size", "n_ctx")
        check_choice("conv_on", self.conv_on, ("stream", "q", "k", "v", None))

    @property
    def n_layers(self) -> int:
        """Attention layers: always one."""
        return 1


class ConvAttn(Decoder):
    """Embedding → depthwise convolution → multi-head attention → unembedding."""

    config_class = ConvAttnConfig
    presets = {  # noqa: RUF012
        "paper": Preset("Conv-Attn of the k=5 write-up", {"d_vocab": 50257}),
        "k3": Preset(
            "Conv-Attn of the k=3 write-up",
            {"d_vocab": 50257, "d_model": 256, "n_heads": 4, "kernel_size": 3, "n_ctx": 128},
        ),
        "hybrid": Preset(
            "Conv + Rotary + SDPA, which the k=5 write-up proposes",
            {"d_vocab": 50257, "positions": "rotary", "residual": True, "norm": True},
        ),
        "cpu": Preset(
            "trains in seconds on repeated tokens",
            {"d_vocab": 64, "d_model": 64, "n_heads": 4, "kernel_size": 3, "n_ctx": 64},
        ),
    }
    config: ConvAttnConfig

    def __init__(self, config: ConvAttnConfig):
        self._require(config)
        role = config.conv_on
        conv = None
        if role == "stream":
            conv = DepthwiseConv(config.d_model, config.kernel_size, causal=config.causal)
        attn = Attention(
            config.d_model,
            config.n_heads,
            rotary=config.positions == "rotary",
            smear=config.smear,
            conv_on=() if role in ("stream", None) else (role,),
            kernel_size=config.kernel_size,
            conv_causal=config.causal,
        )
        block = Block(
            attn,
            d_model=config.d_model,
            conv=conv,
            d_mlp=4 * config.d_model if config.mlp else None,
            residual=config.residual,
            norm=config.norm,
            dropout=config.dropout,
        )
        super().__init__(config, [block])
