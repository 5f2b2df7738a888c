"""The MLP and the block that models stack: an optional convolution, attention, an optional MLP.

Leaves out state-space blocks (`nn.ssm`) and cross attention, which the encoder-decoder adds.
"""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from smearlens._hooks import HookPoint
from smearlens.nn.attention import Attention
from smearlens.nn.conv import DepthwiseConv


class MLP(nn.Module):
    """Two linear maps with a GELU between them: the tanh form, or the exact one (`gelu="none"`)."""

    def __init__(self, d_model: int, d_mlp: int, *, bias: bool = True, gelu: str = "tanh"):
        super().__init__()
        self.gelu = gelu  # the approximation, in the words of torch
        self.up = nn.Linear(d_model, d_mlp, bias=bias)
        self.down = nn.Linear(d_mlp, d_model, bias=bias)
        self.hook_post = HookPoint()  # [batch pos d_mlp], after the GELU

    def forward(self, x: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "batch pos d_model"]:
        """Apply to every position alone."""
        return self.down(self.hook_post(F.gelu(self.up(x), approximate=self.gelu)))


class Block(nn.Module):
    """[convolution →] attention [→ MLP] around, or as, the residual stream.

    With `residual` each sublayer adds to the stream (x + f(norm(x))); without it each replaces the
    stream (f(norm(x))), which is the bare stack of the write-ups. The stream convolution is never
    normalised: its taps read the embedding itself.

    Args:
        attn: the attention layer
        conv: a convolution of the stream before it
        d_mlp: width of the MLP; None leaves it out
        d_model: width of the stream
        residual: whether sublayers add to the stream
        norm: whether a LayerNorm stands before attention and MLP
        dropout: on what attention and MLP add
        bias: whether norms and MLP have biases; those of attention are its own affair
        gelu: of the MLP, "tanh" or "none", the exact one
    """

    def __init__(
        self,
        attn: Attention,
        *,
        d_model: int,
        conv: DepthwiseConv | None = None,
        d_mlp: int | None = None,
        residual: bool = True,
        norm: bool = False,
        dropout: float = 0.0,
        bias: bool = True,
        gelu: str = "tanh",
    ):
        super().__init__()
        self.attn, self.conv, self.residual = attn, conv, residual
        self.mlp = None if d_mlp is None else MLP(d_model, d_mlp, bias=bias, gelu=gelu)
        self.ln1 = nn.LayerNorm(d_model, bias=bias) if norm else nn.Identity()
        self.ln2 = nn.LayerNorm(d_model, bias=bias) if norm and self.mlp else nn.Identity()
        self.drop = nn.Dropout(dropout)
        self.hook_resid_pre = HookPoint()  # [batch pos d_model]
        if conv is not None:
            self.hook_conv_out = HookPoint()  # [batch pos d_model]
        self.hook_attn_out = HookPoint()  # [batch pos d_model]
        if d_mlp is not None:
            self.hook_mlp_out = HookPoint()  # [batch pos d_model]
        self.hook_resid_post = HookPoint()  # [batch pos d_model]

    def forward(
        self, x: Float[Tensor, "batch pos d_model"], state: dict[str, Tensor] | None = None
    ) -> Float[Tensor, "batch pos d_model"]:
        """Pass the stream through the block; `state` as in `Attention.forward`."""
        x = self.hook_resid_pre(x)
        if self.conv is not None:
            x = self._join(x, self.hook_conv_out(self.conv(x, state=state)))
        x = self._join(x, self.hook_attn_out(self.drop(self.attn(self.ln1(x), state=state))))
        if self.mlp is not None:
            x = self._join(x, self.hook_mlp_out(self.drop(self.mlp(self.ln2(x)))))
        return self.hook_resid_post(x)

    def _join(self, x: Tensor, update: Tensor) -> Tensor:
        return x + update if self.residual else update
