"""What is asked of mixings, caches and tokens that are not the library's own."""

import pytest
import torch

from smearlens import (
    AttnAttn,
    AttnAttnConfig,
    ConvAttn,
    Mamba,
    MambaConfig,
    attention_entropy,
    future_mass,
    induction_score,
    layer_similarity,
    mixings,
    prev_token_score,
    repeated_tokens,
    sink_mass,
)
from smearlens.analysis.mixing.kinds import ComposedMixing, Mixing, SoftmaxMixing

TOKENS = repeated_tokens(6, (3, 7), 16, 11, torch.Generator().manual_seed(0))


def previous_token(length):
    """[query key]: all weight on the token before; the first query on itself."""
    rows = torch.eye(length).roll(1, 0)
    rows[0] = torch.eye(length)[0]
    return rows


class Own(Mixing):
    """[batch head query key], handed out as its class attributes say."""

    n_examples, n_heads, causal, signed, crossed = 1, 1, True, False, False

    def __init__(self, matrix):
        self.matrix = matrix
        self.n_queries, self.n_keys = matrix.shape[-2:]

    def rows(self, start, stop):
        return self.matrix[None, None, start:stop]


def test_a_mixing_that_keeps_its_word_is_measured():
    assert prev_token_score(Own(previous_token(300))).item() == 1


class IgnoresItsArguments(Own):
    def rows(self, start, stop):
        return self.matrix[None, None]


class TwoHeads(Own):
    n_heads = 2


@pytest.mark.parametrize(
    ("mixing", "message"),
    [
        (IgnoresItsArguments(previous_token(300)), r"must be \[batch head rows key\]"),
        (TwoHeads(previous_token(9)), r"= \[1, 2, 9, 9\] in float32"),
        (Own(previous_token(9).bfloat16()), "bfloat16"),
        (Own(torch.full((9, 9), 1 / 9)), "causal = True, and .* reads later keys"),
        (Own(2 * previous_token(9)), "sums above 1.*signed = True"),
        (Own(-previous_token(9)), "below 0"),
        (Own(previous_token(20)[-4:]), "4 queries and 20 keys: set crossed"),
    ],
    ids=["rows", "heads", "dtype", "later keys", "sums", "negative", "fewer queries"],
)
def test_a_mixing_that_breaks_it_is_refused(mixing, message):
    for metric in (prev_token_score, attention_entropy, future_mass):
        with pytest.raises(ValueError, match=message):
            metric(mixing)


def test_averaged_heads_are_not_read_as_the_heads_of_one_example():
    pattern = previous_token(16).expand(6, 1, 16, 16)
    cache = {"blocks.0.attn.hook_pattern": pattern}
    assert induction_score(cache, TOKENS)["blocks.0.attn"].shape == (6, 1)
    averaged = {"blocks.0.attn.hook_pattern": pattern[:, 0]}
    with pytest.raises(ValueError, match=r"one example of \[head query key\] = \[6, 16, 16\]"):
        induction_score(averaged, TOKENS)
    assert prev_token_score(averaged)["blocks.0.attn"].shape == (1, 6)  # asks for no tokens


def test_scores_keep_no_graph():
    matrix = torch.nn.Parameter(previous_token(16))
    scores = prev_token_score({"blocks.0.attn": Own(matrix)})
    assert not scores["blocks.0.attn"].requires_grad
    assert "1.000" in repr(scores)


# Parts of a sequence ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return AttnAttn(AttnAttnConfig(d_vocab=11, d_model=8, n_heads=2, n_ctx=16)).eval()


def test_some_of_the_queries_are_not_cross_attention(model):
    for options in ({"pos_slice": (0, 8)}, {"pos_slice": [3, 5]}):
        _, cache = model.run_with_cache(TOKENS, **options)
        with pytest.raises(ValueError, match=r"pos_slice.*query_mask"):
            sink_mass(cache)
    state = {}
    model(TOKENS[:, :9], state=state)
    _, cache = model.run_with_cache(TOKENS[:, 9:], state=state)
    with pytest.raises(ValueError, match=r"7 queries and 16 keys.*with a state"):
        attention_entropy(cache)
    crossed = {"decoder.blocks.0.cross_attn.hook_pattern": torch.full((1, 2, 3, 5), 0.2)}
    assert mixings(crossed)["decoder.blocks.0.cross_attn"].crossed
    alike = {"decoder.blocks.0.cross_attn.hook_pattern": torch.full((1, 2, 5, 5), 0.2)}
    assert mixings(alike)["decoder.blocks.0.cross_attn"].crossed


def test_composed_with_cross_attention_is_between_two_sequences():
    q, k = torch.randn(2, 1, 5, 2, 3).unbind()
    across = SoftmaxMixing(q, k, causal=False)
    across.crossed = True
    composed = ComposedMixing(across, torch.ones(2, 1), [0])
    with pytest.raises(ValueError, match="two sequences"):
        prev_token_score(composed)


# What a pattern may be rebuilt from ------------------------------------------------------------


def test_scores_come_before_queries_and_keys(model):
    _, cache = model.run_with_cache(TOKENS)
    expected = prev_token_score(cache)
    scores = {n: cache[n] for n in cache if n.endswith("hook_attn_scores")}
    other = {n: torch.zeros_like(cache[n]) for n in cache if n.endswith(("hook_q", "hook_k"))}
    for found in (prev_token_score(scores), prev_token_score(other | scores)):
        for layer in expected:
            torch.testing.assert_close(found[layer], expected[layer])


def test_rotated_queries_come_before_plain_ones():
    torch.manual_seed(0)
    rotary = AttnAttn(
        AttnAttnConfig(d_vocab=11, d_model=8, n_heads=2, n_ctx=16, positions="rotary")
    )
    _, cache = rotary.run_with_cache(TOKENS)
    turned = {
        n.replace("hook_q", "hook_rot_q").replace("hook_k", "hook_rot_k"): cache[n]
        for n in cache
        if n.endswith(("hook_q", "hook_k"))
    }
    plain = {n: torch.zeros_like(cache[n]) for n in cache if n.endswith(("hook_q", "hook_k"))}
    found, expected = prev_token_score(plain | turned), prev_token_score(cache)
    for layer in expected:
        torch.testing.assert_close(found[layer], expected[layer])


# Without the batch axis ------------------------------------------------------------------------


def model_of(family):
    torch.manual_seed(0)
    sizes = {"d_vocab": 11, "d_model": 8, "n_ctx": 16}
    if family is Mamba:
        return Mamba(MambaConfig(**sizes, d_state=3, n_layers=2))
    return family(family.config_class(**sizes, n_heads=2))


@pytest.mark.parametrize("family", [AttnAttn, ConvAttn, Mamba])
def test_a_cache_may_have_dropped_its_batch_axis(family):
    made = model_of(family).eval()
    caches = [
        made.run_with_cache(TOKENS[:1], remove_batch_dim=dropped)[1] for dropped in (False, True)
    ]
    whole, one = (induction_score(c, TOKENS[:1]) for c in caches)
    assert whole == one
    points = ("hook_z", "hook_v", "hook_resid_post", "hook_state", "hook_B_bar", "hook_B")
    for point in points:
        if sum(name.endswith(point) for name in made.hook_dict) > 1:
            found = [layer_similarity(c, kind="cka", point=point).values for c in caches]
            torch.testing.assert_close(*found)


def test_a_state_space_layer_without_its_read_out_is_refused():
    _, cache = model_of(Mamba).run_with_cache(TOKENS)
    part = {n: cache[n] for n in cache if n.endswith(("hook_A_bar", "hook_B_bar"))}
    with pytest.raises(ValueError, match=r"without \['blocks.0.ssm.hook_C'\]; cache all three"):
        prev_token_score(part)
