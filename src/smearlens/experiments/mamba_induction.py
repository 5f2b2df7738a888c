"""How does Mamba do induction: through its short convolution, or through its state?

One-layer models with kernels of 1 to 4 taps (1 smears nothing), a two-layer model without smearing,
and the three discretisations, all on repeats of varied period. In the trained models each role of
the state-space layer loses what the convolution's lags gave it: B is the key under which u is
written, C the key that is asked for. Leaves out language (`experiments.smeared_keys` has some).

Source:
    the claim is that of Arora et al. 2025 (2505.15105): Mamba does induction through the short
    convolution
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from smearlens._files import write_atomically
from smearlens.analysis.stats import over_seeds
from smearlens.causal.lags import role_without_lags
from smearlens.experiments import measures
from smearlens.experiments.claims import Claim, Finding, Outcome, Verdict
from smearlens.experiments.grid import Cell, Task, run_grid
from smearlens.experiments.smeared_keys import D_VOCAB, LENGTH, PERIODS, source
from smearlens.models.base import HookedModel
from smearlens.models.mamba import MambaConfig
from smearlens.training.config import TrainConfig

ROLES = (("u",), ("B",), ("C",), ("delta",), ("u", "B", "C", "delta"))

CLAIM = Claim(
    0,
    "Mamba does induction through its short convolution, not through its state",
    "Arora et al. 2025",
    "a state-space layer can itself carry the previous token",
    "kernel sizes 1 to 4; lags removed from u, B, C and Δ one at a time; two layers without any",
)


@dataclass(frozen=True, kw_only=True)
class MambaInductionConfig:
    """Sizes of the study of induction in Mamba."""

    seeds: int = 3  # independent runs of every model
    steps: int = 2000  # updates per model
    d_model: int = 48  # width
    lr: float = 1e-2  # highest learning rate, the same for every model


def cells(config: MambaInductionConfig) -> list[Cell]:
    """The grid: kernel sizes, discretisations, and two layers without a convolution."""
    size: dict[str, Any] = {"d_vocab": D_VOCAB, "d_model": config.d_model, "n_ctx": LENGTH}
    variants = {
        "2 layers, kernel 1": MambaConfig(**size, n_layers=2, kernel_size=1),
        **{f"kernel {k}": MambaConfig(**size, n_layers=1, kernel_size=k) for k in (1, 2, 3, 4)},
        "kernel 4, zoh": MambaConfig(**size, n_layers=1, rule="zoh"),
        "kernel 4, bilinear": MambaConfig(**size, n_layers=1, rule="bilinear"),
    }
    return [
        Cell(
            name=name,
            task="repeats",
            seed=seed,
            model="Mamba",
            config=model,
            train=TrainConfig(
                steps=config.steps, lr=config.lr, warmup=min(100, config.steps // 4), seed=seed,
                checkpoint_every=max(1, config.steps // 2), eval_every=max(1, config.steps // 10),
            ),
        )
        for name, model in variants.items()
        for seed in range(config.seeds)
    ]  # fmt: skip


def tasks(config: MambaInductionConfig) -> dict[str, Task]:
    """Repeats of varied period."""
    tokens = measures.evaluation_tokens(PERIODS, LENGTH, D_VOCAB, batch=128)
    return {
        "repeats": Task(
            source(PERIODS), measures.repeats_curve(tokens), partial(measure, tokens=tokens)
        )
    }


def measure(model: HookedModel, cell: Cell, *, tokens: torch.Tensor) -> dict[str, Any]:
    """Accuracy, accuracy without the lags of each role, and the share of negative decays."""
    generator = torch.Generator().manual_seed(0)
    found: dict[str, Any] = measures.behaviour(model, tokens)
    if cell.config.n_layers == 1:
        found["without_lags"] = {
            "+".join(roles): float(
                role_without_lags(model, tokens, roles, generator=generator).changed.nanmean()
            )
            for roles in ROLES
        }
    with torch.no_grad():
        _, cache = model.run_with_cache(
            tokens[:16], names_filter=lambda name: name.endswith("hook_A_bar")
        )
    decays = torch.cat([cache[name].flatten() for name in cache.keys()])  # noqa: SIM118
    found["negative_decays"] = float((decays < 0).double().mean())
    return found


def judge(found: list[dict[str, Any]]) -> Verdict:
    """Supported if one layer needs a tap of lag 1, and in it the lags of B alone."""

    def of(name: str, key: str = "accuracy") -> list[float]:
        return [m[key] if key in m else m["without_lags"][key] for m in found if m["name"] == name]

    rows = (
        ("accuracy, 1 layer, kernel 1 (nothing smeared)", of("kernel 1")),
        ("accuracy, 1 layer, kernel 2", of("kernel 2")),
        ("accuracy, 1 layer, kernel 4", of("kernel 4")),
        ("accuracy, 2 layers, kernel 1", of("2 layers, kernel 1")),
        ("kernel 4, without the lags of B (the key)", of("kernel 4", "B")),
        ("kernel 4, without the lags of u (the value)", of("kernel 4", "u")),
        ("kernel 4, without the lags of C (the question)", of("kernel 4", "C")),
        ("kernel 4, without the lags of Δ", of("kernel 4", "delta")),
    )
    findings = tuple(Finding(label, over_seeds(v), causal=True) for label, v in rows)
    none, _, four, deep, on_b = (f.estimate for f in findings[:5])
    needs_conv = four.low > none.high and on_b.high < four.low - 0.3
    outcome: Outcome = "supported" if needs_conv and deep.high < four.low else "undecided"
    because = (
        "One layer without smearing does not learn it and one with a tap of lag 1 does; in the "
        "trained model the previous token matters in B, the key under which a token is written."
        if needs_conv
        else "The kernel sizes are not separated beyond the noise of the seeds."
    )
    if needs_conv and outcome == "undecided":
        outcome = "refuted" if deep.low > four.high - 0.1 else "undecided"
        because += (
            " But with two layers the state of the first can carry the previous token as well: "
            "the convolution is the way of one layer, not of Mamba."
        )
    return Verdict(CLAIM, outcome, because, findings, n_seeds=len(of("kernel 4")))


def run(
    config: MambaInductionConfig, out: Path, *, jobs: int = 1, command: str = ""
) -> dict[str, Any]:
    """Train, measure and judge; writes `result.json` and `table.md` into `out`, resumably."""
    out.mkdir(parents=True, exist_ok=True)
    found = run_grid(cells(config), partial(tasks, config), out, jobs=jobs)
    verdict = judge(found)
    study = {
        "study": "induction in Mamba",
        "command": command,
        "config": asdict(config),
        "verdicts": [verdict.to_dict()],
        "measures": found,
    }
    write_atomically(out / "result.json", json.dumps(study) + "\n")
    write_atomically(out / "table.md", table(found))
    return study


def table(found: list[dict[str, Any]]) -> str:
    """One line per variant: accuracy, and accuracy without the lags of each role."""
    head = ["model", "parameters", "accuracy", *("+".join(r) for r in ROLES), "negative Ā"]
    lines = [head, ["---"] * len(head)]
    for name in dict.fromkeys(m["name"] for m in found):
        runs = [m for m in found if m["name"] == name]
        roles = [
            f"{over_seeds([m['without_lags']['+'.join(r)] for m in runs]).mean:.3f}"
            if "without_lags" in runs[0]
            else ""
            for r in ROLES
        ]
        negative = over_seeds([m["negative_decays"] for m in runs]).mean
        accuracy = over_seeds([m["accuracy"] for m in runs])
        lines.append(
            [name, f"{runs[0]['n_parameters']:,}", str(accuracy), *roles, f"{negative:.4f}"]
        )
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"
