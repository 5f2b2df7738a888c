"""Caches of TransformerLens bridges of tiny random models: scores from them, and from elsewhere."""

import copy
import re
import warnings

import pytest
import torch

from smearlens import induction_score, kernel_profile, mixings, prev_token_score
from smearlens.adapters.bridge import bridge_cache, bridge_mixings
from smearlens.adapters.hugging_face import from_hugging_face
from smearlens.analysis.mixing.implicit import implicit_mixings

pytestmark = pytest.mark.filterwarnings("ignore")
EOS = {"pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0}


@pytest.fixture(scope="module")
def transformers():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip("transformers")


def build(transformers, family, **sizes):
    """A model of random weights, and the bridge around it."""
    from transformer_lens.model_bridge.sources._bridge_builder import build_bridge_from_module

    config_class, model_class = {
        "gpt2": ("GPT2Config", "GPT2LMHeadModel"),
        "llama": ("LlamaConfig", "LlamaForCausalLM"),
        "t5": ("T5Config", "T5ForConditionalGeneration"),
        "mamba": ("MambaConfig", "MambaForCausalLM"),
        "mamba2": ("Mamba2Config", "Mamba2ForCausalLM"),
    }[family]
    config = getattr(transformers, config_class)(vocab_size=11, **sizes)
    torch.manual_seed(0)
    kind = getattr(transformers, model_class)
    options = {} if "mamba" in family else {"attn_implementation": "eager"}
    model = kind._from_config(config, **options).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn_like(weight) * 0.1)
    own = copy.deepcopy(model)  # a bridge puts its parts into the model it is given
    bridge = build_bridge_from_module(
        model, model_class, hf_config=config, tokenizer=None, device="cpu"
    )
    return own, bridge


def attentive(transformers, family):
    sizes = {
        "gpt2": {"n_embd": 8, "n_head": 2, "n_layer": 3, "n_positions": 16},
        "llama": {
            "hidden_size": 24, "intermediate_size": 20, "num_hidden_layers": 3,
            "num_attention_heads": 6, "num_key_value_heads": 3, "max_position_embeddings": 16,
        },
    }[family]  # fmt: skip
    return build(transformers, family, **sizes)


def mamba(transformers):
    return build(
        transformers, "mamba", hidden_size=16, num_hidden_layers=2, state_size=5, conv_kernel=3,
        **EOS,
    )  # fmt: skip


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_scores_of_a_decoder_equal_those_of_its_own_attentions(transformers, family):
    model, bridge = attentive(transformers, family)
    tokens = torch.randint(11, (2, 7)).repeat(1, 2)
    _, cache = bridge.run_with_cache(tokens)
    found = bridge_cache(cache)
    with torch.no_grad():
        attentions = model(tokens, output_attentions=True).attentions
    for i, pattern in enumerate(attentions):
        torch.testing.assert_close(found[f"blocks.{i}.attn.hook_pattern"], pattern)
    expected = attentions[2].diagonal(-1, 2, 3).mean(-1).double()
    for source in (found, bridge_mixings(cache)):
        assert list(induction_score(source, tokens)) == [f"blocks.{i}.attn" for i in range(3)]
        torch.testing.assert_close(prev_token_score(source)["blocks.2.attn"], expected)


def test_queries_are_passed_on_only_as_they_enter_the_scores(transformers):
    _, bridge = attentive(transformers, "llama")
    _, cache = bridge.run_with_cache(torch.randint(11, (2, 7)))
    found = bridge_cache(cache)
    patterns = {name: x for name, x in found.items() if name.endswith("hook_pattern")}
    rebuilt = mixings({name: x for name, x in found.items() if name not in patterns})
    for layer, mixing in rebuilt.items():
        torch.testing.assert_close(mixing.dense(), patterns[f"{layer}.hook_pattern"])
    _, plain = attentive(transformers, "gpt2")
    _, cache = plain.run_with_cache(torch.randint(11, (2, 7)))
    assert not any(name.endswith(("hook_q", "hook_k")) for name in bridge_cache(cache))


def test_both_sides_and_the_crossing_of_an_encoder_decoder(transformers):
    _, bridge = build(
        transformers, "t5", d_model=12, d_kv=4, d_ff=20, num_layers=2, num_heads=3,
        decoder_start_token_id=0,
    )  # fmt: skip
    tokens = torch.randint(11, (2, 7))
    _, cache = bridge.run_with_cache(tokens, decoder_input=tokens[:, :5])
    found = bridge_mixings(cache)
    assert list(found) == [
        *(f"decoder.blocks.{i}.{kind}" for i in range(2) for kind in ("attn", "cross_attn")),
        *(f"encoder.blocks.{i}.attn" for i in range(2)),
    ]
    assert found["decoder.blocks.0.cross_attn"].crossed
    assert found["decoder.blocks.0.attn"].causal
    assert not found["encoder.blocks.0.attn"].causal
    crossing = cache["decoder_blocks.1.cross_attn.hook_pattern"]
    torch.testing.assert_close(found["decoder.blocks.1.cross_attn"].dense(), crossing)


def test_a_mamba_equals_our_own_on_its_weights(transformers):
    model, bridge = mamba(transformers)
    tokens = torch.randint(11, (3, 7)).repeat(1, 2)
    _, cache = bridge.run_with_cache(tokens)
    found = bridge_cache(cache, bridge)
    ours = from_hugging_face(model, n_ctx=16)
    _, expected = ours.run_with_cache(tokens)
    mapped = [name for name in found if ".ssm." in name or ".conv." in name]
    assert len(mapped) == 2 * 11
    for name in mapped:
        torch.testing.assert_close(found[name], expected[name], atol=1e-5, rtol=1e-5, msg=name)
    for source in (found, bridge_mixings(cache, bridge)):
        scores = induction_score(source, tokens)
        assert list(scores) == ["blocks.0.ssm", "blocks.1.ssm"]
        wanted = induction_score(expected, tokens)["blocks.1.ssm"]
        torch.testing.assert_close(scores["blocks.1.ssm"], wanted, atol=1e-5, rtol=1e-4)
    profile = kernel_profile(found, layer="blocks.1.conv")
    assert profile.lags == [0, 1, 2]
    assert list(implicit_mixings(found)) == ["blocks.0", "blocks.1"]
    assert not any("_bar" in name for name in bridge_cache(cache, bridge, steps=False))


def test_the_hidden_attention_is_the_bridges_own(transformers):
    _, bridge = mamba(transformers)
    _, cache = bridge.run_with_cache(torch.randint(11, (3, 13)))
    for i in range(2):
        steps = bridge_cache(cache, bridge)[f"blocks.{i}.ssm.hook_delta_raw"]
        theirs = {**dict(cache.items()), f"blocks.{i}.mixer.dt_proj.hook_out": steps}
        expected = bridge.blocks[i].mixer.compute_effective_attention(
            theirs, i, include_dt_scaling=True
        )
        found = bridge_mixings(cache, bridge)[f"blocks.{i}.ssm"].dense()
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


def test_what_cannot_be_mapped_is_explained(transformers):
    _, bridge = mamba(transformers)
    _, cache = bridge.run_with_cache(torch.randint(11, (2, 7)))
    with pytest.raises(ValueError, match=re.escape("is a Mamba's: pass bridge=")):
        bridge_cache(cache)
    few = {name: x for name, x in cache.items() if "in_proj" not in name}
    with pytest.raises(ValueError, match=re.escape("needs ['blocks.0.mixer.in_proj.hook_out']")):
        bridge_cache(few, bridge)
    with pytest.raises(
        ValueError, match=re.escape("none of the 1 cached names (['ln.hook_scale']")
    ):
        bridge_cache({"ln.hook_scale": torch.zeros(1)})
    with pytest.raises(ValueError, match="no pattern and no Mamba layer among"):
        bridge_mixings({"blocks.0.hook_resid_pre": torch.zeros(2, 3, 5)})
    _, other = build(
        transformers, "mamba2", hidden_size=16, num_hidden_layers=1, state_size=5, conv_kernel=3,
        num_heads=4, head_dim=8, n_groups=2, expand=2, **EOS,
    )  # fmt: skip
    _, cache = other.run_with_cache(torch.randint(11, (2, 7)))
    with pytest.raises(ValueError, match=re.escape("not a Mamba (1) layer")):
        bridge_cache(cache, other)
