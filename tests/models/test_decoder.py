"""What decoder-only models share: loss and masks, positions, generation, presets."""

import math
import re

import pytest
import torch
from tests.models.zoo import SIZES, TOKENS
from torch import nn

from smearlens import AttnAttn, AttnAttnConfig, CharTokenizer, ConvAttn, ConvAttnConfig, Mamba
from smearlens.models.decoder import next_token_loss


@pytest.fixture
def model():
    return ConvAttn(ConvAttnConfig(**SIZES, kernel_size=5, residual=True)).eval()


# Loss ------------------------------------------------------------------------------------------


def loop_loss(logits, tokens, mask=None):
    """-log p of each next token, one by one."""
    terms = []
    for b in range(tokens.shape[0]):
        for t in range(1, tokens.shape[1]):
            if mask is None or mask[b, t]:
                scores = logits[b, t - 1].double()
                terms.append(scores.logsumexp(0) - scores[tokens[b, t]])
    return sum(terms) / len(terms)


def test_the_loss_is_the_mean_negative_log_probability_of_the_next_token(model):
    logits, loss = model(TOKENS, return_type="both")
    assert torch.equal(loss, model(TOKENS, return_type="loss"))
    assert torch.equal(logits, model(TOKENS))
    torch.testing.assert_close(loss.double(), loop_loss(logits, TOKENS))


def test_a_mask_picks_the_targets_and_the_first_token_is_none(model):
    mask = torch.tensor([[1, 0, 0, 1, 1, 0, 1], [1, 1, 0, 0, 0, 0, 0]]).bool()
    logits, loss = model(TOKENS, return_type="both", loss_mask=mask)
    torch.testing.assert_close(loss.double(), loop_loss(logits, TOKENS, mask))
    mask[:, 0] = False
    assert torch.equal(model(TOKENS, return_type="loss", loss_mask=mask), loss)


def test_a_model_that_knows_nothing_loses_the_logarithm_of_the_vocabulary(model):
    model.unembed.weight.data.zero_()
    loss = model(TOKENS, return_type="loss")
    torch.testing.assert_close(loss, torch.tensor(11.0).log())


def test_the_loss_of_half_precision_is_taken_in_float32_and_of_double_in_double(generator):
    logits = torch.randn(2, 7, 11, generator=generator, dtype=torch.float64) * 9
    assert next_token_loss(logits.bfloat16(), TOKENS).dtype == torch.float32
    exact = next_token_loss(logits, TOKENS)
    assert exact.dtype == torch.float64
    torch.testing.assert_close(exact, loop_loss(logits, TOKENS), rtol=1e-14, atol=0)
    assert torch.equal(next_token_loss(logits, TOKENS.int()), exact)


# Positions -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["learned", "sinusoidal", "learned-sinusoidal"])
def test_absolute_positions_are_added_once(kind):
    model = ConvAttn(ConvAttnConfig(**SIZES, positions=kind)).eval()
    _, cache = model.run_with_cache(TOKENS)
    table = model.pos_embed.table.detach()
    for t in range(7):
        expected = table[t].expand(2, 12)
        assert torch.equal(cache["hook_pos_embed"][:, t], expected)
    both = cache["hook_embed"] + cache["hook_pos_embed"]
    assert torch.equal(cache["resid_pre", 0], both)
    trained = [name for name, _ in model.named_parameters() if name.startswith("pos_embed")]
    assert trained == ([] if kind == "sinusoidal" else ["pos_embed.table"])


@pytest.mark.parametrize("positions", ["rotary", None])
def test_other_positions_add_nothing_to_the_stream(positions):
    model = ConvAttn(ConvAttnConfig(**SIZES, positions=positions)).eval()
    _, cache = model.run_with_cache(TOKENS)
    assert "hook_pos_embed" not in cache
    assert torch.equal(cache["resid_pre", 0], cache["hook_embed"])


def test_without_positions_attention_alone_sees_a_bag_of_tokens():
    """The last logits of one layer of attention do not depend on the order of what came before."""
    model = ConvAttn(ConvAttnConfig(**SIZES, conv_on=None, positions=None)).double().eval()
    moved = TOKENS[:, [3, 1, 0, 5, 2, 4, 6]]
    torch.testing.assert_close(model(moved)[:, -1], model(TOKENS)[:, -1], rtol=1e-12, atol=1e-12)
    rotary = ConvAttn(ConvAttnConfig(**SIZES, conv_on=None, positions="rotary")).double().eval()
    assert not torch.allclose(rotary(moved)[:, -1], rotary(TOKENS)[:, -1], rtol=1e-9, atol=1e-9)


# Structure -------------------------------------------------------------------------------------


def test_the_bare_stack_is_what_the_formula_says():
    """logits = Unembed · Attention(Conv(E[x] + P)), each replacing the stream."""
    model = ConvAttn(ConvAttnConfig(**SIZES, kernel_size=4)).eval()
    block = model.blocks[0]
    x = model.embed.weight[TOKENS] + model.pos_embed.table[:7]
    convolved = torch.zeros_like(x)
    for t in range(7):
        for lag in range(min(4, t + 1)):
            convolved[:, t] += block.conv.weight[:, lag] * x[:, t - lag]
    theirs = nn.MultiheadAttention(12, 3, bias=False, batch_first=True)
    theirs.in_proj_weight.data = block.attn.in_proj.weight.data
    theirs.out_proj.weight.data = block.attn.out_proj.weight.data
    ahead = torch.ones(7, 7, dtype=torch.bool).triu(1)
    z, _ = theirs(convolved, convolved, convolved, attn_mask=ahead, need_weights=False)
    torch.testing.assert_close(model(TOKENS), z @ model.unembed.weight.T)


def test_the_residual_stack_with_norms_and_mlp_is_what_the_formula_says():
    model = AttnAttn(AttnAttnConfig(**SIZES, norm=True, mlp=True)).eval()
    _, cache = model.run_with_cache(TOKENS)
    x = cache["hook_embed"] + cache["hook_pos_embed"]
    for layer, block in enumerate(model.blocks):
        normed = torch.layer_norm(x, (12,), block.ln1.weight, block.ln1.bias)
        x = x + block.attn(normed)
        normed = torch.layer_norm(x, (12,), block.ln2.weight, block.ln2.bias)
        hidden = normed @ block.mlp.up.weight.T + block.mlp.up.bias
        inner = (2 / math.pi) ** 0.5 * (hidden + 0.044715 * hidden**3)  # GELU's tanh form
        hidden = 0.5 * hidden * (1 + inner.tanh())
        x = x + hidden @ block.mlp.down.weight.T + block.mlp.down.bias
        torch.testing.assert_close(cache["resid_post", layer], x)
    final = torch.layer_norm(x, (12,), model.ln_final.weight, model.ln_final.bias)
    torch.testing.assert_close(model(TOKENS), final @ model.unembed.weight.T)


def test_dropout_acts_in_training_only():
    model = AttnAttn(AttnAttnConfig(**SIZES, dropout=0.5))
    assert not torch.equal(model(TOKENS), model(TOKENS))
    model.eval()
    assert torch.equal(model(TOKENS), model(TOKENS))


@pytest.mark.parametrize(
    ("build", "expected"),
    [
        # embedding + positions + taps + 4 projections + unembedding
        (lambda: ConvAttn.from_preset("cpu"), 2 * 64 * 64 + 64 * 64 + 64 * 3 + 4 * 64**2),
        (lambda: AttnAttn.from_preset("cpu"), 2 * 64 * 64 + 64 * 64 + 2 * 4 * 64**2),
        (
            lambda: ConvAttn.from_preset("k3", d_vocab=7),
            2 * 7 * 256 + 128 * 256 + 256 * 3 + 4 * 256**2,
        ),
        (
            lambda: ConvAttn.from_preset("paper", d_vocab=7),
            2 * 7 * 512 + 256 * 512 + 512 * 5 + 4 * 512**2,
        ),
        (
            lambda: AttnAttn.from_preset("k3", d_vocab=7),
            2 * 7 * 256 + 128 * 256 + 2 * 4 * 256**2,
        ),
        (
            lambda: AttnAttn.from_preset("paper", d_vocab=7),
            2 * 7 * 512 + 256 * 512 + 4 * 4 * 512**2,
        ),
        (  # rotary: no table; three LayerNorms less one without an MLP
            lambda: ConvAttn.from_preset("hybrid", d_vocab=7),
            2 * 7 * 512 + 512 * 5 + 4 * 512**2 + 2 * 2 * 512,
        ),
    ],
)
def test_presets_have_the_sizes_of_their_source(build, expected):
    model = build()
    assert model.n_parameters == expected == sum(p.numel() for p in model.parameters())


def test_a_preset_takes_changes():
    model = ConvAttn.from_preset("cpu", conv_on="k", kernel_size=7)
    assert (model.config.conv_on, model.config.kernel_size, model.config.d_model) == ("k", 7, 64)
    for cls in (ConvAttn, AttnAttn):
        assert all(len(preset.source) > 10 for preset in cls.presets.values())


# Generation ------------------------------------------------------------------------------------


def test_samples_repeat_with_the_generator_and_differ_without():
    model = ConvAttn(ConvAttnConfig(**SIZES)).eval()

    def sample(seed):
        generator = torch.Generator().manual_seed(seed)
        return model.generate(TOKENS, 6, temperature=1.3, generator=generator)

    assert torch.equal(sample(3), sample(3))
    assert not torch.equal(sample(3), sample(4))
    assert sample(3).shape == (2, 13)
    assert torch.equal(sample(3)[:, :7], TOKENS)


def test_sampling_leaves_the_global_random_state_alone(model, generator):
    before = torch.get_rng_state()
    model.generate(TOKENS, 3, generator=generator)
    assert torch.equal(torch.get_rng_state(), before)


def test_samples_follow_the_tempered_probabilities(model, generator):
    """4,000 draws from one known distribution, within four standard errors of it."""
    fixed = torch.linspace(-1, 2, 11)
    hook = ("blocks.0.hook_resid_post", lambda t, hook: t * 0)
    model.unembed.bias = nn.Parameter(fixed)
    prompt = torch.zeros(4000, 1, dtype=torch.int64)
    for temperature, top_k in ((0.7, None), (1.0, None), (2.0, 4)):
        with model.hooks([hook]):
            drawn = model.generate(
                prompt, 1, temperature=temperature, top_k=top_k, generator=generator
            )[:, 1]
        weights = torch.exp(fixed / temperature)
        if top_k is not None:
            weights[: 11 - top_k] = 0
        p = weights / weights.sum()
        share = drawn.bincount(minlength=11) / 4000
        assert ((share - p).abs() <= 4 * (p * (1 - p) / 4000).sqrt()).all()


def test_top_1_and_temperature_0_are_both_greedy(model, generator):
    greedy = model.generate(TOKENS, 4, temperature=0)
    assert torch.equal(model.generate(TOKENS, 4, top_k=1, generator=generator), greedy)
    many = model.generate(TOKENS, 4, top_k=99, generator=torch.Generator().manual_seed(5))
    every = model.generate(TOKENS, 4, generator=torch.Generator().manual_seed(5))
    assert torch.equal(many, every)


def test_generation_needs_no_gradient_and_changes_no_input(model):
    tokens = TOKENS.clone()
    assert not model.generate(tokens, 2, temperature=0).requires_grad
    assert torch.equal(tokens, TOKENS)
    assert torch.equal(model.generate(tokens.int(), 2, temperature=0)[:, :7], TOKENS)


def test_generation_fills_the_context_exactly(model):
    assert model.generate(TOKENS, 6, temperature=0).shape[1] == 13
    message = "max_new_tokens=7 after a prompt of 7 must be an int, at least 1, and fit n_ctx=13"
    with pytest.raises(ValueError, match=message):
        model.generate(TOKENS, 7, temperature=0)


def test_generation_passes_each_token_once(model):
    lengths = []
    with model.hooks([("hook_embed", lambda t, hook: lengths.append(t.shape[1]))]):
        model.generate(TOKENS, 5, temperature=0)
    assert lengths == [7, 1, 1, 1, 1]


def test_pieces_stop_at_the_end_of_the_context(model):
    state = {}
    model(TOKENS, state=state)
    model(TOKENS[:, :6], state=state)
    with pytest.raises(ValueError, match="tokens reach position 14, n_ctx is 13"):
        model(TOKENS[:, :1], state=state)


# Text ------------------------------------------------------------------------------------------


def test_texts_become_tokens_with_the_tokenizer_of_the_model(model):
    model.tokenizer = CharTokenizer("abc de")
    assert model.to_tokens("a bed").tolist() == [[1, 0, 2, 5, 4]]
    assert model.to_tokens(["ab", "ed"]).tolist() == [[1, 2], [5, 4]]
    assert model.to_tokens(TOKENS) is TOKENS
    assert torch.equal(model.to_tokens(TOKENS[0]), TOKENS[:1])
    assert model(model.to_tokens("a bed")).shape == (1, 5, 11)
    with pytest.raises(ValueError, match=re.escape("got [2, 3] tokens: cut them to one length")):
        model.to_tokens(["ab", "bed"])


# What a call leaves behind ---------------------------------------------------------------------


def test_a_call_that_fails_leaves_the_state_as_it_was():
    model = AttnAttn.from_preset("cpu").eval()
    tokens, state = torch.randint(64, (2, 7)), {}

    def fail(x, hook):
        raise RuntimeError("stop")

    pieces = [model(tokens[:, :3], state=state)]
    with pytest.raises(ValueError, match="at least 2 tokens"):
        model(tokens[:, 3:4], "loss", state=state)
    with pytest.raises(RuntimeError, match="stop"), model.hooks([("blocks.1.hook_attn_out", fail)]):
        model(tokens[:, 3:], state=state)
    pieces.append(model(tokens[:, 3:], state=state))
    torch.testing.assert_close(torch.cat(pieces, 1), model(tokens))


def test_samples_of_ties_and_of_tiny_temperatures():
    model = AttnAttn.from_preset("cpu").eval()
    torch.nn.init.zeros_(model.unembed.weight)
    tokens, generator = torch.randint(64, (2, 7)), torch.Generator().manual_seed(0)
    one = model.generate(tokens, 5, top_k=1, generator=generator)[:, 7:]
    assert len(one.unique()) == 1
    torch.nn.init.normal_(model.unembed.weight)
    cold = model.generate(tokens, 5, temperature=1e-38, generator=generator)
    assert torch.equal(cold, model.generate(tokens, 5, temperature=0))


def test_an_unembedding_of_another_class_is_not_bypassed():
    class Twice(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    model = AttnAttn.from_preset("cpu", d_vocab=9001)
    model.unembed = Twice(64, 9001, bias=False)
    tokens = torch.randint(9001, (2, 7))
    torch.testing.assert_close(model(tokens, "loss"), model(tokens, "both")[1])


@pytest.mark.parametrize("family", [ConvAttn, AttnAttn, Mamba])
def test_models_run_without_values_and_export(family):
    model, tokens = family.from_preset("cpu").eval(), torch.randint(64, (2, 7))
    exported = torch.export.export(model, (tokens,)).module()
    torch.testing.assert_close(exported(tokens), model(tokens))
    assert model.to("meta")(tokens.to("meta")).shape == (2, 7, 64)
