"""How does Mamba do induction: through its short convolution, or through its state?

One-layer models with kernels of 1 to 4 taps (1 smears nothing), a two-layer model without smearing,
and the discretisations, all on repeats of varied period. In the trained models each role of the
state-space layer loses what the convolution's lags gave it, or gets it from another example: B is
the key under which u is written, C the key that is asked for. Leaves out the measuring
(`mamba_measures`), the report (`mamba_report`), and language (`experiments.smeared_keys.short` has
some).

Source:
    the claim is that of Arora et al. 2025 (2505.15105): Mamba does induction through the short
    convolution
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from smearlens.analysis.stats import Estimate, over_seeds, paired_over_seeds
from smearlens.data.batches import RepeatBatches
from smearlens.experiments import measures
from smearlens.experiments.claims import Claim, Finding, Outcome, Verdict, claim
from smearlens.experiments.grid import Cell, Task, run_grid
from smearlens.experiments.state_space.mamba_measures import measure
from smearlens.experiments.study import check_counts, open_study, write_result
from smearlens.models.mamba import MambaConfig
from smearlens.training.config import TrainConfig

PERIODS, LENGTH, D_VOCAB = (4, 12), 32, 32  # of the repeats: tokens
RULES = ("mamba", "zoh", "bilinear", "bilinear-clamped")
LEARNED = 0.5  # accuracy below which a model says nothing about how it is done
CLEARLY = 0.3  # of accuracy: what removing a role's lags must cost to count
EQUAL = 0.1  # of accuracy: models closer than this do equally well
WORTH = 0.02  # of accuracy: a smaller advantage is none

CLAIM = Claim(
    0,
    "Mamba does induction through its short convolution, not through its state",
    "Arora et al. 2025",
    "a state-space layer can itself carry the previous token",
    "kernel sizes 1 to 4; lags removed from u, B, C and Δ one at a time, and exchanged between "
    "examples; two layers without any",
)
RECIPE = (
    "Repeats of period 4 to 12 in 32 tokens of 32 kinds. AdamW (betas 0.9 and 0.95, weight decay "
    "0.01 on matrices), 200 updates of warm-up, cosine to 10 %, gradient norm clipped at 1, "
    "batches of 32; the same for every model, but two layers have a lower rate and more updates. "
)


@dataclass(frozen=True, kw_only=True)
class MambaInductionConfig:
    """Sizes of the study of induction in Mamba."""

    seeds: int = 6  # independent runs of every model
    steps: int = 1000  # updates per model
    d_model: int = 48  # width
    d_state: int = 16  # states per channel
    lr: float = 1e-2  # highest learning rate
    deep_steps: int = 2000  # updates of the two-layer model
    deep_lr: float = 5e-3  # its highest learning rate

    def __post_init__(self):
        check_counts(self, "seeds", "steps", "deep_steps", "d_model", "d_state")

    def quick(self) -> MambaInductionConfig:
        """The same in two minutes: enough to see it work, too short to learn the task."""
        return replace(self, seeds=2, steps=100, deep_steps=100)


def cells(config: MambaInductionConfig) -> list[Cell]:
    """The grid, seed by seed: kernel sizes and discretisations; then two layers without lags."""
    size: dict[str, Any] = {
        "d_vocab": D_VOCAB, "d_model": config.d_model, "d_state": config.d_state, "n_ctx": LENGTH,
    }  # fmt: skip
    one = partial(MambaConfig, **size, n_layers=1)
    variants = {
        **{f"kernel {k}": one(kernel_size=k) for k in (1, 2, 3, 4)},
        **{f"kernel 4, {rule}": one(kernel_size=4, rule=rule) for rule in RULES[1:]},
    }
    seeds = range(config.seeds)
    grid = [(name, model, seed) for seed in seeds for name, model in variants.items()]
    deep = MambaConfig(**size, n_layers=2, kernel_size=1)
    grid += [("2 layers, kernel 1", deep, seed) for seed in seeds]
    return [
        Cell(
            name=name, task="repeats", seed=seed, model="Mamba", config=model,
            train=_recipe(config, seed, deep=model.n_layers > 1),
        )
        for name, model, seed in grid
    ]  # fmt: skip


def _recipe(config: MambaInductionConfig, seed: int, *, deep: bool) -> TrainConfig:
    steps = config.deep_steps if deep else config.steps
    return TrainConfig(
        steps=steps,
        lr=config.deep_lr if deep else config.lr,
        warmup=min(200, steps // 4),
        betas=(0.9, 0.95),
        seed=seed,
        checkpoint_every=max(1, steps // 2),
        eval_every=max(1, steps // 20),
    )


def tasks(config: MambaInductionConfig) -> dict[str, Task]:
    """Repeats of varied period."""
    tokens = measures.evaluation_tokens(PERIODS, LENGTH, D_VOCAB, batch=128)
    return {
        "repeats": Task(
            lambda seed: RepeatBatches(32, PERIODS, LENGTH, D_VOCAB, seed),
            measures.repeats_curve(tokens),
            partial(measure, tokens=tokens),
        )
    }


def run(
    config: MambaInductionConfig, out: Path, *, jobs: int = 1, command: str = ""
) -> dict[str, Any]:
    """Train, measure, judge and report into `out`; repeating the call continues where it stopped.

    Raises:
        ValueError: if `out` holds a study with another configuration
    """
    from smearlens.experiments.state_space.mamba_report import write_induction_report

    open_study(out, config)
    found = run_grid(cells(config), partial(tasks, config), out, jobs=jobs)
    study = write_result(
        out, study="induction in Mamba", command=command, config=config, recipe=RECIPE,
        verdicts=judge(found), measures=found, cells=cells(config),
    )  # fmt: skip
    write_induction_report(study, out)
    return study


# Verdicts --------------------------------------------------------------------------------------


def judge(found: list[dict[str, Any]]) -> list[Verdict]:
    """The verdicts, by rules that read intervals over seeds."""
    return [judge_convolution(found), judge_bilinear(found)]


def judge_convolution(found: list[dict[str, Any]]) -> Verdict:
    """Supported if one layer needs a tap of lag 1, in B alone, and two layers cannot do without.

    Refuted if a model that smears nothing learns it and does as well as kernel 4.
    """
    rows = [(f"accuracy, {name}", _of(found, name)) for name in (
        "kernel 1", "kernel 2", "kernel 3", "kernel 4", "2 layers, kernel 1")]  # fmt: skip
    rows += [
        (f"kernel 4, without the lags of {role}", _of(found, "kernel 4", "without_lags", key))
        for key, role in (
            ("B", "B (the key)"), ("u", "u (the value)"), ("C", "C (the question)"), ("delta", "Δ")
        )
    ]  # fmt: skip
    rows += [
        (f"kernel 4, B's lags exchanged: answers as {whose} example",
         _of(found, "kernel 4", "exchanged_lags", "B", key))
        for key, whose in (("other", "the other"), ("own", "its own"))
    ]  # fmt: skip
    findings = tuple(Finding(label, over_seeds(v), causal=True) for label, v in rows)
    none, _, _, four, deep, on_b, *_, follows, stays = (f.estimate for f in findings)
    lag = four.low > max(none.high, LEARNED)
    keys = on_b.high < four.low - CLEARLY
    moved = follows.low > stays.high
    needed = lag and keys and moved
    outcome: Outcome = "undecided"
    if max(none.low, deep.low) > max(four.high - EQUAL, LEARNED):
        outcome = "refuted"
    elif needed and deep.high < four.low - EQUAL:
        outcome = "supported"
    because = " ".join((
        _one_layer_text(lag, none, four), _keys_text(keys, moved, on_b, follows, stays),
        _two_layers_text(outcome, none, deep, four),
    ))  # fmt: skip
    return Verdict(CLAIM, outcome, because, findings, n_seeds=four.n)


def _one_layer_text(lag: bool, none: Estimate, four: Estimate) -> str:
    reached = (
        f"One layer without smearing reaches {none.mean:.2f}, one with four taps {four.mean:.2f}"
    )
    return reached + ("." if lag else ": not told apart beyond the seeds' noise.")


def _keys_text(keys: bool, moved: bool, on_b: Estimate, follows: Estimate, stays: Estimate) -> str:
    text = (
        f"Without the previous token in B, the key under which a token is written, {on_b.mean:.2f}"
    )
    text += " is left. " if keys else " is left, too close to tell. "
    exchanged = (
        f"With the previous tokens of another example in B it answers by that example's order in "
        f"{follows.mean:.2f} and by its own in {stays.mean:.2f} of the cases"
    )
    return text + exchanged + ("." if moved else ": not told apart beyond the seeds' noise.")


def _two_layers_text(outcome: Outcome, none: Estimate, deep: Estimate, four: Estimate) -> str:
    two = f"Two layers without any convolution reach {deep.mean:.2f}"
    if outcome == "supported":
        return f"{two}: at this size and budget depth is no way around it."
    if outcome == "refuted" and none.low > four.high - EQUAL:
        return "One layer that smears nothing does as well."
    if outcome == "refuted":
        return (
            f"{two}: the state of the first layer can carry the previous token as well. The "
            "convolution is the way of one layer, not of Mamba."
        )
    return f"{two} against {four.mean:.2f}: whether as good is not decided by these seeds."


def judge_bilinear(found: list[dict[str, Any]]) -> Verdict:
    """Supported if bilinear beats both exponential rules in paired seeds, refuted if not by 0.02.

    Undecided unless all three learn it in each seed. It says nothing about the write-up's own task.
    """
    accuracy = {
        rule: _of(found, "kernel 4" if rule == "mamba" else f"kernel 4, {rule}") for rule in RULES
    }
    pairs = [("bilinear", "zoh"), ("bilinear", "mamba"), ("bilinear", "bilinear-clamped")]
    differences = [paired_over_seeds(accuracy[a], accuracy[b]) for a, b in pairs]
    findings = [
        Finding(f"accuracy on repeats, {a} minus {b}", difference, causal=True)
        for (a, b), difference in zip(pairs, differences, strict=True)
    ]
    share = over_seeds(_of(found, "kernel 4, bilinear", "negative_decays"))
    findings.append(Finding("share of negative Ā under bilinear", share, causal=False))
    to_zoh, to_mamba, to_clamped = differences
    outcome: Outcome = "undecided"
    learned = min(min(accuracy[rule]) for rule in RULES[:3]) > LEARNED
    if learned and min(to_zoh.low, to_mamba.low) > 0:
        outcome = "supported"
    elif learned and min(to_zoh.high, to_mamba.high) < WORTH:
        outcome = "refuted"
    because = (
        "On induction in repeats, with everything else equal, bilinear "
        + {
            "supported": "is ahead of both exponential rules with every interval above 0.",
            "refuted": f"is not ahead of both exponential rules by as much as {WORTH}.",
            "undecided": "and the exponential rules are not told apart by these seeds.",
        }[outcome]
        + f" {share.mean:.1%} of its decays are negative; without them the accuracy changes by "
        f"{-to_clamped.mean:+.3f}."
    )
    return Verdict(claim(17), outcome, because, tuple(findings), n_seeds=share.n)


def _of(found: list[dict[str, Any]], name: str, *keys: str) -> list[float]:
    """One number per seed of a variant; its accuracy if no key is given."""
    values = []
    for run in sorted((m for m in found if m["name"] == name), key=lambda m: m["seed"]):
        value: Any = run
        for key in keys or ("accuracy",):
            value = value[key]
        values.append(value)
    return values
