"""Our Mamba against `transformers.MambaForCausalLM` on the same weights: logits and gradients."""

from types import SimpleNamespace

import pytest
import torch

from smearlens import Mamba, MambaConfig, induction_score, prev_token_score
from smearlens.adapters.hugging_face import attention_cache, from_hugging_face

SIZES = [
    # vocabulary, width, layers, kernel, states, tied
    (13, 16, 1, 4, 5, True),
    (17, 32, 2, 3, 7, False),
    (11, 48, 3, 2, 16, True),
]


@pytest.fixture(scope="module")
def transformers():
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip("transformers")


def tiny(transformers, d_vocab, d_model, n_layers, kernel, d_state, tied, **changes):
    config = transformers.MambaConfig(
        vocab_size=d_vocab, hidden_size=d_model, num_hidden_layers=n_layers, conv_kernel=kernel,
        state_size=d_state, tie_word_embeddings=tied, pad_token_id=0, bos_token_id=0,
        eos_token_id=0, **changes,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.MambaForCausalLM(config)
    with torch.no_grad():  # every weight random: a swapped one cannot hide behind zeros or ones
        for name, weight in model.named_parameters():
            if "A_log" not in name:
                weight.add_(torch.randn_like(weight) * 0.1)
    return model.eval()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("length", [1, 2, 19])
def test_logits_and_gradients_agree(transformers, size, length):
    theirs = tiny(transformers, *size)
    ours = from_hugging_face(theirs, n_ctx=32)
    tokens = torch.randint(size[0], (3, length))
    expected, found = theirs(tokens).logits, ours(tokens)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert ours.blocks[0].ssm.path.startswith("fused")
    plain = ours.run_with_hooks(
        tokens, fwd_hooks=[("blocks.0.ssm.hook_state", lambda state, hook: None)]
    )
    torch.testing.assert_close(plain, expected, atol=1e-5, rtol=1e-5)
    weight = torch.randn_like(expected)
    (expected * weight).sum().backward()
    (found * weight).sum().backward()
    pairs = [
        ("ssm.A_log", "mixer.A_log"), ("ssm.D", "mixer.D"),
        ("in_proj.weight", "mixer.in_proj.weight"),
        ("ssm.x_proj.weight", "mixer.x_proj.weight"), ("ssm.dt_proj.bias", "mixer.dt_proj.bias"),
        ("conv.bias", "mixer.conv1d.bias"), ("ln1.weight", "norm.weight"),
    ]  # fmt: skip
    for i in range(size[2]):
        for mine, other in pairs:
            a = ours.get_parameter(f"blocks.{i}.{mine}").grad
            b = theirs.get_parameter(f"backbone.layers.{i}.{other}").grad
            torch.testing.assert_close(a, b, atol=1e-5 * float(b.abs().max() + 1), rtol=1e-4)
        a = ours.get_parameter(f"blocks.{i}.conv.weight").grad
        b = theirs.get_parameter(f"backbone.layers.{i}.mixer.conv1d.weight").grad[:, 0].flip(-1)
        torch.testing.assert_close(a, b, atol=1e-5 * float(b.abs().max() + 1), rtol=1e-4)


@pytest.mark.filterwarnings("ignore")
def test_other_families_and_sizes_are_refused(transformers):
    gpt2 = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(n_embd=8, n_head=2, n_layer=1, vocab_size=11, n_positions=8)
    )
    with pytest.raises(ValueError, match=r"takes a MambaForCausalLM, got GPT2LMHeadModel"):
        from_hugging_face(gpt2)
    odd = tiny(transformers, 13, 16, 1, 4, 5, True, time_step_rank=3)
    with pytest.raises(ValueError, match=r"config.time_step_rank=3 is not supported"):
        from_hugging_face(odd)


@pytest.mark.filterwarnings("ignore")
def test_scores_run_on_hugging_face_attentions(transformers):
    model = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            n_embd=8,
            n_head=2,
            n_layer=3,
            vocab_size=11,
            n_positions=16,
            attn_implementation="eager",
        )
    ).eval()
    tokens = torch.randint(11, (2, 7)).repeat(1, 2)
    with torch.no_grad():
        attentions = model(tokens, output_attentions=True).attentions
    cache = attention_cache(attentions)
    scores = induction_score(cache, tokens)
    assert list(scores) == [f"blocks.{i}.attn" for i in range(3)]
    expected = attentions[1].diagonal(-1, 2, 3).mean(-1)
    torch.testing.assert_close(prev_token_score(cache)["blocks.1.attn"], expected.double())


@pytest.mark.filterwarnings("ignore")
def test_a_whole_output_is_taken_for_its_attentions(transformers):
    sizes = {"vocab_size": 11, "d_model": 8, "d_kv": 4, "d_ff": 16, "num_heads": 2}
    config = transformers.T5Config(
        **sizes, num_layers=2, num_decoder_layers=3, attn_implementation="eager"
    )
    model = transformers.T5ForConditionalGeneration(config).eval()
    source, target = torch.randint(11, (2, 7)), torch.randint(11, (2, 5))
    with torch.no_grad():
        output = model(source, decoder_input_ids=target, output_attentions=True)
        silent = model(source, decoder_input_ids=target)
    expected = {
        **{f"encoder.blocks.{i}.attn.hook_pattern": a for i, a in enumerate(output[-1])},
        **{f"decoder.blocks.{i}.attn.hook_pattern": output.decoder_attentions[i] for i in range(3)},
        **{
            f"decoder.blocks.{i}.cross_attn.hook_pattern": output.cross_attentions[i]
            for i in range(3)
        },
    }
    for given in (output, dict(output)):
        found = attention_cache(given)
        assert found.keys() == expected.keys()
        assert all(found[name] is expected[name] for name in found)
        cross = attention_cache(given, part="cross")
        assert list(cross) == [name for name in expected if "cross" in name]
        assert cross == attention_cache(output.cross_attentions, part="cross")
    with pytest.raises(ValueError, match=r"attentions of a \w+ with none are missing: load the mo"):
        attention_cache(silent)


def test_cross_attention_of_a_decoder_stands_beside_its_own():
    own, cross = torch.zeros(1, 2, 3, 3), torch.zeros(1, 2, 3, 5)
    output = SimpleNamespace(attentions=(own,), cross_attentions=(cross,), loss=None)
    assert list(attention_cache(output)) == [
        "blocks.0.attn.hook_pattern", "blocks.0.cross_attn.hook_pattern",
    ]  # fmt: skip
    with pytest.raises(ValueError, match=r"encoder_attentions of a .* \['attentions', 'cross_att"):
        attention_cache(output, part="encoder")


def test_missing_attentions_are_explained():
    with pytest.raises(ValueError, match="attn_implementation='eager'"):
        attention_cache([None])
    with pytest.raises(ValueError, match="part must be"):
        attention_cache([torch.zeros(1, 1, 2, 2)], part="middle")
    logits, pattern = torch.zeros(2, 3, 11), torch.zeros(2, 1, 3, 3)
    for wrong in ((logits, (pattern,)), [(pattern,)], ["logits"], pattern):
        message = (
            r"one tensor \[batch head query key\] per layer, got .* for layer 0; pass the output"
        )
        with pytest.raises(TypeError, match=message):
            attention_cache(wrong)


@pytest.mark.parametrize("rule", ["mamba", "zoh", "bilinear"])
@pytest.mark.parametrize("a", ["learned", "minus-one"])
@pytest.mark.parametrize("delta", ["selective", "constant", "position"])
def test_every_option_streams_and_agrees_with_its_plain_path(rule, a, delta):
    config = MambaConfig(
        d_vocab=11, d_model=16, n_layers=2, n_ctx=13, kernel_size=3, d_state=5, rule=rule, a=a,
        delta=delta, scale_delta=delta == "selective",
    )  # fmt: skip
    model = Mamba(config).double().eval()
    tokens = torch.randint(11, (2, 13))
    whole = model(tokens)
    hook = ("blocks.1.ssm.hook_write", lambda write, hook: None)
    torch.testing.assert_close(model.run_with_hooks(tokens, fwd_hooks=[hook]), whole)
    state: dict = {}
    pieces = [model(tokens[:, a:b], state=state) for a, b in ((0, 1), (1, 6), (6, 13))]
    torch.testing.assert_close(torch.cat(pieces, 1), whole, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("method", ["sequential", "doubling", "logspace"])
def test_scans_by_name_give_the_same_model(method):
    torch.manual_seed(3)
    config = {"d_vocab": 11, "d_model": 16, "n_layers": 1, "n_ctx": 13}
    fused = Mamba(MambaConfig(**config)).double()
    named = Mamba(MambaConfig(**config, scan=method)).double()
    named.load_state_dict(fused.state_dict())
    tokens = torch.randint(11, (2, 13))
    torch.testing.assert_close(named(tokens), fused(tokens))
    assert "plain" in named.blocks[0].ssm.path


def test_an_edited_write_propagates_and_an_edited_state_does_not():
    model = Mamba(MambaConfig(d_vocab=11, d_model=16, n_layers=1, n_ctx=13)).eval()
    tokens = torch.randint(11, (2, 13))
    clean = model(tokens)

    def at(name):
        def edit(value, hook):
            value[:, 4] += 1.0

        edited = model.run_with_hooks(tokens, fwd_hooks=[(f"blocks.0.ssm.{name}", edit)])
        return (edited - clean).abs().amax((0, 2)) > 1e-6

    assert at("hook_write").tolist() == [False] * 4 + [True] * 9
    assert at("hook_state").tolist() == [False] * 4 + [True] + [False] * 8
