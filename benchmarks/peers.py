"""Models that a user might take instead of ours, of the same sizes; a step, and generation."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from smearlens import TrainConfig
from smearlens.models.char_gpt import CharGPTConfig
from smearlens.models.mamba import MambaConfig
from smearlens.training.update import adamw

NO_TOKENS = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}


def stepper(model: nn.Module, loss: Callable[[], Tensor]) -> Callable[[], None]:
    """One training step: backward from `loss`, and the fused AdamW of our training."""
    optimizer = adamw(model.train(), TrainConfig(steps=1, weight_decay=0.1))

    def step() -> None:
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()

    return step


@torch.no_grad()
def recomputed(logits: Callable[[Tensor], Tensor], tokens: Tensor, count: int) -> Tensor:
    """Greedy continuation without caches: the whole context runs again for each token."""
    for _ in range(count):
        tokens = torch.cat((tokens, logits(tokens)[:, -1].argmax(-1, keepdim=True)), 1)
    return tokens


def gpt2(config: CharGPTConfig) -> Any:
    """Hugging Face's GPT-2 of these sizes, with its fused attention."""
    import transformers

    transformers.logging.set_verbosity_error()
    sizes = transformers.GPT2Config(
        vocab_size=config.d_vocab, n_embd=config.d_model, n_head=config.n_heads,
        n_layer=config.n_layers, n_positions=config.n_ctx, resid_pdrop=0.0, embd_pdrop=0.0,
        attn_pdrop=0.0, attn_implementation="sdpa", **NO_TOKENS,
    )  # fmt: skip
    return transformers.GPT2LMHeadModel(sizes)


def hugging_face_mamba(config: MambaConfig) -> Any:
    """Hugging Face's Mamba of these sizes; without its CUDA kernels it takes its slow scan."""
    import transformers

    transformers.logging.set_verbosity_error()
    sizes = transformers.MambaConfig(
        vocab_size=config.d_vocab, hidden_size=config.d_model, num_hidden_layers=config.n_layers,
        state_size=config.d_state, expand=config.expand, conv_kernel=config.kernel_size,
        time_step_rank=config.dt_rank, tie_word_embeddings=config.tied, **NO_TOKENS,
    )  # fmt: skip
    return transformers.MambaForCausalLM(sizes)


class MambaPy(nn.Module):
    """mamba.py's blocks between an embedding and an unembedding; an ImportError without mambapy."""

    def __init__(self, config: MambaConfig):
        super().__init__()
        from mambapy.mamba import Mamba, RMSNorm
        from mambapy.mamba import MambaConfig as TheirConfig

        self.config = TheirConfig(
            d_model=config.d_model, n_layers=config.n_layers, d_state=config.d_state,
            expand_factor=config.expand, d_conv=config.kernel_size, dt_rank=config.dt_rank,
        )  # fmt: skip
        self.embed = nn.Embedding(config.d_vocab, config.d_model)
        self.mamba, self.norm = Mamba(self.config), RMSNorm(config.d_model)
        self.unembed = nn.Linear(config.d_model, config.d_vocab, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits [batch pos d_vocab]."""
        return self.unembed(self.norm(self.mamba(self.embed(tokens))))

    @torch.no_grad()
    def generate(self, tokens: Tensor, count: int) -> Tensor:
        """Greedy, by mamba.py's own step from state to state; `tokens` is one."""
        empty = torch.zeros(len(tokens), self.config.d_inner, self.config.d_conv - 1)
        caches, written = [(None, empty)] * self.config.n_layers, [tokens[:, 0]]
        for _ in range(count):
            x, caches = self.mamba.step(self.embed(written[-1]), caches)
            written.append(self.unembed(self.norm(x)).argmax(-1))
        return torch.stack(written, 1)


class TorchStack(nn.Module):
    """ConvAttn and AttnAttn from torch's layers: `nn.Conv1d` and `nn.MultiheadAttention`.

    Args:
        config: of either model, bare: no norm, no MLP
    """

    def __init__(self, config: Any):
        super().__init__()
        width, tap = config.d_model, getattr(config, "kernel_size", None)
        self.residual = config.residual
        self.embed = nn.Embedding(config.d_vocab, width)
        self.positions = nn.Parameter(torch.randn(config.n_ctx, width) * 0.1)
        self.conv = None if tap is None else nn.Conv1d(width, width, tap, padding=tap - 1,
                                                       groups=width)  # fmt: skip
        self.layers = nn.ModuleList(
            nn.MultiheadAttention(width, config.n_heads, bias=False, batch_first=True)
            for _ in range(config.n_layers)
        )
        self.unembed = nn.Linear(width, config.d_vocab, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits [batch pos d_vocab]."""
        length = tokens.shape[1]
        x = self.embed(tokens) + self.positions[:length]
        if self.conv is not None:
            smeared = self.conv(x.transpose(1, 2))[..., :length].transpose(1, 2)
            x = x + smeared if self.residual else smeared
        mask = nn.Transformer.generate_square_subsequent_mask(length)
        for layer in self.layers:
            out = layer(x, x, x, attn_mask=mask, is_causal=True, need_weights=False)[0]
            x = x + out if self.residual else out
        return self.unembed(x)


def bridge(model: Any, kind: str) -> Any:
    """TransformerLens' bridge around a model of Hugging Face."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from transformer_lens.model_bridge.sources._bridge_builder import build_bridge_from_module

        return build_bridge_from_module(
            model, kind, hf_config=model.config, tokenizer=None, device="cpu"
        )
