"""The models that every contract test runs over: one line each, (name, factory, tokens, causal).

Sizes that a test may confuse all differ: batch 2, positions 7, heads 3, d_head 4, taps 5, d_model
12, d_vocab 11, n_ctx 13, layers 1 to 3; a source has 6 tokens. Leaves out the tests themselves:
`test_contract`.
"""

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch

from smearlens import AttnAttn, AttnAttnConfig, ConvAttn, ConvAttnConfig
from smearlens.models.base import HookedModel
from smearlens.models.char_gpt import CharGPT, CharGPTConfig
from smearlens.models.mamba import Mamba, MambaConfig
from smearlens.models.seq2seq import Seq2Seq, Seq2SeqConfig

SIZES = {"d_vocab": 11, "d_model": 12, "n_heads": 3, "n_ctx": 13}
FULL = {"residual": True, "norm": True, "mlp": True}
TOKENS = torch.randint(11, (2, 7), generator=torch.Generator().manual_seed(7))
SOURCE = torch.randint(11, (2, 6), generator=torch.Generator().manual_seed(6))


class Variant(NamedTuple):
    """A model in one configuration, and tokens for it."""

    name: str
    factory: Callable[[], HookedModel]
    tokens: torch.Tensor = TOKENS
    causal: bool = True  # False: some layer reads ahead by design
    source: torch.Tensor | None = None  # what the encoder of an encoder-decoder reads

    def given(self, tokens: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """What the model is called with: tokens, or a source for each of their rows and tokens."""
        return (tokens,) if self.source is None else (self.source[: len(tokens)], tokens)

    @property
    def inputs(self) -> tuple[torch.Tensor, ...]:
        """What the model is called with."""
        return self.given(self.tokens)


def conv_attn(name: str, **changes) -> Variant:
    config = ConvAttnConfig(**{**SIZES, "kernel_size": 5, **changes})
    return Variant(f"ConvAttn {name}", lambda: ConvAttn(config), causal=config.causal)


def attn_attn(name: str, **changes) -> Variant:
    config = AttnAttnConfig(**{**SIZES, **changes})
    return Variant(f"AttnAttn {name}", lambda: AttnAttn(config))


def char_gpt(name: str, **changes) -> Variant:
    config = CharGPTConfig(**{**SIZES, **changes})
    return Variant(f"CharGPT {name}", lambda: CharGPT(config))


def mamba(name: str, **changes) -> Variant:
    sizes = {"d_vocab": 11, "d_model": 6, "d_state": 5, "n_ctx": 13, "n_layers": 1}
    config = MambaConfig(**{**sizes, **changes})
    return Variant(f"Mamba {name}", lambda: Mamba(config))


def seq2seq(name: str, **changes) -> Variant:
    config = Seq2SeqConfig(**{**SIZES, "d_mlp": 10, "start": 9, "end": 10, **changes})
    return Variant(f"Seq2Seq {name}", lambda: Seq2Seq(config), source=SOURCE)


VARIANTS = [
    conv_attn("bare"),
    conv_attn("sinusoidal", positions="sinusoidal", residual=True),
    conv_attn("learned-sinusoidal", positions="learned-sinusoidal", norm=True),
    conv_attn("rotary, full block", positions="rotary", **FULL),
    conv_attn("no positions", positions=None, mlp=True),
    conv_attn("smeared stream", smear=True, residual=True),
    conv_attn("kernel of 1", kernel_size=1),
    conv_attn("kernel longer than the sequence", kernel_size=8, residual=True),
    conv_attn("on q", conv_on="q"),
    conv_attn("on k", conv_on="k", positions="rotary", residual=True),
    conv_attn("on v", conv_on="v", positions="sinusoidal", norm=True, mlp=True),
    conv_attn("on k, smeared", conv_on="k", smear=True, positions=None),
    conv_attn("control", conv_on=None),
    conv_attn("smear only", conv_on=None, smear=True, positions="rotary", **FULL),
    conv_attn("centred", causal=False),
    conv_attn("centred on q", causal=False, conv_on="q", positions="rotary"),
    conv_attn("centred on k", causal=False, conv_on="k", **FULL),
    conv_attn("centred on v", causal=False, conv_on="v", kernel_size=2, positions=None),
    attn_attn("1 layer", n_layers=1, residual=False),
    attn_attn("2 layers", n_layers=2, positions="sinusoidal"),
    attn_attn("2 layers, bare", n_layers=2, residual=False, positions=None),
    attn_attn("3 layers, full block", n_layers=3, positions="rotary", norm=True, mlp=True),
    char_gpt("2 layers", n_layers=2),
    char_gpt("1 layer, with biases, untied", n_layers=1, bias=True, tied=False),
    mamba("2 layers", n_layers=2),
    mamba("zoh", rule="zoh", positions="sinusoidal"),
    mamba("bilinear, tied", rule="bilinear", tied=True, expand=3),
    mamba("one decay", a="minus-one", scale_delta=True, kernel_size=1),
    mamba("constant delta", delta="constant", scan="sequential"),
    mamba("positional delta", delta="position", scan="doubling", positions="learned"),
    seq2seq("2 + 2 layers"),
    seq2seq("norm after", norm="post", positions="learned-sinusoidal", n_layers=1),
    seq2seq("no positions", positions=None, n_layers=1),
]


def over(*variants: Variant) -> pytest.MarkDecorator:
    """Parametrise a test over `variants`."""
    return pytest.mark.parametrize("variant", variants, ids=lambda variant: variant.name)


every_model = over(*VARIANTS)
causal_models = over(*(variant for variant in VARIANTS if variant.causal))
every_interface = over(  # one model for each set of hook names
    *{tuple(variant.factory().hook_dict): variant for variant in reversed(VARIANTS)}.values()
)
