"""From Hugging Face models: a Mamba as ours, attention weights under our names.

Needs `transformers` only in the caller's hands: nothing here imports it. Leaves out downloading.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from smearlens._explain import describe, explained
from smearlens.models.mamba import Mamba, MambaConfig

FIELDS = {  # part of a model -> the field of its output
    "": "attentions",
    "encoder": "encoder_attentions",
    "decoder": "decoder_attentions",
    "cross": "cross_attentions",
}


@explained
def from_hugging_face(model: Any, *, n_ctx: int = 1024) -> Mamba:
    """A hookable `Mamba` with the weights of a `transformers.MambaForCausalLM`.

    Args:
        model: the model, as `MambaForCausalLM.from_pretrained(...)` or built from a config
        n_ctx: longest sequence to accept; the weights set no limit

    Returns:
        our model in eval mode, equal in logits

    Raises:
        ValueError: for a model of another family, or a Mamba with sizes ours does not have
    """
    config: Any = getattr(model, "config", None)
    if getattr(config, "model_type", None) != "mamba":
        raise ValueError(
            f"from_hugging_face takes a MambaForCausalLM, got {type(model).__name__} "
            f"(model_type {getattr(config, 'model_type', None)!r}); for attention models pass "
            "outputs.attentions to attention_cache"
        )
    ours = Mamba(
        MambaConfig(
            d_vocab=config.vocab_size,
            d_model=config.hidden_size,
            n_layers=config.num_hidden_layers,
            n_ctx=n_ctx,
            kernel_size=config.conv_kernel,
            expand=config.intermediate_size // config.hidden_size,
            d_state=config.state_size,
            tied=model.lm_head.weight is model.backbone.embeddings.weight,
        )
    )
    _require("time_step_rank", config.time_step_rank, ours.config.dt_rank)
    _require("hidden_act", config.hidden_act, "silu")
    _require("use_conv_bias", config.use_conv_bias, True)
    _require("use_bias", config.use_bias, False)
    theirs = model.state_dict()
    ours.load_state_dict(dict(_renamed(theirs, ours.config.n_layers)), strict=True)
    norms = [ours.ln_final, *(block.get_submodule("ln1") for block in ours.blocks)]
    for norm in norms:
        norm.eps = config.layer_norm_epsilon  # pyrefly: ignore[missing-attribute]
    return ours.eval()


@explained
def attention_cache(
    attentions: Sequence[Tensor | None] | Any,
    *,
    part: str = "",
    layers: Sequence[int] | None = None,
) -> dict[str, Tensor]:
    """The attention weights a Hugging Face model returns, as a cache that every score accepts.

    Args:
        attentions: what the model returned with `output_attentions=True`, loaded with
            `attn_implementation="eager"`: the whole output, or `outputs.attentions`, one tensor
            [batch head query key] per layer
        part: "encoder", "decoder" or "cross" (attention) of an encoder-decoder; "" is all there is
            of a whole output, and of tensors those of a model without an encoder
        layers: index of the block that each tensor comes from, for a model whose other blocks have
            no attention (`config.layer_types` tells, or `config.layers_block_type`); default all

    Returns:
        names such as `blocks.0.attn.hook_pattern` to patterns; of an encoder-decoder
        `encoder.blocks.0.attn…`, `decoder.blocks.0.attn…` and `decoder.blocks.0.cross_attn…`

    Raises:
        ValueError: for attentions that the model did not return, or `layers` that do not fit; and
            for a whole output with more hidden states than attentions, without `layers`
        TypeError: for anything but one tensor per layer
    """
    if part not in FIELDS:
        raise ValueError(f"part must be '', 'encoder', 'decoder' or 'cross', got {part!r}")
    if isinstance(attentions, (Sequence, Tensor)):
        stem = "blocks" if part == "" else "decoder.blocks"
        return _patterns(list(attentions), part, stem, layers)
    found = {name: _field(attentions, field) for name, field in FIELDS.items()}
    found = {name: layers for name, layers in found.items() if layers}
    chosen = [part] if part else list(found)
    if not chosen or part not in ("", *found):
        has = [FIELDS[name] for name in found]
        raise _missing(f"{FIELDS[part]} of a {type(attentions).__name__} with {has or 'none'}")
    stem = "blocks" if "" in found else "decoder.blocks"
    n_blocks = len(_field(attentions, "hidden_states") or ()) - 1
    if "" in found and layers is None and n_blocks > len(found[""]):
        raise ValueError(
            f"{n_blocks} blocks gave {len(found[''])} attentions: say by layers= which blocks have "
            "attention (the model's config.layer_types, or config.layers_block_type)"
        )
    return {k: v for name in chosen for k, v in _patterns(found[name], name, stem, layers).items()}


def _field(output: Any, name: str) -> Any:
    return output.get(name) if isinstance(output, Mapping) else getattr(output, name, None)


def _patterns(
    given: Sequence[Any], part: str, stem: str, layers: Sequence[int] | None
) -> dict[str, Tensor]:
    """One kind of attention under our names; `stem` is where the blocks are, but for encoders."""
    if not given or any(layer is None for layer in given):
        raise _missing("attentions")
    numbers = list(range(len(given)) if layers is None else layers)
    if len(set(numbers)) != len(given):
        raise ValueError(f"layers must be {len(given)} different indices, got {numbers}")
    found: dict[str, Tensor] = {}
    for i, layer in zip(numbers, given, strict=True):
        if not isinstance(layer, Tensor) or layer.ndim != 4:
            shown = describe(layer) if isinstance(layer, Tensor) else type(layer).__name__
            raise TypeError(
                "attentions must be one tensor [batch head query key] per layer, got "
                f"{shown} for layer {i}; pass the output of a forward pass, or its "
                "outputs.attentions"
            )
        kind = "cross_attn" if part == "cross" else "attn"
        blocks = "encoder.blocks" if part == "encoder" else stem
        found[f"{blocks}.{i}.{kind}.hook_pattern"] = layer
    return found


def _missing(what: str) -> ValueError:
    return ValueError(
        f"{what} are missing: load the model with attn_implementation='eager' and call it with "
        "output_attentions=True (a state-space model has none: from_hugging_face takes a Mamba)"
    )


def _renamed(theirs: dict[str, Tensor], n_layers: int):
    """(our name, tensor) of every weight."""
    yield "embed.weight", theirs["backbone.embeddings.weight"]
    yield "unembed.weight", theirs["lm_head.weight"]
    yield "ln_final.weight", theirs["backbone.norm_f.weight"]
    for i in range(n_layers):
        here, there = f"blocks.{i}", f"backbone.layers.{i}"
        yield f"{here}.ln1.weight", theirs[f"{there}.norm.weight"]
        kernel = theirs[f"{there}.mixer.conv1d.weight"][:, 0]
        yield f"{here}.conv.weight", kernel.flip(-1)  # theirs correlates: the last tap is lag 0
        yield f"{here}.conv.bias", theirs[f"{there}.mixer.conv1d.bias"]
        for name in ("in_proj.weight", "out_proj.weight"):
            yield f"{here}.{name}", theirs[f"{there}.mixer.{name}"]
        for name in ("x_proj.weight", "dt_proj.weight", "dt_proj.bias", "A_log", "D"):
            yield f"{here}.ssm.{name}", theirs[f"{there}.mixer.{name}"]


def _require(name: str, given: Any, needed: Any) -> None:
    if given != needed:
        raise ValueError(f"config.{name}={given!r} is not supported; this library has {needed!r}")
