"""Long contexts: data and measures by hand, every verdict, the study end to end, tiny."""

import json
import math
import re
from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from smearlens import ConvAttn, ConvAttnConfig
from smearlens.data.corpora import load_corpus
from smearlens.experiments.grid import Cell
from smearlens.experiments.long_context import measures as measured
from smearlens.experiments.long_context import paper_preset
from smearlens.experiments.long_context.study import (
    LongContextConfig,
    cells,
    run,
    text_sources,
    variants,
)
from smearlens.experiments.long_context.verdicts import HYBRID, LEARNED, STACK, by_window, judge
from smearlens.models.families import family
from smearlens.training.config import TrainConfig

TINY = LongContextConfig(seeds=1, steps=2, d_model=32, length=128, longest=512, paper_steps=0)
BLOCK = measured.BLOCK


# Data and measures -----------------------------------------------------------------------------


@pytest.mark.parametrize("copies", [2, None])
def test_blocks_come_back_at_the_gap_and_stand_nowhere_else(copies, generator):
    tokens, targets = measured.gap_tokens(7, (17, 40), 97, 53, copies=copies, generator=generator)
    assert tokens.shape == targets.shape == (7, 97)
    gaps = set()
    for row, target in zip(tokens.tolist(), targets.tolist(), strict=True):
        block = row[-BLOCK:]
        assert len(set(block)) == BLOCK
        assert max(block) < 26  # half of 53
        starts = [i for i in range(98 - BLOCK) if row[i : i + BLOCK] == block]
        gap = starts[-1] - starts[-2]
        gaps.add(gap)
        fit = (97 - BLOCK) // gap + 1
        assert starts == [97 - BLOCK - i * gap for i in reversed(range(copies or fit))]
        inside = {start + i for start in starts for i in range(BLOCK)}
        assert all((i in inside) == (token < 26) for i, token in enumerate(row))
        known = {start + i for start in starts[1:] for i in range(1, BLOCK)}
        assert {i for i, counts in enumerate(target) if counts} == known
    assert len(gaps) > 1
    assert min(gaps) >= 17
    assert max(gaps) <= 40


def test_batches_are_a_function_of_the_step_and_mask_what_cannot_be_known():
    batches = measured.GapBatches(3, (16, 30), 64, 40, seed=5)
    one, again, other = batches.batch(2), batches.batch(2), batches.batch(3)
    assert torch.equal(one["tokens"], again["tokens"])
    assert not torch.equal(one["tokens"], other["tokens"])
    assert one["loss_mask"][:, 1 - BLOCK :].all()
    assert not one["loss_mask"][:, -BLOCK].any()


@pytest.mark.parametrize("gap", [15, 49, (16, 49)])
def test_blocks_must_fit(gap, generator):
    with pytest.raises(ValueError, match=r"need 16 <= gap <= 48 and d_vocab >= 32, got gap="):
        measured.gap_tokens(2, gap, 64, 40, generator=generator)


def test_accuracy_counts_the_second_block_but_for_its_first_token(generator):
    tokens, _ = measured.gap_tokens(5, 20, 60, 40, generator=generator)

    def perfect(given):
        return torch.nn.functional.one_hot(given.roll(-1, 1), 40).float() * 99

    assert measured.gap_scores(perfect, tokens)["accuracy"] == 1
    spoiled = tokens.clone()
    spoiled[:, -BLOCK] = 39  # the first of the block: asked of nobody
    assert measured.gap_scores(lambda t: perfect(spoiled), tokens)["accuracy"] == 1
    spoiled[:2, -1] = 39
    found = measured.gap_scores(lambda t: perfect(spoiled), tokens)["accuracy"]
    assert found == pytest.approx(1 - 2 / 5 / (BLOCK - 1))


def test_distances_equal_a_plain_loop(generator):
    tokens = torch.randint(4, (3, 29), generator=generator)
    found = measured.distance(tokens)
    for row, distances in zip(tokens.tolist(), found.tolist(), strict=True):
        for t in range(1, 29):
            earlier = [s for s in range(1, t) if row[s - 1 : s + 1] == row[t - 1 : t + 1]]
            assert distances[t - 1] == (t - max(earlier) if earlier else 0)


def test_recall_splits_by_distance_and_by_frequency_in_training():
    generator = torch.Generator().manual_seed(3)
    train = torch.randint(6, (500,), generator=generator)
    tokens = torch.randint(6, (4, 150), generator=generator)
    losses = torch.rand(4, 149, generator=generator)
    found = measured.recall(losses, tokens, train)
    distance = measured.distance(tokens)
    pairs = list(pairwise(train.tolist()))
    counts = [[pairs.count((a, b)) for a, b in pairwise(r)]
              for r in tokens.tolist()]  # fmt: skip
    frequency = torch.tensor(counts)
    rare = frequency <= torch.quantile(frequency[distance > 0].double(), 0.25)
    chosen = (distance >= 64) & rare
    rows = {(r["distance"], r["frequency"]): r for r in found["recall"]}
    assert rows["far", "rare"]["n"] == int(chosen.sum()) > 0
    assert rows["far", "rare"]["loss"] == pytest.approx(float(losses[chosen].double().mean()))
    assert rows["hit", "all"]["n"] + rows["new", "all"]["n"] == 4 * 149
    six = sum(r["n"] for key, r in rows.items() if key[1] != "all")
    assert six == rows["hit", "all"]["n"]
    assert found["rare_far"][1] == pytest.approx(float(losses[1][chosen[1]].mean()), abs=1e-4)


def test_short_contexts_are_those_of_the_same_tokens():
    """A model whose loss at a position is known: log of how many tokens it has seen."""
    config = ConvAttnConfig(d_vocab=5, d_model=8, n_heads=2, n_ctx=40, positions="rotary")
    model = ConvAttn(config)

    def forward(tokens, *args, **kwargs):
        seen = torch.arange(1, tokens.shape[1] + 1).float()
        true = torch.nn.functional.one_hot(tokens.roll(-1, 1), 5).float()
        # a logit x on the truth among 5: loss = log(1 + 4 e^-x) = log(1 + seen)
        logit = -(seen / 4).log()
        return true * logit[None, :, None]

    model.forward = forward
    tokens = torch.randint(5, (3, 40), generator=torch.Generator().manual_seed(0))
    rows = measured.beyond(model, tokens, 8)
    assert [(r["from"], r["to"]) for r in rows] == [(4, 8), (8, 16), (16, 32), (32, 40)]
    for r in rows:
        targets = range(r["from"], r["to"])  # target t is predicted by t tokens
        whole = sum(math.log(1 + t) for t in targets) / len(targets)
        recent = sum(math.log(1 + 4 + t % 4) for t in targets) / len(targets)
        assert r["loss"] == pytest.approx(whole, rel=1e-5)
        assert r["short"] == pytest.approx(recent, rel=1e-5)


def test_windows_do_not_overlap_and_a_short_text_is_refused():
    text = torch.arange(100)
    assert measured.windows(text, 30, 9)[:, 0].tolist() == [0, 35, 70]
    with pytest.raises(ValueError, match="held-out text of 100 tokens is shorter than 101"):
        measured.windows(text, 101, 2)


# Models ----------------------------------------------------------------------------------------


def test_models_have_as_many_weights_but_for_a_learned_table():
    config = LongContextConfig()
    made = {n: family(c)(s) for n, (c, s) in variants(config, 65).items()}
    sizes = {name: model.n_parameters for name, model in made.items()}
    table = config.length * config.d_model
    assert sizes[LEARNED] - table == pytest.approx(sizes[HYBRID], rel=0.01)
    for name in (STACK, "rotary", "conv, no positions"):
        assert sizes[name] == pytest.approx(sizes[HYBRID], rel=0.03)


def test_n_ctx_of_a_rotary_model_is_a_limit_and_no_weight():
    torch.manual_seed(0)
    short = ConvAttn.from_preset("hybrid", d_vocab=13, d_model=16, n_heads=2, n_ctx=11)
    long = ConvAttn(replace(short.config, n_ctx=4096))
    long.load_state_dict(short.state_dict())
    tokens = torch.randint(13, (3, 11))
    assert torch.equal(short(tokens), long(tokens))
    assert long(torch.randint(13, (1, 600))).shape == (1, 600, 13)
    with pytest.raises(ValueError, match="n_ctx is 11"):
        short(torch.randint(13, (1, 12)))


def test_the_cost_of_the_full_size_is_tokens_and_updates(monkeypatch):
    monkeypatch.setattr(paper_preset, "_timed", lambda model, tokens, steps: (0.5, 0.25))
    found = paper_preset.paper_cost("ConvAttn", steps=1, preset="cpu")
    tokens, updates = 15 * paper_preset.TRAIN_TOKENS, 15 * paper_preset.TRAIN_TOKENS // 8192
    assert found["updates"] == updates
    assert found["hours"] * 3600 == pytest.approx(tokens * 0.5 / (2 * 64) + updates * 0.25)
    assert not found["streams_loss"]


def test_a_timed_update_takes_time(tmp_path, monkeypatch):
    monkeypatch.setattr(paper_preset, "MODELS", ("AttnAttn",))
    cost = paper_preset.paper_cost
    monkeypatch.setattr(
        paper_preset, "paper_cost", lambda name, steps: cost(name, steps=steps, preset="cpu")
    )
    (found,) = paper_preset.paper_costs(tmp_path / "paper.json", 1)
    assert found["seconds_per_1000_tokens"] > 0
    assert found["seconds_per_optimiser_step"] > 0
    monkeypatch.setattr(paper_preset, "paper_cost", lambda *a, **k: pytest.fail("measured again"))
    assert paper_preset.paper_costs(tmp_path / "paper.json", 1) == [found]
    assert paper_preset.paper_costs(tmp_path / "none.json", 0) == []


def test_the_command_for_the_full_size_trains(tmp_path, monkeypatch):
    class Small(ConvAttn):
        presets = {"paper": ConvAttn.presets["cpu"]}  # noqa: RUF012

        def __init__(self, config):
            super().__init__(replace(config, d_vocab=50257, d_model=8, n_heads=2))

    monkeypatch.setattr(paper_preset, "family", lambda name: Small)
    monkeypatch.setattr(paper_preset, "BATCH", 2)
    monkeypatch.setattr(paper_preset, "LENGTH", 11)
    text = tmp_path / "text.txt"
    text.write_text(load_corpus("tiny-shakespeare", max_chars=150).text)
    found = paper_preset.train_paper("ConvAttn", text, tmp_path / "run", epochs=1)
    assert found.steps == len(found.log("metrics")) >= 1
    assert found.log("metrics")[0]["loss"] == pytest.approx(math.log(50257), abs=2)


# Verdicts --------------------------------------------------------------------------------------

SHIFTS = (-0.004, 0.001, 0.005)


def world(*, harm=0.0, drop=0.0, learned=0.9, end=0.0, early=None, rare=0.0):
    """Measures of three seeds; `end`, `early`, `rare`: the convolution's loss minus the stack's."""
    runs = []
    for seed, shift in enumerate(SHIFTS):
        for name in (HYBRID, "rotary", "conv, no positions", STACK, LEARNED):
            own = name == HYBRID
            long = learned - drop
            runs.append({
                "name": name, "task": "repeats", "seed": seed,
                "by_length": {"256": {"16": learned + shift, "64": learned, "240": learned},
                              "4096": {"16": long, "64": long + shift, "256": 0.1}},
            })  # fmt: skip
            for text in ("tiny Shakespeare", "TinyStories"):
                half = 2.4 + (end if early is None else early) * own + shift * own
                rare_loss = 3.0 + (rare + shift) * own
                m = {
                    "name": name, "task": text, "seed": seed,
                    "val_loss": 2.0 + (end + shift) * own,
                    "n_parameters": 1030 if own else 1000,
                    "curve": [{"step": s, "loss": x} for s, x in ((0, 4.0), (5, half), (10, 2.0))],
                    "recall": [{"distance": "far", "frequency": "rare", "loss": rare_loss,
                                "n": 99}],
                    "rare_far": [rare_loss, None, rare_loss + 0.1],
                }  # fmt: skip
                if name != LEARNED:
                    m["beyond"] = [{"loss": 2.0, "short": 2.0},
                                   {"loss": 2.0 + harm + shift, "short": 2.0}]  # fmt: skip
                runs.append(m)
    return runs


@pytest.mark.parametrize(
    ("number", "changes", "outcome"),
    [
        (0, {}, "supported"),
        (0, {"harm": 0.3}, "refuted"),
        (0, {"drop": 0.5}, "refuted"),
        (0, {"harm": 0.02}, "undecided"),
        (0, {"learned": 0.2}, "undecided"),
        (10, {"end": -0.1}, "supported"),
        (10, {"end": 0.1}, "refuted"),
        (10, {"end": -0.1, "early": 0.1}, "undecided"),
        (11, {"rare": 0.1}, "supported"),
        (11, {"rare": -0.1}, "refuted"),
        (11, {"rare": 0.0}, "undecided"),
        (11, {"rare": 0.1, "learned": 0.2}, "undecided"),
        (11, {"rare": -0.1, "learned": 0.2}, "undecided"),
    ],
)
def test_every_outcome_can_be_reached(number, changes, outcome):
    (found,) = (v for v in judge(world(**changes)) if v.claim.number == number)
    assert found.outcome == outcome
    assert found.n_seeds == 3


def test_the_difference_in_weights_is_told():
    (found,) = (v for v in judge(world()) if v.claim.number == 10)
    assert "the convolution has 3.0 % more on tiny Shakespeare; 3.0 % more on Tiny" in found.because


def test_one_seed_proves_nothing():
    verdicts = judge([m for m in world(end=-0.1) if m["seed"] == 0])
    assert {v.outcome for v in verdicts} == {"undecided"}


def test_differences_by_window_leave_out_windows_without_a_token():
    one = [{"rare_far": [1.0, None, 2.0]}, {"rare_far": [2.0, None, 3.0]}]
    other = [{"rare_far": [0.5, 1.0, 1.0]}, {"rare_far": [0.5, 1.0, 1.0]}]
    found = by_window(one, other)
    assert (found.mean, found.n) == ((1.0 + 1.5) / 2, 2)


# The study -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    stories = tmp_path_factory.mktemp("data") / "stories.txt"
    text = load_corpus("tiny-shakespeare", max_chars=30_000).text
    stories.write_text(text)
    config, out = replace(TINY, data=str(stories)), tmp_path_factory.mktemp("study")
    return config, out, run(config, out, command="smearlens experiment long-context --tiny")


def test_the_study_runs_to_a_page(study):
    _, out, found = study
    assert [v["claim"]["number"] for v in found["verdicts"]] == [0, 10, 11]
    assert json.loads((out / "result.json").read_text()).keys() == found.keys()
    assert {m["task"] for m in found["measures"]} == {"repeats", "tiny Shakespeare", "TinyStories"}
    for m in found["measures"]:
        lengths = m.get("by_length", {"128": {}, "512": {}})
        assert list(lengths) == (["128"] if m["name"] == LEARNED and "by_length" in m else
                                 ["128", "512"])  # fmt: skip
        assert ("beyond" in m) == (m["task"] != "repeats" and m["name"] != LEARNED)
    page = (out / "report.html").read_text()
    assert not re.search(r"(src|href)=['\"]https?:|@import|url\(\s*['\"]?http", page)
    assert "cannot be read" in (out / "tables" / "positions_tiny_shakespeare.md").read_text()
    figures = {p.stem for p in (out / "figures").glob("*.png")}
    assert figures == {"repeats", "positions_tiny_shakespeare", "positions_tinystories"}


def test_running_again_trains_nothing(study, monkeypatch):
    config, out, found = study
    monkeypatch.setattr("smearlens.experiments.grid.train", lambda *a, **k: pytest.fail("trained"))
    again = run(config, out, command="smearlens experiment long-context --tiny")
    assert again["measures"] == json.loads(json.dumps(found["measures"]))


def test_without_stories_the_grid_is_smaller_and_a_wrong_folder_fails(tmp_path):
    assert len(cells(TINY)) == 2 * 5
    with pytest.raises(ValueError, match=r"must be a text file, or hold one.*found none"):
        text_sources(replace(TINY, data=str(tmp_path)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seeds": 0}, "seeds must be at least 1, got 0"),
        ({"d_model": 48}, "d_model must be a multiple of 32, got 48"),
        ({"length": 100}, "length must be even, at least 128"),
        ({"longest": 256}, "longest four times as long or more, got length=128, longest=256"),
        ({"paper_steps": -1}, "paper_steps must be 0 or above, got -1"),
    ],
)
def test_impossible_sizes_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        replace(TINY, **change)


def test_measures_of_a_learned_table_stop_at_its_end():
    _, sizes = variants(TINY, 64)[LEARNED]
    cell = Cell(name=LEARNED, task="repeats", seed=0, model="ConvAttn", config=sizes,
                train=TrainConfig(steps=1))  # fmt: skip
    found = measured.on_repeats(ConvAttn(sizes), cell, length=128, longest=512)
    assert list(found["by_length"]) == ["128"]
    assert list(found["by_length"]["128"]) == ["16", "64", "112"]
