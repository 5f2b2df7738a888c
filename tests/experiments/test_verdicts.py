"""Verdict rules on made-up measures: each outcome must be reachable, and only by its evidence."""

import copy

import pytest

from smearlens.experiments.claims import CLAIMS, WRITEUPS, claim
from smearlens.experiments.rules import half_way, per_seed
from smearlens.experiments.smeared_keys.short_verdicts import judge


def run(task, name, seed, **measures):
    return {"task": task, "name": name, "seed": seed, "n_parameters": 1000, **measures}


def repeats(name, seed, accuracy, score, control=0.05, *, k=0.1, v=None, signed=0.01, leak=False):
    """One run on repeats; `k` and `v` are the accuracies without those lags."""
    kernel = {
        "records": [
            {"lag": 0, "rms": 0.5, "signed_mean": 0.2, "low": 0.4, "high": 0.6},
            {"lag": 1, "rms": 0.7, "signed_mean": signed, "low": 0.6, "high": 0.8},
        ],
        "null_signed": 0.09,
    }
    without = {"q": 0.9, "k": k, "v": accuracy if v is None else v, "qkv": 0.05}
    return run(
        "repeats", name, seed,
        accuracy=accuracy + 0.001 * seed,
        scores={"induction": {"best": {"score": score + 0.001 * seed, "control": control,
                                       "chance": 0.04}}},
        smearing={"kernel": kernel,
                  "without_lags": {r: {"accuracy": a} for r, a in without.items()}},
        audit={"passed": not leak, "findings": ["reads the future: x"] if leak else [],
               "first_leak": "blocks.0.conv.hook_out", "influence": 7.0 if leak else 0.0,
               "iid_floor": 4.16, "iid_trained_loss": 0.01 if leak else 4.16},
    )  # fmt: skip


def text(name, seed, loss):
    loss += 0.01 * seed
    curve = [{"step": step, "loss": loss + more} for step, more in ((0, 2), (5, 0.2), (10, 0))]
    return run("text", name, seed, val_loss=loss, curve=curve)


def world(**changes):
    """Measures of the usual outcome: the convolution works, through the keys; padding leaks."""
    runs = []
    for seed in range(3):
        runs += [
            repeats("attention only", seed, 0.13, 0.06),
            repeats("conv k=3", seed, 0.99, 0.6, signed=0.01 * seed),
            repeats("conv k=5", seed, 0.99, 0.6, signed=0.2),
            repeats("two layers", seed, 0.98, 0.5),
            repeats("conv k=3, same padding", seed, 0.99, 0.06, leak=True),
            text("conv k=3", seed, 2.0),
            text("conv k=3, same padding", seed, 0.05),
            text("two layers", seed, 2.2),
        ]
    runs = copy.deepcopy(runs)
    for (task, name), edit in changes.get("edits", {}).items():
        for each in runs:
            if (each["task"], each["name"]) == (task, name):
                edit(each)
    return runs


def outcomes(runs):
    return {verdict.claim.number: verdict.outcome for verdict in judge(runs)}


def test_the_usual_outcome():
    assert outcomes(world()) == {
        1: "refuted", 6: "refuted", 8: "supported", 9: "refuted", 10: "supported",
    }  # fmt: skip


def set_(*path):
    *keys, last, value = path

    def edit(each):
        for key in keys:
            each = each[key]
        each[last] = value

    return edit


@pytest.mark.parametrize(
    ("number", "outcome", "edits"),
    [
        # without a leak the first claim stands
        (1, "supported", {("repeats", "conv k=3, same padding"): set_(
            "audit", {"passed": True, "findings": [], "first_leak": None, "influence": 0.0,
                      "iid_floor": 4.16, "iid_trained_loss": 4.16})}),
        # a leak that costs nothing when repaired explains nothing
        (1, "undecided", {("text", "conv k=3"): lambda m: m.update(val_loss=0.05)}),
        # the average kernel shows lag 1 in every run that depends on it
        (6, "supported", {("repeats", "conv k=3"): lambda m: m["smearing"]["kernel"]["records"][
            1].update(signed_mean=-0.3),
            ("repeats", "conv k=5"): lambda m: m["smearing"]["kernel"]["records"][1].update(
                signed_mean=0.3)}),
        # no dependence on the keys' lags: nothing to confirm
        (6, "undecided", {("repeats", "conv k=3"): set_(
            "smearing", "without_lags", "k", "accuracy", 0.95)}),
        # the values carry it: not key smearing
        (8, "undecided", {("repeats", "conv k=3"): set_(
            "smearing", "without_lags", "v", "accuracy", 0.3)}),
        # a positional head: as high on another example's tokens
        (8, "undecided", {("repeats", "conv k=3"): set_(
            "scores", "induction", "best", "control", 0.7)}),
        # two layers learn it, the convolution does not
        (8, "refuted", {("repeats", "conv k=3"): lambda m: m.update(accuracy=0.1)}),
        (9, "supported", {("repeats", "conv k=3"): lambda m: (
            m.update(accuracy=0.5), m["scores"]["induction"]["best"].update(score=0.1))}),
        (9, "undecided", {("repeats", "conv k=3"): lambda m: m.update(accuracy=0.92)}),
        (10, "refuted", {("text", "two layers"): lambda m: m.update(val_loss=1.5)}),
        (10, "undecided", {("text", "two layers"): lambda m: m.update(
            val_loss=2.0 + (m["seed"] - 1) * 0.3)}),
        # lower on average, but within the noise of the seeds
        (10, "undecided", {("text", "two layers"): lambda m: m.update(
            val_loss=2.1 + (m["seed"] - 1) * 0.3)}),
        # lower at the end only: not faster
        (10, "undecided", {("text", "two layers"): lambda m: m["curve"][1].update(loss=2.0)}),
    ],
)  # fmt: skip
def test_each_outcome_needs_its_evidence(number, outcome, edits):
    assert outcomes(world(edits=edits))[number] == outcome


def test_one_seed_proves_nothing():
    single = [m for m in world() if m["seed"] == 0]
    assert set(outcomes(single).values()) == {"undecided"}


def test_one_seed_has_no_interval_in_any_finding():
    """Also where several models of a seed are read together: they are no more than one."""
    for verdict in judge([m for m in world() if m["seed"] == 0]):
        for found in verdict.findings:
            assert (found.estimate.n, found.estimate.high) == (1, float("inf")), found.label


def test_runs_of_a_seed_are_averaged_whatever_their_order():
    runs = [{"seed": seed} for seed in (2, 0, 2, 2, 0)]
    assert per_seed(runs, [1.0, 10.0, 2.0, 6.0, 30.0]) == [20.0, 3.0]


@pytest.mark.parametrize(
    ("steps", "half"),
    [
        ((0, 80, 160, 240, 320, 400), 160),  # 160 and 240 are equally near: the earlier
        ((0, 30, 60, 90, 120, 150), 60),
        ((0, 71, 142, 213, 284, 355, 426, 497, 500), 284),  # nearest 250: 213 is 37 off, 284 is 34
        ((0, 100, 200), 100),
    ],
)
def test_half_way_is_half_of_the_updates(steps, half):
    curve = [{"step": step, "loss": float(step)} for step in steps]
    assert half_way([{"curve": curve}]) == [half]


def test_the_short_study_speaks_of_models_with_skip_connections():
    (verdict,) = (v for v in judge(world()) if v.claim.number == 8)
    assert verdict.because.startswith("With skip connections, which the write-ups' models do not")


def test_a_stripe_with_same_padding_is_not_said_to_be_gone():
    def said(runs):
        (verdict,) = (v for v in judge(runs) if v.claim.number == 9)
        assert verdict.outcome == "refuted"
        return verdict.because

    assert "the stripe is gone" in said(world())
    edit = set_("scores", "induction", "best", "score", 0.93)
    there = said(world(edits={("repeats", "conv k=3, same padding"): edit}))
    assert "gone: " not in there
    assert there.endswith("With 'same' padding the stripe is not surely gone.")


def test_every_verdict_has_a_causal_number_and_counts_its_seeds():
    for verdict in judge(world()):
        assert any(f.causal for f in verdict.findings)
        assert verdict.n_seeds == 3
        assert verdict.to_dict()["claim"]["number"] == verdict.claim.number


def test_the_registry_is_complete_and_finds_its_claims():
    numbers = [c.number for c in CLAIMS]
    assert numbers == sorted(set(numbers))
    assert all(c.source in WRITEUPS and c.test and c.suspicion for c in CLAIMS)
    assert claim(8).number == 8
    with pytest.raises(ValueError, match="no claim 99; registered: "):
        claim(99)


def test_missing_runs_are_named():
    with pytest.raises(ValueError, match=r"no run of 'conv k=3' on 'text'"):
        judge([m for m in world() if (m["task"], m["name"]) != ("text", "conv k=3")])
