"""The streamed loss over a large vocabulary: values, gradients, memory, and when a model takes it.

The reference is `F.cross_entropy` of all logits at once, in float64 where digits matter.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from jaxtyping import config as jaxtyping_config
from torch import nn
from torch.nn import functional as F

from smearlens import AttnAttn, AttnAttnConfig, Mamba, MambaConfig
from smearlens.models.decoder import LARGE_VOCAB
from smearlens.nn import large_vocab
from smearlens.nn.large_vocab import plain_loss, streamed_loss


def inputs(rows, d_vocab, d_model, dtype=torch.float64, scale=1.0):
    hidden = torch.randn(rows, d_model, dtype=torch.float64) * scale
    weight = torch.randn(d_vocab, d_model, dtype=torch.float64)
    targets = torch.randint(d_vocab, (rows,))
    return [hidden.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_(), targets]


def value_and_gradients(loss, hidden, weight, targets, factor=1.0):
    value = loss(hidden, weight, targets)
    return [value, *torch.autograd.grad(value * factor, (hidden, weight))]


@pytest.fixture
def small_chunks(monkeypatch):
    """7 rows of 11 logits at a time."""
    monkeypatch.setattr(large_vocab, "CHUNK_LOGITS", 7 * 11 + 5)


@pytest.mark.parametrize("rows", [1, 2, 6, 7, 8, 13, 14, 29])
def test_chunks_change_neither_the_loss_nor_a_gradient(small_chunks, rows):
    given = inputs(rows, 11, 3)
    expected = value_and_gradients(plain_loss, *given, factor=0.37)
    found = value_and_gradients(streamed_loss, *given, factor=0.37)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)


def test_a_row_may_be_longer_than_a_chunk(monkeypatch):
    monkeypatch.setattr(large_vocab, "CHUNK_LOGITS", 5)
    given = inputs(3, 11, 2)
    expected = value_and_gradients(plain_loss, *given)
    torch.testing.assert_close(value_and_gradients(streamed_loss, *given), expected)


def relative(found, exact):
    return float((found.double() - exact).norm() / exact.norm())


def test_at_full_size_float32_is_exact_to_a_millionth():
    """301 rows of 50,257 logits: two chunks."""
    given = inputs(301, 50257, 17, torch.float32, scale=0.5)
    exact = [x.detach().double().requires_grad_() for x in given[:2]]
    expected = value_and_gradients(plain_loss, *exact, given[2])
    for found, reference in zip(value_and_gradients(streamed_loss, *given), expected, strict=True):
        assert found.dtype == torch.float32
        assert relative(found.detach(), reference.detach()) < 1e-6


def test_the_loss_keeps_its_digits_where_the_probability_vanishes():
    """Logits 400 apart: the probability of a wrong target is 0 in float32, its loss is not."""
    hidden = torch.tensor([[200.0], [-0.5], [0.3]], requires_grad=True)
    weight = torch.tensor([[1.0], [-1.0], [0.1]], requires_grad=True)
    targets = torch.tensor([1, 0, 2])
    expected = value_and_gradients(plain_loss, hidden, weight, targets)
    assert expected[0] > 130
    torch.testing.assert_close(
        value_and_gradients(streamed_loss, hidden, weight, targets), expected
    )


def test_half_precision_is_summed_in_float32():
    given = inputs(5, 11, 3, torch.bfloat16)
    wide = [x.detach().float().requires_grad_() for x in given[:2]]
    expected = value_and_gradients(plain_loss, *wide, given[2])
    found = value_and_gradients(streamed_loss, *given)
    assert [x.dtype for x in found] == [torch.float32, torch.bfloat16, torch.bfloat16]
    torch.testing.assert_close(found[0], expected[0])
    torch.testing.assert_close(found[1].float(), expected[1], rtol=1e-2, atol=1e-4)
    torch.testing.assert_close(found[2].float(), expected[2], rtol=1e-2, atol=1e-4)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(streamed_loss(*wide, given[2]), streamed_loss(*wide, given[2].int()))
        torch.testing.assert_close(streamed_loss(*wide, given[2]), expected[0])


def test_only_the_gradients_that_are_asked_for():
    hidden, weight, targets = inputs(5, 11, 3)
    expected = value_and_gradients(plain_loss, hidden, weight, targets)
    for index, one in enumerate((hidden, weight)):
        given = [x if x is one else x.detach() for x in (hidden, weight)]
        (grad,) = torch.autograd.grad(streamed_loss(*given, targets), one)
        torch.testing.assert_close(grad, expected[1 + index])
    with torch.no_grad():
        torch.testing.assert_close(streamed_loss(hidden, weight, targets), expected[0])
    assert not streamed_loss(hidden.detach(), weight.detach(), targets).requires_grad


def test_a_second_backward_gives_the_same():
    hidden, weight, targets = inputs(5, 11, 3)
    loss = streamed_loss(hidden, weight, targets)
    first = torch.autograd.grad(loss, (hidden, weight), retain_graph=True)
    first = [grad.clone() for grad in first]
    torch.testing.assert_close(list(torch.autograd.grad(2 * loss, (hidden, weight))),
                               [2 * grad for grad in first])  # fmt: skip


def test_gradients_and_their_gradients(small_chunks):
    hidden, weight, targets = inputs(13, 11, 2)
    for check in (torch.autograd.gradcheck, torch.autograd.gradgradcheck):
        assert check(lambda h, w: streamed_loss(h, w, targets), (hidden, weight))


def test_an_embedding_that_unembeds_gets_both_gradients():
    _, weight, targets = inputs(7, 11, 3)
    tokens = torch.randint(11, (7,))
    both = [loss(weight[tokens].tanh(), weight, targets) for loss in (plain_loss, streamed_loss)]
    expected, found = (torch.autograd.grad(loss, weight) for loss in both)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(
    ("hidden", "weight", "targets"), [((0, 3), (5, 3), 0), ((2, 3), (5, 4), 2), ((2, 3), (5, 3), 3)]
)
def test_sizes_that_disagree_are_named(hidden, weight, targets):
    jaxtyping_config.update("jaxtyping_disable", True)
    try:
        with pytest.raises(
            ValueError, match=r"streamed_loss takes hidden \[row d_model\] of at least"
        ):
            streamed_loss(torch.ones(hidden), torch.ones(weight), torch.zeros(targets).long())
    finally:
        jaxtyping_config.update("jaxtyping_disable", False)


# In a model -------------------------------------------------------------------------------------

TOKENS = torch.randint(LARGE_VOCAB, (2, 7), generator=torch.Generator().manual_seed(3))
MASK = torch.tensor([[1, 0, 0, 1, 1, 0, 1], [0, 1, 0, 0, 0, 0, 0]]).bool()
MODELS = [
    lambda d_vocab: AttnAttn(
        AttnAttnConfig(d_vocab=d_vocab, d_model=12, n_heads=3, n_ctx=13, norm=True)
    ),
    lambda d_vocab: Mamba(MambaConfig(d_vocab=d_vocab, d_model=6, n_ctx=13, tied=True)),
]


@pytest.mark.parametrize("make", MODELS)
@pytest.mark.parametrize("mask", [None, MASK])
def test_a_model_of_a_large_vocabulary_streams_its_loss(make, mask):
    model = make(LARGE_VOCAB).double()
    assert model.streams_loss
    targets = TOKENS[:, 1:] if mask is None else TOKENS[:, 1:].masked_fill(~mask[:, 1:], -100)
    expected = F.cross_entropy(model(TOKENS)[:, :-1].flatten(0, 1), targets.flatten())
    gradients = torch.autograd.grad(expected, list(model.parameters()))
    loss = model(TOKENS, return_type="loss", loss_mask=mask)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    found = torch.autograd.grad(loss, list(model.parameters()))
    torch.testing.assert_close(found, gradients, rtol=1e-9, atol=1e-14)
    _, both = model(TOKENS, return_type="both", loss_mask=mask)
    torch.testing.assert_close(both, expected)


def test_the_plain_loss_is_taken_where_someone_looks_or_the_vocabulary_is_small():
    assert not MODELS[0](LARGE_VOCAB - 1).streams_loss
    model = MODELS[0](LARGE_VOCAB)
    seen = []
    handle = model.unembed.register_forward_hook(lambda module, given, out: seen.append(out.shape))
    assert not model.streams_loss
    watched = model(TOKENS, return_type="loss")
    handle.remove()
    assert seen == [(2, 7, LARGE_VOCAB)]
    assert model.streams_loss
    torch.testing.assert_close(model(TOKENS, return_type="loss"), watched)
    model.unembed.bias = nn.Parameter(torch.zeros(LARGE_VOCAB))
    assert not model.streams_loss


def test_masks_are_checked_before_the_streamed_loss_too():
    model = MODELS[0](LARGE_VOCAB)
    with pytest.raises(ValueError, match="loss_mask keeps no target"):
        model(TOKENS, return_type="loss", loss_mask=torch.zeros_like(MASK))
    with pytest.raises(ValueError, match="a loss needs at least 2 tokens"):
        model(TOKENS[:, :1], return_type="loss")


# Memory -----------------------------------------------------------------------------------------

MEMORY = Path(__file__).with_name("large_vocab_memory.py")


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="reads Linux's VmHWM")
def test_peak_memory():
    """In a process of its own, where freed memory goes back to the system at once."""
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(MEMORY)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    found = json.loads(done.stdout)
    for case in found["cases"]:
        assert case["rise"] < case["bound"], case
        assert 4 * case["rise"] < found["all_logits"], case
    assert found["plain"] > 2 * found["all_logits"]
