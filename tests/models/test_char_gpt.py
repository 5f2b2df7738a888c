"""CharGPT: equal to GPT-2 on its weights, presets, initialisation, generation."""

import math

import pytest
import torch
from jaxtyping import config as jaxtyping_config
from torch import nn

from smearlens.models.char_gpt import CharGPT, CharGPTConfig
from smearlens.models.files import ModelFileError

TINY = {"d_vocab": 17, "d_model": 12, "n_heads": 3, "n_layers": 2, "n_ctx": 13}


@pytest.fixture(scope="module")
def transformers():
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip("transformers")


def gpt2(transformers, *, tied=True):
    """A tiny GPT-2, every weight random: a swapped one cannot hide behind zeros or ones."""
    config = transformers.GPT2Config(
        vocab_size=17, n_embd=12, n_head=3, n_layer=2, n_positions=13, tie_word_embeddings=tied,
        bos_token_id=0, eos_token_id=0, attn_implementation="eager",
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    )  # fmt: skip
    model = transformers.GPT2LMHeadModel(config)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn_like(weight) * 0.3)
    return model.double().eval()


def pairs(ours, theirs):
    """(our weight, theirs, whether theirs is transposed) of every weight."""
    body = theirs.transformer
    yield ours.embed.weight, body.wte.weight, False
    yield ours.pos_embed.table, body.wpe.weight, False
    norms = [(ours.ln_final, body.ln_f)]
    for block, layer in zip(ours.blocks, body.h, strict=True):
        norms += [(block.ln1, layer.ln_1), (block.ln2, layer.ln_2)]
        for linear, conv in (
            (block.attn.in_proj, layer.attn.c_attn),
            (block.attn.out_proj, layer.attn.c_proj),
            (block.mlp.up, layer.mlp.c_fc),
            (block.mlp.down, layer.mlp.c_proj),
        ):
            yield linear.weight, conv.weight, True
            yield linear.bias, conv.bias, False
    for norm, same in norms:
        yield norm.weight, same.weight, False
        yield norm.bias, same.bias, False
    if not ours.config.tied:
        yield ours.unembed.weight, theirs.lm_head.weight, False


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("length", [1, 2, 13])
@pytest.mark.parametrize("hooked", [False, True])
def test_logits_and_every_gradient_equal_those_of_gpt2(transformers, tied, length, hooked):
    theirs = gpt2(transformers, tied=tied)
    ours = CharGPT(CharGPTConfig(**TINY, bias=True, gelu="tanh", tied=tied)).double()
    with torch.no_grad():
        for mine, other, transposed in pairs(ours, theirs):
            mine.copy_(other.T if transposed else other)
    tokens = torch.randint(17, (5, length))
    names = [(lambda name: hooked, lambda t, hook: None)] if hooked else []
    expected, found = theirs(tokens).logits, ours.run_with_hooks(tokens, fwd_hooks=names)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    weight = torch.randn_like(expected)
    (expected * weight).sum().backward()
    (found * weight).sum().backward()
    seen = 0
    for mine, other, transposed in pairs(ours, theirs):
        grad = other.grad.T if transposed else other.grad
        torch.testing.assert_close(mine.grad, grad, rtol=1e-9, atol=1e-10)
        seen += 1
    assert seen == len(list(ours.parameters())) == len(list(theirs.parameters()))


@pytest.mark.filterwarnings("ignore")
def test_the_exact_gelu_is_that_of_the_error_function(transformers):
    theirs = gpt2(transformers)
    for layer in theirs.transformer.h:
        layer.mlp.act = nn.GELU()
    ours = CharGPT(CharGPTConfig(**TINY, bias=True)).double()
    with torch.no_grad():
        for mine, other, transposed in pairs(ours, theirs):
            mine.copy_(other.T if transposed else other)
    tokens = torch.randint(17, (5, 7))
    torch.testing.assert_close(ours(tokens), theirs(tokens).logits, rtol=1e-10, atol=1e-10)


@pytest.mark.filterwarnings("ignore")
def test_the_loss_and_float32_equal_those_of_gpt2(transformers):
    theirs = gpt2(transformers).float()
    ours = CharGPT(CharGPTConfig(**TINY, bias=True, gelu="tanh"))
    with torch.no_grad():
        for mine, other, transposed in pairs(ours, theirs):
            mine.copy_(other.T if transposed else other)
    tokens = torch.randint(17, (5, 11))
    expected = theirs(tokens, labels=tokens)
    logits, loss = ours(tokens, return_type="both")
    torch.testing.assert_close(logits, expected.logits, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(loss, expected.loss, rtol=1e-5, atol=1e-5)


# Sizes and start ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "d_vocab", "width", "layers", "context"),
    [("shakespeare", 65, 384, 6, 256), ("enwik8", 256, 384, 6, 256), ("text8", 27, 384, 6, 256),
     ("cpu", 65, 128, 4, 64)],
)  # fmt: skip
def test_presets_have_the_sizes_of_their_source(name, d_vocab, width, layers, context):
    model = CharGPT.from_preset(name)
    block = 12 * width**2 + 2 * width  # q, k, v, out, 8 · width² of MLP; the gains of two norms
    expected = d_vocab * width + context * width + layers * block + width
    assert model.n_parameters == expected == sum(p.numel() for p in model.parameters())
    assert model.config.dropout == (0.0 if name == "cpu" else 0.2)
    assert model.config.d_model // model.config.n_heads == (32 if name == "cpu" else 64)
    assert len(CharGPT.presets[name].source) > 10
    if name == "shakespeare":  # nanoGPT prints 10.65M, without the positions, padded to no multiple
        assert round((expected - context * width) / 1e6, 2) == 10.65


@pytest.mark.parametrize("bias", [False, True])
def test_weights_start_as_those_of_gpt2(bias):
    model = CharGPT(CharGPTConfig(d_vocab=301, d_model=128, n_heads=4, n_layers=3, bias=bias))
    for name, weight in model.named_parameters():
        if name.endswith("bias"):
            assert bias
            assert weight.abs().max() == 0
        elif weight.ndim == 1:
            assert weight.eq(1).all()
        else:
            added = name.endswith(("attn.out_proj.weight", "mlp.down.weight"))
            expected = 0.02 / math.sqrt(6) if added else 0.02
            assert abs(float(weight.detach().std()) / expected - 1) < 0.03, name
            assert abs(float(weight.detach().mean())) < 0.03 * expected, name
    assert sum(name.endswith("bias") for name, _ in model.named_parameters()) == 19 * bias


def test_the_same_seed_gives_the_same_start_and_no_table_of_sinusoids_is_overwritten():
    from smearlens.nn.positions import sinusoids

    config = CharGPTConfig(**TINY, positions="learned-sinusoidal")
    torch.manual_seed(5)
    first = CharGPT(config)
    torch.manual_seed(5)
    second = CharGPT(config)
    for one, other in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(one, other)
    assert torch.equal(first.pos_embed.table.detach(), sinusoids(13, 12))


def test_a_fresh_model_is_near_the_uniform_guess():
    model = CharGPT.from_preset("shakespeare").eval()
    tokens = torch.randint(65, (3, 40))
    loss = model(tokens, return_type="loss").detach()
    assert abs(float(loss) - math.log(65)) < 0.1


def test_tied_weights_are_one_and_survive_saving(tmp_path):
    model = CharGPT(CharGPTConfig(**TINY))
    assert model.unembed.weight is model.embed.weight
    model.save_pretrained(tmp_path)
    loaded = CharGPT.from_pretrained(tmp_path)
    assert loaded.unembed.weight is loaded.embed.weight
    tokens = torch.randint(17, (2, 5))
    assert torch.equal(loaded(tokens), model.eval()(tokens))
    with pytest.raises(ModelFileError, match="CharGPT"):
        type("Other", (CharGPT,), {}).from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_heads": 5}, "n_heads=5 must divide d_model=12"),
        ({"n_layers": 0}, "n_layers must be a positive int, got 0"),
        ({"bias": 1}, "bias must be True or False, got 1"),
        ({"tied": None}, "tied must be True or False, got None"),
        ({"dropout": 1.0}, r"dropout must be in \[0, 1\), got 1.0"),
        ({"gelu": "erf"}, "gelu must be one of"),
        ({"positions": "alibi"}, "positions must be one of"),
    ],
)
def test_wrong_sizes_are_named(changes, message):
    jaxtyping_config.update("jaxtyping_disable", True)  # as for a user: our own message must come
    try:
        with pytest.raises(ValueError, match=message):
            CharGPTConfig(**{**TINY, **changes})
    finally:
        jaxtyping_config.update("jaxtyping_disable", False)


# Generation --------------------------------------------------------------------------------------


@pytest.mark.parametrize("changes", [{}, {"bias": True, "tied": False}, {"positions": "rotary"}])
def test_each_step_of_a_generation_has_the_logits_of_the_full_forward(changes):
    model = CharGPT(CharGPTConfig(**{**TINY, "n_ctx": 67}, **changes)).eval()
    with torch.no_grad():  # logits far apart enough to be compared
        for weight in model.parameters():
            weight.add_(torch.randn_like(weight) * 0.1)
    steps = []
    handle = model.unembed.register_forward_hook(lambda m, given, out: steps.append(out[:, -1]))
    found = model.generate(torch.randint(17, (3, 5)), 62, temperature=0)
    handle.remove()
    assert found.shape == (3, 67)
    full = model(found[:, :-1]).detach()[:, 4:]
    torch.testing.assert_close(torch.stack(steps, 1), full, rtol=1e-5, atol=1e-5)
    assert torch.equal(full.argmax(-1), found[:, 5:])


def test_biases_reach_a_layer_of_cross_attention():
    """In the layer that CharGPT shares: keys and values of a source have their biases too."""
    from smearlens.nn.attention import Attention

    layer = Attention(12, 3, causal=False, bias=True)
    theirs = nn.MultiheadAttention(12, 3, bias=True, batch_first=True)
    nn.init.normal_(layer.in_proj.bias)
    theirs.in_proj_weight.data, theirs.in_proj_bias.data = (
        layer.in_proj.weight.data,
        layer.in_proj.bias.data,
    )
    theirs.out_proj.load_state_dict(layer.out_proj.state_dict())
    x, source = torch.randn(2, 5, 12), torch.randn(2, 7, 12)
    expected, _ = theirs(x, source, source, need_weights=False)
    torch.testing.assert_close(layer(x, source), expected)
    torch.testing.assert_close(layer(x, source, state={}), expected)
