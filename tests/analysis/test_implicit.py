"""Implicit attention of a Mamba block: what the block computes, and products of plain matrices."""

import re

import pytest
import torch
from jaxtyping import config as jaxtyping_config

from smearlens import Mamba, MambaConfig, attention_entropy, induction_score, prev_token_score
from smearlens.analysis.mixing.implicit import ImplicitMixing, implicit_mixings
from smearlens.analysis.mixing.state_space import SSMMixing

EACH = pytest.mark.parametrize("rule", ["mamba", "zoh", "bilinear"])
LENGTH = 37  # a block of 32 rows and a piece


def setting(rule="mamba", *, kernel_size=3, length=LENGTH):
    """A model of random weights, its tokens, cache and skips."""
    config = MambaConfig(d_vocab=13, d_model=4, d_state=5, n_ctx=41, rule=rule,
                         kernel_size=kernel_size)  # fmt: skip
    model = Mamba(config).double().eval()
    with torch.no_grad():
        for block in model.blocks:
            block.ssm.D.normal_()
    tokens = torch.randint(13, (2, length))
    _, cache = model.run_with_cache(tokens)
    return tokens, cache, {f"blocks.{i}": model.blocks[i].ssm.D for i in range(2)}


def plain(cache, name, D):
    """diag(g) (M + D) diag(σ(v)) W with every factor as a matrix [batch channel pos pos]."""
    parts = (cache[f"{name}.ssm.{p}"] for p in ("hook_A_bar", "hook_B_bar", "hook_C"))
    M = SSMMixing.from_steps(*parts).dense()
    kernel, v = cache[f"{name}.conv.hook_kernel"], cache[f"{name}.conv.hook_out"]
    length = v.shape[1]
    W = torch.zeros(len(kernel), length, length, dtype=torch.float64)
    for t in range(length):
        for lag in range(min(t + 1, kernel.shape[1])):
            W[:, t, t - lag] = kernel[:, lag]
    gate, sigma = (torch.diag_embed(x.mT) for x in (cache[f"{name}.ssm.hook_gate"], v.sigmoid()))
    return gate @ (M + torch.diag_embed(D[:, None].expand(-1, length))) @ sigma @ W


@EACH
@pytest.mark.parametrize(("kernel_size", "length"), [(1, 19), (3, LENGTH), (7, 5), (1, 1)])
def test_rows_diagonals_and_dense_equal_products_of_matrices(rule, kernel_size, length):
    _, cache, skips = setting(rule, kernel_size=kernel_size, length=length)
    for name, mixing in implicit_mixings(cache, skips=skips).items():
        expected = plain(cache, name, skips[name].detach())
        torch.testing.assert_close(mixing.dense(), expected)
        torch.testing.assert_close(mixing.rows(length // 3, length), expected[:, :, length // 3 :])
        parts = list(mixing.blocks(8))
        assert [start for start, _, _ in parts] == list(range(0, length, 8))
        torch.testing.assert_close(torch.cat([rows for _, _, rows in parts], 2), expected)
        some = mixing.channels(3, 8)
        torch.testing.assert_close(some.dense(), expected[:, 3:8])
        for lag in range(length):
            diagonal = expected.diagonal(-lag, 2, 3)
            torch.testing.assert_close(mixing.diagonal(lag), diagonal)
            torch.testing.assert_close(some.diagonal(lag), diagonal[:, 3:8])
        assert length == 1 or not mixing.diagonal(-2).any()


@EACH
def test_reconstruction_of_the_gated_output(rule):
    _, cache, skips = setting(rule)
    for name, mixing in implicit_mixings(cache, skips=skips).items():
        gated = cache[f"{name}.ssm.hook_y"] * cache[f"{name}.ssm.hook_gate"]
        x = cache[f"{name}.conv.hook_in"]
        assert (mixing.reconstruct(x) - gated).abs().max() < 1e-10
        bias = mixing.reconstruct(torch.zeros_like(x))
        assert bias.abs().max() > 1e-4
        by_matrix = torch.einsum("bcij,bjc->bic", mixing.dense(), x) + bias
        assert (by_matrix - gated).abs().max() < 1e-10
        some = mixing.channels(2, 5).reconstruct(x[..., 2:5])
        assert (some - gated[..., 2:5]).abs().max() < 1e-10


def test_without_a_skip_there_is_none():
    _, cache, _ = setting()
    mixing = implicit_mixings(cache)["blocks.1"]
    expected = plain(cache, "blocks.1", torch.zeros(8, dtype=torch.float64))
    torch.testing.assert_close(mixing.dense(), expected)


def test_every_score_takes_it():
    tokens, cache, skips = setting()
    found = implicit_mixings(cache, skips=skips)
    assert list(found) == ["blocks.0", "blocks.1"]
    for score in (prev_token_score(found), induction_score(found, tokens)):
        assert score["blocks.1"].shape == (2, 8)
    weights = plain(cache, "blocks.0", skips["blocks.0"].detach()).abs()
    weights /= weights.sum(-1, keepdim=True)
    expected = weights.diagonal(-1, 2, 3).mean(-1)
    torch.testing.assert_close(prev_token_score(found)["blocks.0"], expected)
    torch.testing.assert_close(attention_entropy(found)["blocks.0"].mean(),
                               torch.special.entr(weights).sum(-1).mean())  # fmt: skip


@pytest.fixture
def unchecked():
    """Shapes unchecked, as for a user: the library's own messages must come."""
    jaxtyping_config.update("jaxtyping_disable", True)
    yield
    jaxtyping_config.update("jaxtyping_disable", False)


def test_what_is_missing_or_does_not_fit_is_named(unchecked):
    _, cache, skips = setting()
    part = {name: x for name, x in cache.items() if not name.endswith("hook_gate")}
    with pytest.raises(ValueError, match=re.escape("'blocks.0' needs ['blocks.0.ssm.hook_gate']")):
        implicit_mixings(part)
    with pytest.raises(ValueError, match=re.escape("skips for ['blocks.2']; blocks in the cache:")):
        implicit_mixings(cache, skips={"blocks.2": skips["blocks.0"]})
    with pytest.raises(ValueError, match=re.escape("skip [channel] must be (8,), got (3,)")):
        implicit_mixings(cache, skips={"blocks.0": torch.ones(3)})
    mixing = implicit_mixings(cache)["blocks.0"]
    with pytest.raises(ValueError, match=re.escape("channels 5..9 are outside 0..8")):
        mixing.channels(5, 9)
    x = torch.zeros(2, LENGTH, 8)
    with pytest.raises(ValueError, match=re.escape("no lag below 0, got lags [-1, 0, 1]")):
        ImplicitMixing(mixing.hidden, x, x, torch.ones(8, 3), [-1, 0, 1])
