"""Attention over training: the study end to end, tiny; its measures by hand; every verdict."""

import base64
import json
import re
import shutil
import zlib
from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest
import torch

from smearlens import CharGPT, CharGPTConfig
from smearlens.analysis.stats import Estimate
from smearlens.data.tokenizers import CharTokenizer
from smearlens.experiments.evolution import logs
from smearlens.experiments.evolution import measures as measured
from smearlens.experiments.evolution import samples as samples_module
from smearlens.experiments.evolution.paths import turn
from smearlens.experiments.evolution.samples import correlation
from smearlens.experiments.evolution.study import EvolutionConfig, cells, data_sets, file_of, run
from smearlens.experiments.evolution.times import times
from smearlens.experiments.evolution.verdicts import contrast, judge
from smearlens.training.randomness import observing

TINY = EvolutionConfig(
    seeds=2, steps=12, d_model=16, n_heads=2, length=32, batch_size=3, prompts=2, samples=2
)
CLAIMS = [24, 25, 26, 27, 28, 29, 30]
SHAKESPEARE = "shakespeare_char"
PLOTS = ("train_loss", "val_loss", "attention_metrics", "layer_similarity")


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    out = tmp_path_factory.mktemp("study")
    with pytest.warns(UserWarning, match="enwik8 and text8 are left out"):
        found = run(TINY, out, command="smearlens experiment evolution --tiny")
    return out, found


# The study -------------------------------------------------------------------------------------


def test_every_claim_is_judged_and_every_field_is_there(study):
    out, found = study
    assert [v["claim"]["number"] for v in found["verdicts"]] == CLAIMS
    assert json.loads((out / "result.json").read_text()).keys() == found.keys()
    fields, times = found["fields"][SHAKESPEARE], found["times"]["fields"][SHAKESPEARE]
    assert fields["tracked"]["n"] == 2
    assert fields["no tracking"]["n"] == 1
    assert {"final_train_loss_mean", "best_val_loss_mean"} <= fields["tracked"].keys()
    assert {"total_train_time_mean", "avg_inference_tokens_per_second_mean"} <= (
        times["no tracking"].keys()
    )
    assert len(json.dumps(found["measures"])) < 150_000, "results are committed: keep them small"


def test_measures_hold_no_times(study):
    _, found = study
    words = json.dumps([found["measures"], found["fields"], found["compared"]])
    assert "second" not in words
    assert "time" not in words


def test_the_page_holds_the_four_plots_and_the_slider(study):
    out, _ = study
    page = (out / "report.html").read_text()
    assert {p.stem for p in (out / "figures").glob("*.png")} == {
        "loss_paths",
        *(f"{plot}_{SHAKESPEARE}" for plot in PLOTS),
    }
    assert "enwik8 and text8 were left out" in page
    assert "most focused head of each layer over training" in page
    assert not re.search(r"(src|href)=['\"]https?:|@import|url\(\s*['\"]?http", page)
    for name in (
        "fields",
        "changes",
        "similarity",
        "loss",
        "heads",
        "tracking",
        "texts",
        "loss_paths",
    ):
        assert (out / "tables" / f"{name}.md").exists()
    assert "shuffled" in (out / "tables" / "similarity.md").read_text()


def test_paths_of_token_losses_are_fitted_over_all_seeds(study):
    out, found = study
    paths = found["paths"][SHAKESPEARE]
    looks = [
        [json.loads(line) for line in (run / "tracking.jsonl").read_text().splitlines()]
        for run in sorted(out.glob("runs/*-tracked-*"))
    ]
    assert paths["n_tokens"] == 64
    assert paths["steps"] == [row["step"] for row in looks[0]]
    rows = np.array([[row[f"token_loss/{i}"] for i in range(64)] for run in looks for row in run])
    _, lengths, directions = np.linalg.svd(rows - rows.mean(0), full_matrices=False)
    signs = np.where(directions[:2].sum(1) < 0, -1, 1)
    points = np.concatenate([paths["paths"]["0"], paths["paths"]["1"]])
    expected = (rows - rows.mean(0)) @ directions[:2].T * signs
    np.testing.assert_allclose(points, expected, atol=0.0006)
    shares = lengths[:2] ** 2 / (lengths**2).sum()
    np.testing.assert_allclose(paths["explained"], shares, atol=6e-5)


def test_a_path_turns_where_it_is_furthest_from_its_chord():
    assert turn([[0, 0], [1, 1], [5, 3], [5, -1], [6, 0]]) == 2


def test_tracking_changes_not_a_byte(study):
    out, found = study
    (compared,) = found["compared"]
    assert compared["identical"]
    assert compared["same_samples"]
    assert compared["difference"] == 0
    runs = out / "runs"
    tracked = runs / f"{SHAKESPEARE}-tracked-seed0"
    plain = runs / f"{SHAKESPEARE}, no tracking-no tracking-seed0"
    assert (tracked / "metrics.jsonl").read_bytes() == (plain / "metrics.jsonl").read_bytes()
    assert (tracked / "tracking.jsonl").exists()
    assert not (plain / "tracking.jsonl").exists()


def test_a_single_other_byte_is_noticed(study, tmp_path):
    out, found = study
    pairs = [(m, out / "runs" / f"{m['task']}-{m['name']}-seed{m['seed']}")
             for m in found["measures"]]  # fmt: skip
    measures, folders = map(list, zip(*pairs, strict=True))
    at = next(i for i, m in enumerate(measures) if m["name"] == "no tracking")
    folders[at] = shutil.copytree(folders[at], tmp_path / "copy")
    assert logs.compared(measures, folders)[0]["identical"]
    log = folders[at] / "evaluation.jsonl"
    log.write_bytes(log.read_bytes().replace(b"4.", b"5.", 1))
    assert not logs.compared(measures, folders)[0]["identical"]


@pytest.mark.filterwarnings("ignore:enwik8 and text8 are left out")
def test_a_missing_cell_alone_is_run_again_and_gives_the_same(study):
    out, found = study
    again = out / "runs" / f"{SHAKESPEARE}-tracked-seed1"
    before = (again / "measures.json").read_text()
    times = {path: path.stat().st_mtime_ns for path in out.glob("runs/*/measures.json")}
    shutil.rmtree(again)
    second = run(TINY, out, command="smearlens experiment evolution --tiny")
    assert (again / "measures.json").read_text() == before
    changed = [p.parent for p, time in times.items() if p.stat().st_mtime_ns != time]
    assert changed == [again]
    for key in ("measures", "fields", "compared"):
        assert json.dumps(second[key]) == json.dumps(found[key])
    with pytest.raises(ValueError, match=r"another configuration.*steps"):
        run(replace(TINY, steps=13), out)


def test_the_grid_trains_nothing_twice_but_for_the_comparison(tmp_path):
    for name in ("enwik8", "text8"):
        (tmp_path / name).write_text("some text " * 99)
    grid = cells(EvolutionConfig(data=str(tmp_path)))
    assert len({cell.folder for cell in grid}) == len(grid) == 3 * 5 + 3 * 1
    assert {c.config.d_vocab for c in grid} == {65, 256, 27}
    assert {c.seed for c in grid if c.name == "no tracking"} == {0}


def test_a_folder_must_hold_one_file_of_each_corpus(tmp_path):
    config = replace(TINY, data=str(tmp_path))
    with pytest.raises(ValueError, match=r"must hold one file of enwik8.*found none"):
        data_sets(config)
    (tmp_path / "enwik8").mkdir()
    (tmp_path / "enwik8" / "enwik8.head.gz").touch()
    assert file_of("enwik8", str(tmp_path)).name == "enwik8.head.gz"
    (tmp_path / "enwik8.zip").touch()
    with pytest.raises(ValueError, match=r"one file of enwik8.*enwik8\.zip"):
        file_of("enwik8", str(tmp_path))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seeds": 0}, "seeds must be at least 1, got 0"),
        ({"steps": 11}, "steps must be at least 12, to look 8 times, got 11"),
        ({"length": 31}, "length must be at least 32 characters, got 31"),
        ({"samples": 1}, "samples of a prompt are compared: at least 2, got 1"),
        ({"baselines": 3}, r"baselines must be in 0..2 \(seeds\), got 3"),
    ],
)
def test_impossible_sizes_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        replace(TINY, **change)


# Measures --------------------------------------------------------------------------------------


@pytest.fixture
def model():
    config = CharGPTConfig(d_vocab=13, d_model=12, n_heads=3, n_layers=2, n_ctx=23)
    model = CharGPT(config).eval()
    for parameter in model.requires_grad_(False).parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return model


def test_attention_along_samples_equals_plain_loops_over_patterns(model, generator):
    tokens, prompt = torch.randint(13, (5, 11), generator=generator), 4
    found = measured.sample_attention(model, tokens, prompt)
    _, cache = model.run_with_cache(tokens)
    for sample in range(5):
        entropy, distance, dominance = [], [], []
        for layer in range(2):
            pattern = cache[f"blocks.{layer}.attn.hook_pattern"][sample]
            z = cache[f"blocks.{layer}.attn.hook_z"][sample]
            out = model.blocks[layer].attn.out_proj.weight.view(12, 3, 4)
            norms = torch.zeros(3)
            for q in range(prompt - 1, 10):  # the rows that predicted new tokens
                for head in range(3):
                    p = pattern[head, q, : q + 1].double()
                    entropy.append(float(-(p * p.log()).sum() / np.log(q + 1)))
                    distance.append(float((p * (q - torch.arange(q + 1))).sum()))
                    norms[head] += (out[:, head] @ z[q, head]).norm()
            dominance.append(float(norms.max() / norms.sum()))
        assert float(found["entropy"][sample]) == pytest.approx(np.mean(entropy), rel=1e-4)
        assert float(found["distance"][sample]) == pytest.approx(np.mean(distance), rel=1e-4)
        assert float(found["dominance"][sample]) == pytest.approx(np.mean(dominance), rel=1e-4)


def test_scaled_scores_are_those_of_a_softmax_at_another_temperature(model, generator):
    tokens = torch.randint(13, (3, 7), generator=generator)
    first = "blocks.0.attn.hook_"
    _, cache = model.run_with_cache(tokens)
    with model.hooks(measured._scaled(model, 0.5)):
        _, changed = model.run_with_cache(tokens, names_filter=f"{first}pattern")
    expected = (cache[f"{first}attn_scores"] / 2).softmax(-1)
    torch.testing.assert_close(changed[f"{first}pattern"], expected)


def test_a_head_knocked_out_adds_nothing_and_the_others_what_they_did(model, generator):
    tokens = torch.randint(13, (3, 7), generator=generator)
    name = "blocks.1.attn.hook_z"
    _, cache = model.run_with_cache(tokens)
    layers = ["blocks.0.attn", "blocks.1.attn"]
    with model.hooks(measured._without(layers, (1, 2))):
        _, changed = model.run_with_cache(tokens, names_filter=name)
    assert not changed[name][:, :, 2].any()
    assert torch.equal(changed[name][:, :, :2], cache[name][:, :, :2])


def test_quality_of_known_texts():
    texts = ["to be or not to be", "xx be qq not rr be", "aaaaaaaaaaaaaaaaaa"]
    tokenizer = CharTokenizer("".join(texts))
    written = torch.stack([tokenizer.encode("to " + text) for text in texts])
    found = measured.text_quality(
        written, prompt=3, tokenizer=tokenizer, words=frozenset({"to", "be", "or", "not"})
    )
    # whole words: be or not to; be qq not rr; none
    assert found["words"].tolist() == pytest.approx([1, 5 / 9, 0])
    assert found["repetition"][2] == 1
    assert float(found["diversity"][2]) == pytest.approx(1 / 17 / 16 / 15)
    torch.testing.assert_close(found["quality"], found["diversity"] * found["words"])
    assert set(found) == set(measured.QUALITIES)


def test_interventions_name_every_change_and_start_from_nothing_changed(model, generator):
    prompts = torch.randint(13, (4, 5), generator=generator)

    def judged(written):
        return {name: written[:, 5:].double().mean(1) for name in measured.QUALITIES}

    found = measured.interventions(model, prompts, 6, judged)
    assert list(found) == [
        "none", "scores x 2", "scores x 1.4", "scores x 0.7", "scores x 0.5", "dominant head",
        "other head",
    ]  # fmt: skip
    plain = judged(measured.write(model, prompts, 6, measured.USUAL, []))["words"]
    assert found["none"]["words"] == pytest.approx(float(plain.mean()), abs=1e-5)
    assert len({each["words"] for each in found.values()}) > 3


def test_snapshots_keep_the_patterns(model, tmp_path):
    tokens, rows = torch.randint(13, (1, 7)), []
    snap = logs.Snapshots(tokens, list("abcdefg"), frozenset({3}))
    for step in (2, 3):
        snap(logs.Moment(step=step, steps=5, model=model, loss=None,
                         write=lambda name, row: rows.append((name, row))))  # fmt: skip
    ((name, row),) = rows
    (tmp_path / f"{name}.jsonl").write_text(json.dumps(row) + "\n")
    entropies = {f"normalised_entropy/blocks.{i}/head.{h}": abs(h - i - 1)
                 for i in range(2) for h in range(3)}  # fmt: skip
    shown = logs._shown(tmp_path, entropies)["patterns"]
    assert shown["labels"] == ["layer 1, head 2", "layer 2, head 3"]
    with observing(model):
        _, cache = model.run_with_cache(tokens)
    weights = zlib.decompress(base64.b64decode(shown["weights"]))
    kept = np.frombuffer(weights, np.uint8).reshape(2, 7, 7) / 255
    for i in range(2):
        pattern = cache[f"blocks.{i}.attn.hook_pattern"][0, i + 1]
        np.testing.assert_allclose(kept[i], pattern, atol=1 / 255)


# Verdicts --------------------------------------------------------------------------------------

STEPS = list(range(0, 1550, 50))
LAYERS = [f"blocks.{i}" for i in range(6)]
NOISE = {}


@pytest.fixture(autouse=True)
def noise():
    """The same noise in each test, in whichever order they run."""
    NOISE["draw"] = np.random.default_rng(7)


def wiggle(size=0.002):
    return NOISE["draw"].normal(0, size, len(STEPS))


def made(seed, task=SHAKESPEARE, *, entropy=None, js=None, pairs=None, distance=None, loss=None,
         samples=None, interventions=None):  # fmt: skip
    """A run: series over STEPS; `pairs` maps a pair of layers to its similarity, by measure."""
    falling = np.linspace(1, 0.6, len(STEPS))
    entropy = falling + wiggle() if entropy is None else entropy
    js = falling + wiggle() if js is None else js
    distance = 30 * falling + wiggle() if distance is None else distance
    loss = 4 * falling + wiggle() if loss is None else loss
    columns = {"loss": list(loss)}
    for layer in LAYERS:
        columns |= {
            f"normalised_entropy/{layer}": list(entropy),
            f"normalised_entropy_without_first/{layer}": list(entropy),
            f"distance/{layer}": list(distance),
        }
    shuffled = {}
    for one, other in combinations(range(6), 2):
        name = f"{LAYERS[one]}-{LAYERS[other]}"
        for kind in ("js", "centred_cosine"):
            series = list(js)
            if pairs is not None:
                series[-1] = pairs[kind](one, other) + 0.001 * seed
            columns[f"{kind}/{name}"] = series
            shuffled[f"{kind}/{name}"] = 0.5
    return {
        "name": "tracked", "task": task, "seed": seed, "best_val_loss": float(loss[-1]),
        "looks": {"steps": STEPS, "columns": columns}, "shuffled": shuffled,
        "samples": samples or made_samples(seed), "interventions": interventions or effects(seed),
    }  # fmt: skip


def made_samples(seed, imbalance=0.0, dominance=0.0):
    """Samples whose quality depends on these two statistics as strongly as asked for."""
    rng = np.random.default_rng(seed)
    prompt, temperature = (list(c) for c in np.indices((3, 2)).reshape(2, -1).repeat(7, 1))
    n = len(prompt)
    entropy, strong = rng.normal(0.7, 0.1, n), rng.uniform(0.3, 0.6, n)
    groups = np.array(prompt) * 2 + np.array(temperature)
    means = np.array([entropy[groups == g].mean() for g in groups])
    quality = rng.normal(0, 0.02, n) + groups + imbalance * np.abs(entropy - means)
    quality = list(quality + dominance * strong)
    columns = dict.fromkeys(("diversity", "repetition", "coherence", "words", "quality"), quality)
    return {
        "prompt": prompt, "temperature": temperature, "entropy": list(entropy),
        "distance": list(rng.normal(20, 3, n)), "dominance": list(strong), **columns,
    }  # fmt: skip


def effects(seed, sharp=-0.1, flat=-0.1, dominant=0.1):
    found = {"none": 0.5, "scores x 2": 0.5 + sharp, "scores x 0.5": 0.5 + flat,
             "other head": 0.4, "dominant head": 0.4 + dominant}  # fmt: skip
    return {name: {"quality": value + 0.001 * (seed if name != "none" else 0)}
            for name, value in found.items()}  # fmt: skip


def verdict(number, runs, times=(), compared=()):
    (found,) = (v for v in judge(runs, times, compared) if v.claim.number == number)
    return found


def seeds(count=5, tasks=(SHAKESPEARE,), **series):
    """A world: each argument is a function of the seed."""
    return [made(seed, task, **{key: value(seed) for key, value in series.items()})
            for task in tasks for seed in range(count)]  # fmt: skip


FALLING = np.linspace(1, 0.6, len(STEPS))
RISING = np.concatenate([np.linspace(1, 0.5, 9), np.linspace(0.5, 0.7, len(STEPS) - 9)])


@pytest.mark.parametrize(
    ("entropy", "outcome"),
    [
        (lambda seed: FALLING + wiggle(), "supported"),
        (lambda seed: RISING + wiggle(), "refuted"),
        (lambda seed: (FALLING if seed % 2 else 1.6 - FALLING) + wiggle(), "undecided"),
    ],
)
def test_claim_24_asks_for_a_fall_after_the_uniform_start(entropy, outcome):
    assert verdict(24, seeds(entropy=entropy)).outcome == outcome


def step_at(place):
    return lambda seed: np.where(np.array(STEPS) >= place, 0.5, 0.9) + wiggle()


@pytest.mark.parametrize(
    ("js", "outcome"),
    [
        (step_at(600), "supported"),
        (step_at(200), "refuted"),
        (lambda seed: 0.5 + 0.4 * np.exp(-np.array(STEPS) / 300) + wiggle(), "refuted"),
        (step_at(450), "undecided"),
    ],
)
def test_claim_25_asks_when_and_whether(js, outcome):
    assert verdict(25, seeds(js=js)).outcome == outcome


def test_claim_25_is_about_every_data_set():
    """A sudden change in one of three, where the write-up says, is not enough."""
    smooth = 0.5 + 0.4 * np.exp(-np.array(STEPS) / 300)

    def world(place, sudden):
        return [
            made(seed, task, js=step_at(place)(seed) if task in sudden else smooth + wiggle())
            for task in (SHAKESPEARE, "enwik8", "text8")
            for seed in range(5)
        ]

    assert verdict(25, world(600, {SHAKESPEARE, "enwik8", "text8"})).outcome == "supported"
    assert verdict(25, world(600, {"text8"})).outcome == "undecided"
    assert verdict(25, world(200, {"text8"})).outcome == "undecided"
    assert verdict(25, world(200, {SHAKESPEARE, "enwik8", "text8"})).outcome == "refuted"


def alike(high, low, rest=0.5):
    def value(one, other):
        return high if one >= 3 else low if other <= 2 else rest

    return value


@pytest.mark.parametrize(
    ("js", "centred", "outcome"),
    [
        (alike(0.9, 0.8), alike(0.7, 0.6), "supported"),
        (alike(0.2, 0.8), alike(0.1, 0.6), "refuted"),
        (alike(0.9, 0.1), alike(0.7, 0.1), "refuted"),
        (alike(0.9, 0.8), alike(0.1, 0.6), "undecided"),
    ],
)
def test_claim_26_compares_groups_of_pairs(js, centred, outcome):
    pairs = {"js": js, "centred_cosine": centred}
    assert verdict(26, seeds(3, pairs=lambda seed: pairs)).outcome == outcome


def test_a_contrast_is_a_difference_of_means():
    pairs = {(i, j): 10.0 * i + j for i, j in combinations(range(6), 2)}
    inside = (34 + 35 + 45) / 3
    others = [v for p, v in pairs.items() if p not in ((3, 4), (3, 5), (4, 5))]
    assert contrast(pairs, "high") == pytest.approx(inside - sum(others) / 12)
    across = [10 * i + j for i in range(3) for j in range(3, 6)]
    assert contrast(pairs, "low") == pytest.approx((1 + 2 + 12) / 3 - sum(across) / 9)


def tied(count, linked):
    """Runs in which the metrics named follow the loss, and the others only the trend."""
    rng, found = np.random.default_rng(1), []
    for task in (SHAKESPEARE, "text8"):
        for seed in range(count):
            trend = np.exp(-np.array(STEPS) / 300)
            loss = trend + rng.normal(0, 0.03, len(STEPS))
            series = {
                name: loss if name in linked else trend + rng.normal(0, 0.03, len(STEPS))
                for name in ("js", "distance")
            }
            found.append(made(seed, task, loss=loss, **series))
    return found


@pytest.mark.parametrize(
    ("linked", "outcome"),
    [(("js", "distance"), "supported"), ((), "refuted"), (("js",), "undecided")],
)
def test_claim_27_takes_the_common_trend_out(linked, outcome):
    found = verdict(27, tied(12, linked))
    assert found.outcome == outcome
    plain = [f.estimate.mean for f in found.findings if "plain" in f.label]
    assert min(plain) > 0.9, "with the trend left in, anything correlates"


def pair(identical=True, difference=0.0, same_samples=True, seed=0):
    return {"identical": identical, "difference": difference, "same_samples": same_samples,
            "seed": seed}  # fmt: skip


@pytest.mark.parametrize(
    ("compared", "outcome"),
    [
        ([pair(), pair()], "refuted"),
        ([pair(False, -0.02 - 0.001 * seed, seed=seed) for seed in range(3)], "supported"),
        ([pair(False, -0.02, seed=0), pair(False, 0.02, seed=1)], "undecided"),
        ([pair(False, -0.02), pair(False, -0.021), pair(False, -0.019)], "undecided"),  # one seed
        ([], "undecided"),
    ],
)
def test_claim_28_reads_bytes(compared, outcome):
    assert verdict(28, seeds(2), compared=compared).outcome == outcome


def test_claim_28_counts_the_seeds_that_were_compared():
    compared = [pair(seed=seed) for seed in (0, 0, 0, 1)]
    found = verdict(28, seeds(5), compared=compared)
    assert found.n_seeds == 2
    assert found.findings[0].estimate.n == 2
    assert verdict(30, seeds(5), compared=compared).n_seeds == 5


def cost(share, speed=0.999, seed=0):
    return {"share": share, "share_as_run": 0.1, "tokens_per_second": 100.0,
            "tokens_per_second_tracked": 100 * speed, "seed": seed}  # fmt: skip


@pytest.mark.parametrize(
    ("shares", "compared", "outcome"),
    [
        ((0.010, 0.011), [pair()], "supported"),
        ((0.050, 0.051), [pair()], "refuted"),
        ((0.010, 0.011), [pair(same_samples=False)], "refuted"),
        ((0.010, 0.030), [pair()], "undecided"),
        ((), [pair()], "undecided"),
    ],
)
def test_claim_30_reads_costs_and_bytes(shares, compared, outcome):
    spent = [cost(share, seed=seed) for seed, share in enumerate(shares)]
    assert verdict(30, seeds(2), spent, compared).outcome == outcome


@pytest.mark.parametrize(("speed", "outcome"), [(0.999, "supported"), (0.5, "undecided")])
def test_claim_30_reads_the_speed_of_generation(speed, outcome):
    spent = [cost(0.01, speed + 0.0001 * seed, seed) for seed in range(3)]
    found = verdict(30, seeds(3), spent, [pair()])
    assert found.outcome == outcome
    assert f"Generation runs at {speed:.3f}" in found.because
    assert "nothing attached" not in found.because


def test_costs_of_one_seed_have_no_interval():
    spent = [cost(share) for share in (0.01, 0.011, 0.012)]
    for each in verdict(30, seeds(3), spent, [pair()]).findings:
        assert (each.estimate.n, each.estimate.high) == (1, float("inf"))


def test_an_update_is_timed_where_nothing_else_was_done(tmp_path):
    rows = [(0, None), (1, 9.0), (2, 0.01), (4, 0.03), (5, 7.0), (8, 5.0), (10, 0.02)]
    looks = [{"step": step, "look": 0.5, "updates": seconds} for step, seconds in rows]
    logged = {"tracking_seconds": looks, "writing": [{"step": 0}, {"step": 4}]}
    for name, each in {**logged, "evaluation": [{"step": 0}, {"step": 6}]}.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in each))
    (tmp_path / "times.json").write_text("{}")
    cell = cells(TINY)[0]
    found = times(cell, tmp_path)
    assert found["update"] == pytest.approx((0.01 + 0.03 + 0.02) / (1 + 2 + 2))
    assert found["share"] == pytest.approx(0.5 / (500 * found["update"]))
    (tmp_path / "evaluation.jsonl").write_text(
        "".join(json.dumps({"step": step}) + "\n" for step in range(11))
    )
    assert times(cell, tmp_path)["update"] == pytest.approx(21.06 / 10)  # nothing else is left


@pytest.mark.parametrize(
    ("samples", "changed", "outcome"),
    [
        ({"imbalance": -3, "dominance": -1}, {}, "supported"),
        ({"imbalance": 3, "dominance": 1}, {"dominant": -0.1}, "refuted"),
        ({"imbalance": -3, "dominance": -1}, {"sharp": 0.1, "dominant": -0.1}, "refuted"),
        ({"imbalance": -3, "dominance": 1}, {}, "undecided"),
    ],
)
def test_claim_29_wants_correlation_and_intervention(samples, changed, outcome):
    runs = seeds(
        6, samples=lambda seed: made_samples(seed, **samples),
        interventions=lambda seed: effects(seed, **changed),
    )  # fmt: skip
    assert verdict(29, runs).outcome == outcome


def test_half_a_claim_that_is_clear_but_faint_is_not_settled(monkeypatch):
    """The correlation is surely below 0 and surely above -0.1, and the interventions agree."""
    given = {"imbalance": Estimate(-0.05, -0.08, -0.02, 6), "dominance": Estimate(0.3, 0.2, 0.4, 6)}
    monkeypatch.setattr(
        samples_module, "correlation",
        lambda runs, statistic, quality: given.get(statistic, Estimate(0.0, -0.1, 0.1, 6)),
    )  # fmt: skip
    runs = seeds(6, interventions=lambda seed: effects(seed, dominant=-0.1))
    found = verdict(29, runs)
    assert found.outcome == "undecided"
    assert "goes with quality (diversity · known words) is not settled" in found.because
    assert "goes with poor samples does not hold" in found.because


def test_correlations_between_samples_are_within_prompt_and_temperature():
    """Quality follows the group alone: between groups it varies much, within not at all."""
    runs = seeds(6, samples=lambda seed: made_samples(seed))
    assert abs(correlation(runs, "entropy", "quality").mean) < 0.2
    assert correlation(runs, "entropy", "quality").n == 6


@pytest.mark.parametrize("number", [25, 27, 29])
def test_four_seeds_show_no_correlation_and_no_moment(number):
    found = verdict(number, seeds(4, js=step_at(600)))
    assert found.outcome == "undecided"
    assert found.because.startswith("4 seeds: fewer than 5")
    assert found.n_seeds == 4
