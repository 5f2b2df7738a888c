"""Rules of the whole smeared-keys study on made-up measures: each outcome only by its evidence."""

import copy

import pytest

from smearlens.experiments.smeared_keys import text_verdicts as on_text
from smearlens.experiments.smeared_keys import verdicts as on_repeats
from smearlens.experiments.smeared_keys.measures import norm_summary

PADDING = {
    "128": {
        "lines": 1483.0,
        "blank": 541.0,
        "pad_fraction": 0.62,
        "constant": 0.62,
        "unigram": 0.04,
    }
}
SEEDS = (0, 1, 2)


def run(task, name, seed, **measures):
    return {"task": task, "name": name, "seed": seed, "n_parameters": 1000, **measures}


def made(task, name, make):
    """Three runs of a variant, from a function of the seed to measures."""
    return [run(task, name, seed, **make(seed)) for seed in SEEDS]


def edited(runs, edit, *, task=None, name=None):
    runs = copy.deepcopy(runs)
    for m in runs:
        if task in (None, m["task"]) and name in (None, m["name"]):
            edit(m)
    return runs


# Claim 2 ---------------------------------------------------------------------------------------


def early(real, counted):
    def make(seed):
        row = {"accuracy": real + 0.01 * seed, "accuracy_with_pads": counted + 0.01 * seed}
        return {"steps": 150, **row}

    return make


def padded(real=0.1, counted=0.7):
    return [
        *made("pads counted, no mask", "conv k=3, same padding, bare", early(real, counted)),
        *made("pads counted, no mask", "two layers, bare", early(real, counted)),
        *made("wikitext", "four layers, bare", early(0.1, 0.05)),
    ]


@pytest.mark.parametrize(
    ("real", "counted", "outcome"),
    [(0.1, 0.7, "refuted"), (0.7, 0.8, "supported"), (0.5, 0.7, "undecided")],
)
def test_start_accuracy(real, counted, outcome):
    verdict = on_text.start_accuracy(padded(real, counted), PADDING)
    assert verdict.outcome == outcome


def test_start_accuracy_says_of_which_lines():
    said = on_text.start_accuracy(padded(), PADDING).because
    assert "Of the targets of 1,483 held-out lines of WikiText-2 (541 of them blank)" in said


def test_start_accuracy_needs_lines_that_are_mostly_padding():
    few = {"128": {**PADDING["128"], "constant": 0.2}}
    assert on_text.start_accuracy(padded(), few).outcome == "undecided"
    verdict = on_text.start_accuracy([], {})
    assert (verdict.outcome, verdict.findings) == ("undecided", ())


def test_start_accuracy_needs_padding_to_raise_both_models():
    def spare(m):
        m["accuracy_with_pads"] = m["accuracy"]

    one = edited(padded(), spare, name="two layers, bare")
    assert on_text.start_accuracy(one, PADDING).outcome == "undecided"


# Claim 3 ---------------------------------------------------------------------------------------


def looking(later, last):
    def make(seed):
        weights = {
            "later keys": later, "pads": 0.5, "share of pads among keys": 0.6,
            "last token of the line, highest": last, "last position, highest": 0.02,
            "strongest column": 0.2, "strongest column is a pad": 0.5,
        }  # fmt: skip
        return {"stripes": {"pads seen": weights, "pads hidden": weights}}

    return make


def masks(later_open=0.7, later_masked=0.0, last_masked=0.0):
    return [
        *made("pads counted, no mask", "conv k=3, same padding, bare", looking(later_open, 0.1)),
        *made("pads counted, no mask", "two layers, bare", looking(later_open, 0.1)),
        *made("pads counted", "conv k=3, bare", looking(later_masked, last_masked)),
        *made("pads counted", "two layers, bare", looking(later_masked, last_masked)),
    ]


def test_two_models_of_a_seed_are_one_piece_of_evidence():
    findings = on_text.last_token(masks()).findings
    assert {f.estimate.n for f in findings} == {3}
    single = on_text.last_token([m for m in masks() if m["seed"] == 1])
    kernel = on_repeats.kernel_range([m for m in kernels() if m["seed"] == 1])
    for found in (*single.findings, *kernel.findings):
        assert found.estimate.high == float("inf"), found.label


def test_last_token():
    assert on_text.last_token(masks()).outcome == "refuted"
    assert "dominates no head" in on_text.last_token(masks()).because
    assert on_text.last_token(masks(later_open=0.0)).outcome == "undecided"
    assert on_text.last_token(masks(later_masked=0.2)).outcome == "undecided"
    assert on_text.last_token(masks(later_masked=0.9, last_masked=0.8)).outcome == "supported"
    assert on_text.last_token([]).outcome == "undecided"


# Claim 4 ---------------------------------------------------------------------------------------


def layer(score, effect):
    return {
        "induction": {"score": score, "control": 0.04},
        "duplicate_token": {"score": 0.1},
        "prev_token": {"score": 0.6},
        "without_induction": {"effect": effect},
        "without_prev_token": {"effect": -0.8},
    }


def stacks(first=0.05, first_effect=-0.01, second=0.5, accuracy=0.95, one=0.2):
    def make(seed):
        layers = [layer(first + 0.001 * seed, first_effect), layer(second + 0.001 * seed, -0.3)]
        return {"accuracy": accuracy, "layers": layers}

    alone = made("repeats", "attention only", lambda seed: {"accuracy": one + 0.001 * seed})
    return [*made("repeats", "two layers", make), *alone]


@pytest.mark.parametrize(
    ("change", "outcome"),
    [
        ({}, "refuted"),
        ({"first": 0.5, "first_effect": -0.6}, "supported"),
        ({"first_effect": -0.6}, "refuted"),  # needed, but for something else
        ({"first": 0.5}, "undecided"),  # a pattern that nothing depends on
        ({"accuracy": 0.3}, "undecided"),  # nobody learned the task
        ({"second": 0.05}, "undecided"),  # no layer scores
        ({"one": 0.99}, "undecided"),  # one layer alone does it, without any diagonal
    ],
)
def test_first_layer(change, outcome):
    assert on_repeats.first_layer(stacks(**change)).outcome == outcome


# Claim 5 ---------------------------------------------------------------------------------------


def kernels(largest=1.4, without_k=0.1):
    def make(seed):
        kernel = {
            "bound": 0.5, "start_largest": 0.49, "largest": largest + 0.01 * seed, "lags": [0, 1],
            "start_rms": [0.3, 0.3], "rms": [0.4, 0.7], "moved_in_all": 1.2,
        }  # fmt: skip
        lags = {"k": {"accuracy": without_k}}
        return {"kernel": kernel, "accuracy": 0.99, "smearing": {"without_lags": lags}}

    return [m for name in ("conv k=3", "conv k=5") for m in made("repeats", name, make)]


def test_kernel_range():
    assert on_repeats.kernel_range(kernels()).outcome == "refuted"
    assert on_repeats.kernel_range(kernels(largest=0.45)).outcome == "supported"
    assert on_repeats.kernel_range(kernels(largest=0.55)).outcome == "undecided"
    assert on_repeats.kernel_range(kernels(without_k=0.9)).outcome == "undecided"


# Claim 7 ---------------------------------------------------------------------------------------


def ahead(intact=0.05, removed=3.0, passed=False):
    def make(seed):
        losses = (intact, intact + 0.1, removed - 0.1, removed)
        return {
            "audit": {"passed": passed, "influence": 5.0},
            "kernel": {"lags": [-2, -1, 0, 1, 2], "signed_mean": [-0.1 + 0.1 * seed] * 5},
            "future_taps": [
                {"removed": list(lags), "loss": loss + 0.01 * seed}
                for lags, loss in zip(on_repeats.AHEAD, losses, strict=True)
            ],
        }

    padded_runs = [
        m for task in ("text", "repeats") for m in made(task, "conv k=5, same padding", make)
    ]
    return [*padded_runs, *made("text", "conv k=5", lambda seed: {"val_loss": 2.0 + 0.01 * seed})]


def test_future_tap():
    assert on_repeats.future_tap(ahead()).outcome == "refuted"
    assert "negative in 1 of 3 runs" in on_repeats.future_tap(ahead()).because
    assert on_repeats.future_tap(ahead(removed=0.3)).outcome == "undecided"
    assert on_repeats.future_tap(ahead(removed=0.05)).outcome == "undecided"
    assert on_repeats.future_tap(ahead(passed=True)).outcome == "supported"


# Claim 8 ---------------------------------------------------------------------------------------


def works(accuracy, score=0.6, **offsets):
    best = {"score": score, "control": 0.1, "chance": 0.04}
    lags = {r: {"accuracy": a} for r, a in (("q", 0.9), ("k", 0.1), ("v", accuracy))}
    places = {"one": 0.4, "two": 0.1, **offsets}
    return lambda seed: {
        "accuracy": accuracy + 0.001 * seed,
        "scores": {"induction": {"best": best}},
        "smearing": {"without_lags": lags},
        "offsets": {
            "1": {"score": places["one"]}, "2": {"score": places["two"] + 0.3 * (seed == 2)},
        },
    }  # fmt: skip


def striped(own, bare=0.97, **offsets):
    """Stacks with skip connections that support claim 8, and the write-up's own, kernel 5 bare."""
    return [
        m
        for end in ("", ", bare")
        for name, make in (
            (f"attention only{end}", works(0.1)),
            (f"two layers{end}", works(0.95)),
            (f"conv k=3{end}", works(bare, **offsets)),
        )
        for m in made("repeats", name, make)
    ] + made("repeats", "conv k=5, bare", own)


def test_claim_8_is_about_the_stack_of_the_writeup():
    assert on_repeats.stripe(striped(works(0.97))).outcome == "supported"
    failing = on_repeats.stripe(striped(works(0.4, score=0.03)))
    assert failing.outcome == "undecided"
    assert "With skip connections, which the write-ups' models do not have" in failing.because
    assert "conv k=5, bare: accuracy 0.40, induction score 0.03 one token after" in failing.because
    assert any(f.label == "conv k=5, bare: accuracy" for f in failing.findings)
    worse = on_repeats.stripe(striped(works(0.1)))  # two bare layers learn it
    assert worse.outcome == "undecided"
    without_skips = on_repeats.stripe(striped(works(0.97), bare=0.1))
    assert without_skips.outcome == "refuted"


def test_the_place_of_the_stripe_in_bare_stacks_is_told():
    said = on_repeats.stripe(striped(works(0.97), one=0.35)).because
    assert "of the places +1 to +2 most weight lies at +1 in 2, +2 in 1 of 3 runs" in said


# Claim 10 --------------------------------------------------------------------------------------


def pairs(gap):
    """`gap` from a pair of `PAIRS` to what the convolution has less than the stack."""
    found = []
    for pair in on_text.PAIRS:
        task, conv, stack, key = pair
        for name, less in ((conv, gap(pair)), (stack, 0.0)):

            def make(seed, less=less, key=key):
                loss = 2.0 - less + 0.01 * seed
                losses = ((0, 4.0), (5, loss + 0.5), (10, loss))
                curve = [{"step": step, "loss": value} for step, value in losses]
                return {key: loss, "curve": curve}

            found += made(task, name, make)
    return found


def test_converges_faster():
    assert on_text.converges_faster(pairs(lambda pair: 0.3)).outcome == "supported"
    assert on_text.converges_faster(pairs(lambda pair: -0.3)).outcome == "refuted"
    assert on_text.converges_faster(pairs(lambda pair: 0.0)).outcome == "undecided"
    mixed = on_text.converges_faster(pairs(lambda pair: 0.3 if "bare" in pair[1] else -0.3))
    assert mixed.outcome == "undecided"
    assert "ahead in 3 and behind in 3 of 6 pairs" in mixed.because
    assert "conv k=5, with 0.0 % fewer parameters, minus four layers +0.30" in mixed.because
    one_text = [m for m in pairs(lambda pair: 0.3) if m["task"] == "text"]
    assert len(on_text.converges_faster(one_text).findings) == 8


def test_a_lead_at_the_end_alone_is_no_faster_convergence():
    def level(m):
        m["curve"][1]["loss"] = 2.5

    assert on_text.converges_faster(edited(pairs(lambda p: 0.3), level)).outcome == "undecided"


# Claim 12 --------------------------------------------------------------------------------------


def norms(jump, gain):
    """Runs whose kernel jumps so much, and whose loss clipping lowers by `gain`."""
    found = []
    for word, loss in (("not clipped", 2.0), ("clipped", 2.0 - gain)):

        def make(seed, loss=loss):
            parameters = {on_text.CONV: {"jump": jump + 0.1 * seed}, "embed": {"jump": 2.0}}
            return {"val_loss": loss + 0.01 * seed, "gradient_norms": {"parameters": parameters}}

        found += made("norms", f"conv k=5, bare, lr 0.01, {word}", make)
    return found


def test_gradients_explode():
    assert on_text.gradients_explode(norms(40.0, 0.3)).outcome == "supported"
    assert on_text.gradients_explode(norms(40.0, -0.3)).outcome == "undecided"
    refuted = on_text.gradients_explode(norms(3.0, 0.3))
    assert refuted.outcome == "refuted"
    assert "by 0.3000 nats at most" in refuted.because
    assert on_text.gradients_explode(norms(9.9, 0.0)).outcome == "undecided"


def test_a_jump_is_measured_against_the_updates_before_it_and_not_against_a_trend():
    falling = [{"step": i, "w": 100 * 0.9**i} for i in range(60)]
    assert norm_summary(falling)["parameters"]["w"]["jump"] < 1
    spike = [{"step": i, "w": 12.0 if i == 41 else 2.0} for i in range(60)]
    found = norm_summary(spike, every=20)["parameters"]["w"]
    assert (found["jump"], found["at"], found["largest"], found["median"]) == (6.0, 41, 12.0, 2.0)
    assert found["trace"] == [2.0, 2.0, 2.0]
