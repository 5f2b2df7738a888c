"""The study's own measures against planted models and plain loops."""

import pytest
import torch

from smearlens.analysis.heads import induction_score
from smearlens.experiments.grid import Cell
from smearlens.experiments.measures import evaluation_tokens
from smearlens.experiments.smeared_keys import measures as ours
from smearlens.models.attn_attn import AttnAttn, AttnAttnConfig
from smearlens.models.conv_attn import ConvAttn, ConvAttnConfig
from smearlens.training.config import TrainConfig

TOKENS = evaluation_tokens((5, 9), 23, 13, batch=7)
SIZE = {"d_vocab": 13, "d_model": 12, "n_heads": 3, "n_ctx": 23}


def conv_attn(seed=0, **changes):
    torch.manual_seed(seed)
    return ConvAttn(ConvAttnConfig(**{**SIZE, **changes})).eval()


def plant(model, make):
    """Replace every pattern of the first layer by make(tokens) [batch query key]."""

    def planted(pattern, hook):
        return make(TOKENS)[:, None].expand_as(pattern).clone()

    model.hook_dict["blocks.0.attn.hook_pattern"].add_hook(planted)


def stripe(offset, weight):
    """`weight` on what stands `offset` after each row's first earlier occurrence."""

    def make(tokens):
        pattern = torch.zeros(*tokens.shape, tokens.shape[1])
        for example, row in enumerate(tokens.tolist()):
            for query, token in enumerate(row):
                seen = row.index(token)
                if seen < query and seen + offset <= query:
                    pattern[example, query, seen + offset] = weight
        return pattern

    return make


@pytest.mark.parametrize("offset", [0, 1, 2, 3])
def test_the_place_of_a_planted_stripe(offset):
    model = conv_attn()
    plant(model, stripe(offset, 0.75))
    found = {int(o): row["score"] for o, row in ours.stripe_offsets(model, TOKENS).items()}
    assert max(found, key=found.get) == offset
    assert found[offset] == pytest.approx(0.75)


def test_the_best_head_is_that_of_the_scores_table():
    model = AttnAttn(AttnAttnConfig(**SIZE, n_layers=2))
    _, cache = model.run_with_cache(TOKENS)
    scores = induction_score(cache, TOKENS)
    top = scores.top(1)[0]
    found = ours.best(scores)
    assert (found["layer"], found["head"]) == (top["layer"], top["head"])
    for key in ("score", "control", "chance"):
        assert found[key] == pytest.approx(top[key])
    for layer in scores:
        mine = [r for r in scores.records() if r["layer"] == layer]
        assert ours.best(scores, layer)["score"] == pytest.approx(max(r["score"] for r in mine))


def accuracy_without(model, head):
    """Accuracy on known tokens while a head of the second layer gives its mean, by hand."""
    _, cache = model.run_with_cache(TOKENS)
    mean = cache["blocks.1.attn.hook_z"][:, :, head].mean((0, 1))

    def remove(z, hook):
        z[:, :, head] = mean
        return z

    with torch.no_grad():
        logits = model.run_with_hooks(TOKENS, fwd_hooks=[("blocks.1.attn.hook_z", remove)])
    hits, accuracies = logits[:, :-1].argmax(-1) == TOKENS[:, 1:], []
    for hit, tokens in zip(hits.tolist(), TOKENS.tolist(), strict=True):
        known = [i for i in range(len(tokens) - 1) if tokens[i] in tokens[:i]]
        accuracies.append(sum(hit[i] for i in known) / len(known))
    return sum(accuracies) / len(accuracies)


def test_a_layer_without_its_best_head_against_a_plain_hook():
    model = AttnAttn(AttnAttnConfig(**SIZE, n_layers=2)).eval()
    row = ours.layers(model, TOKENS)[1]
    head = row["induction"]["head"]
    assert row["without_induction"]["accuracy"] == pytest.approx(accuracy_without(model, head))


def test_each_score_removes_the_head_that_is_best_by_it():
    model = AttnAttn(AttnAttnConfig(**SIZE, n_layers=2)).eval()

    def planted(pattern, hook):
        made = torch.zeros_like(pattern)
        made[:, 1] = stripe(1, 0.75)(TOKENS)
        made[:, 2] = torch.eye(TOKENS.shape[1]).roll(-1, 1).tril() * 0.9
        return made

    model.hook_dict["blocks.1.attn.hook_pattern"].add_hook(planted, is_permanent=True)
    row = ours.layers(model, TOKENS)[1]
    assert (row["induction"]["head"], row["prev_token"]["head"]) == (1, 2)
    for name, head in (("induction", 1), ("prev_token", 2)):
        found = row[f"without_{name}"]["accuracy"]
        assert found == pytest.approx(accuracy_without(model, head)), name


@pytest.mark.parametrize("role", ["stream", "k"])
def test_the_way_of_a_kernel_from_its_start(role):
    config = ConvAttnConfig(**SIZE, kernel_size=5, causal=False, conv_on=role)
    cell = Cell(name="x", task="y", seed=3, model="ConvAttn", config=config,
                train=TrainConfig(steps=1))  # fmt: skip
    model = conv_attn(3, kernel_size=5, causal=False, conv_on=role)
    still = ours.kernel_from_start(model, cell)
    assert still["moved_in_all"] == 0
    assert still["lags"] == [-2, -1, 0, 1, 2]
    assert still["start_largest"] <= still["bound"] == 5**-0.5
    conv = model.get_submodule(still["layer"])
    start = conv.weight.detach().clone()
    with torch.no_grad():
        conv.weight[:, conv.lags.index(1)] *= -3
    found = ours.kernel_from_start(model, cell)
    assert found["moved"] == pytest.approx([0, 0, 0, 4, 0])
    at_one = start[:, conv.lags.index(1)]
    assert found["moved_in_all"] == pytest.approx(float(4 * at_one.norm() / start.norm()))
    assert found["rms"][3] == pytest.approx(3 * found["start_rms"][3])
    future = start[:, [conv.lags.index(lag) for lag in (-2, -1)]].square().sum()
    whole = conv.weight.detach().square().sum()
    assert found["future_share"] == pytest.approx(float(future / whole))


def test_no_kernel_no_way():
    config = ConvAttnConfig(**SIZE, conv_on=None)
    cell = Cell(name="x", task="y", seed=0, model="ConvAttn", config=config,
                train=TrainConfig(steps=1))  # fmt: skip
    assert ours.kernel_from_start(conv_attn(conv_on=None), cell) == {}


def test_taps_removed_by_hooks_are_taps_set_to_zero():
    changes = {"kernel_size": 5, "causal": False, "residual": True}
    rows = ours.future_taps(conv_attn(**changes), TOKENS, repeats=True)
    assert [row["removed"] for row in rows] == [[], [-2], [-1], [-2, -1]]
    for row in rows:
        model = conv_attn(**changes)
        conv = model.blocks[0].conv
        with torch.no_grad():
            for lag in row["removed"]:
                conv.weight[:, conv.lags.index(lag)] = 0
            assert row["loss"] == pytest.approx(float(model(TOKENS, return_type="loss")), rel=1e-5)
        assert 0 <= row["accuracy"] <= 1


def test_the_lean_set_agrees_with_the_full_one():
    from smearlens.experiments import measures

    model = conv_attn(kernel_size=3, residual=True)
    lean, full = ours.lean(model, TOKENS), measures.smearing(model, TOKENS)["without_lags"]
    assert lean["accuracy"] == pytest.approx(measures.behaviour(model, TOKENS)["accuracy"])
    for role in ("q", "k", "v", "qkv"):
        found = lean["smearing"]["without_lags"][role]["accuracy"]
        assert found == pytest.approx(full[role]["accuracy"])
