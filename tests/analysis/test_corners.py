"""Inputs at the edge of what statistics are defined for, against other ways to the same number."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr

from smearlens import induction_score, prefix_matching_score
from smearlens.analysis.association import association_within_run, partial_correlation
from smearlens.analysis.detection import alignment_mass
from smearlens.analysis.heads import _arrival_seen
from smearlens.analysis.mixing.kinds import SoftmaxMixing
from smearlens.analysis.mixing.layer_streams import cka_table, compare_layers, head_statistics
from smearlens.analysis.patterns import attention_entropy
from smearlens.analysis.similarity import layer_similarity, linear_cka
from smearlens.analysis.stats import over_seeds


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def test_equal_steps_stay_equal_when_they_are_ranked():
    draw = np.random.default_rng(0)
    for _ in range(50):
        counts, other = draw.integers(0, 21, 12), draw.integers(0, 9, 12)
        found = association_within_run(counts / 20, other / 7, np.arange(12)).rank_differences
        expected = spearmanr(np.diff(counts), np.diff(other)).statistic
        assert found == pytest.approx(expected, abs=1e-12, nan_ok=True)


def test_a_side_that_is_constant_in_every_group_has_no_correlation():
    group = [i // 3 for i in range(30)]
    level = [0.1 + 0.3 * g for g in group]
    other = np.random.default_rng(0).normal(size=30)
    assert math.isnan(partial_correlation(level, other, groups=group).value)
    assert not math.isnan(partial_correlation(other**2, other, groups=group).value)


@pytest.mark.parametrize("aggregate", ["sum", "mean"])
def test_the_maximum_is_reached_by_all_weight_on_the_targets(aggregate):
    tokens = torch.randint(6, (2, 6), generator=seeded()).argsort(1).repeat(1, 4)
    weights = torch.eye(24).expand(2, 1, 24, 24).clone()
    for b in range(2):
        for q in range(24):
            targets = [k + 1 for k in range(q) if tokens[b, k] == tokens[b, q]]
            if targets:
                weights[b, 0, q] = 0
                weights[b, 0, q, targets[0]] = 1
    found = prefix_matching_score(
        {"blocks.0.attn.hook_pattern": weights}, tokens, aggregate=aggregate
    )
    torch.testing.assert_close(found["blocks.0.attn"].mean(), found.maximum["blocks.0.attn"][0])
    assert (found.maximum["blocks.0.attn"] < 1).all() == (aggregate == "mean")


def test_arrivals_that_stood_before_are_those_of_a_loop():
    tokens = torch.randint(-3, 4, (5, 40), generator=seeded())
    seen = _arrival_seen(tokens)
    for b in range(5):
        pairs = [tuple(tokens[b, t - 1 : t + 1].tolist()) for t in range(1, 40)]
        assert seen[b].tolist() == [False] + [p in pairs[:i] for i, p in enumerate(pairs)]


def test_an_index_behind_the_keys_is_no_target():
    pattern = torch.full((1, 1, 3, 4), 0.25)
    alignment = torch.tensor([[4, 5, 2]])
    assert alignment_mass(pattern, alignment, shift=-1).item() == 0.25
    outside = torch.tensor([[4, 5, 7]])
    assert alignment_mass(pattern, outside, shift=-1).isnan().all()


# Layers ----------------------------------------------------------------------------------------


def test_a_table_of_unequal_widths_is_that_of_its_pairs():
    streams = [torch.randn(10, 10, width, generator=seeded(width)) for width in (3, 4, 64)]
    table = cka_table(streams)
    for i in range(3):
        for j in range(3):
            expected = linear_cka(streams[i].flatten(0, 1), streams[j].flatten(0, 1))
            assert float(table[i, j]) == pytest.approx(float(expected), abs=1e-9)


def test_rows_of_layers_are_a_slice_without_gaps():
    q, k = torch.randn(2, 2, 9, 3, 4, generator=seeded()).unbind()
    layers = {"a": SoftmaxMixing(q, k), "b": SoftmaxMixing(k, q)}
    for rows in (slice(0, 9, 2), slice(4, 4)):
        with pytest.raises(ValueError, match="slice of step 1"):
            compare_layers(layers, rows=rows)
    one = head_statistics(SoftmaxMixing(q[:, :1], k[:, :1]))
    assert one["previous"].isnan().all()
    assert (one["entropy"] == 0).all()


@pytest.mark.parametrize("kind", ["js", "cosine"])
def test_matched_heads_are_those_of_every_pair(kind):
    patterns = torch.rand(2, 2, 3, 7, 7, generator=seeded()).tril() + 1e-3 * torch.eye(7)
    patterns = patterns / patterns.sum(-1, keepdim=True)
    cache = {f"blocks.{i}.attn.hook_pattern": p for i, p in enumerate(patterns)}
    found = layer_similarity(cache, kind=kind, heads="match").values[0, 1]
    table = torch.stack([
        torch.stack([
            layer_similarity({
                "blocks.0.attn.hook_pattern": patterns[0][:, [a]],
                "blocks.1.attn.hook_pattern": patterns[1][:, [b]],
            }, kind=kind).values[0, 1]
            for b in range(3)
        ])
        for a in range(3)
    ])  # fmt: skip
    orders = torch.tensor([[0, 1, 2], [0, 2, 1], [1, 0, 2], [1, 2, 0], [2, 0, 1], [2, 1, 0]])
    best = max(float(table[torch.arange(3), order].mean()) for order in orders)
    assert float(found) >= best - 1e-9  # the matching is per example, so at least as good


# What is refused -------------------------------------------------------------------------------


def test_an_interval_belongs_to_its_values():
    pattern = torch.rand(4, 2, 9, 9, generator=seeded()).softmax(-1)
    tokens = torch.randint(3, (4, 9), generator=seeded())
    scores = induction_score({"blocks.0.attn.hook_pattern": pattern}, tokens)
    scores.interval()
    zeros = {layer: torch.zeros_like(v) for layer, v in scores.per_layer.items()}
    assert (dataclasses.replace(scores, per_layer=zeros).interval()["blocks.0.attn"] == 0).all()


def test_rows_that_lack_what_was_left_out_say_so():
    pattern = {"blocks.0.attn.hook_pattern": torch.rand(2, 1, 6, 6, generator=seeded()).softmax(-1)}
    note = attention_entropy(pattern, exclude_bos=True, renormalise=False).note
    assert note == "rows not renormalised"
    assert attention_entropy(pattern, exclude_bos=True).note == ""


def test_a_level_is_a_fraction():
    with pytest.raises(ValueError, match=r"level must be in \(0, 1\), got 95"):
        over_seeds([1.0, 2.0, 3.0], 95.0)
