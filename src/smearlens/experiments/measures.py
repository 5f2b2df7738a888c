"""What the studies measure of one trained model, as plain numbers for a result file.

Leaves out training (`experiments.grid`) and verdicts (the studies).
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from smearlens.analysis.behaviour import (
    induction_accuracy,
    induction_loss,
    per_token_loss,
    predictable,
)
from smearlens.analysis.heads import duplicate_token_score, induction_score, prev_token_score
from smearlens.analysis.kernels import kernel_profile
from smearlens.analysis.patterns import lag_profile
from smearlens.analysis.scores import Scores, best_head
from smearlens.analysis.smearing import score_by_lag, smear_evidence
from smearlens.causal.ablate import measure_with
from smearlens.causal.audit import audit
from smearlens.causal.lags import role_without_lags
from smearlens.data.synthetic import iid_tokens, repeated_tokens
from smearlens.models.base import HookedModel
from smearlens.nn.attention import Attention

ROLES = ("q", "k", "v", "qkv")


def evaluation_tokens(
    period: int | tuple[int, int], length: int, d_vocab: int, batch: int = 256
) -> Int[Tensor, "batch pos"]:
    """Held-out repeats: the same for every model, from a seed that no training run uses."""
    generator = torch.Generator().manual_seed(2**31 - 1)
    return repeated_tokens(batch, period, length, d_vocab, generator=generator)


def repeats_curve(tokens: Int[Tensor, "batch pos"]) -> Any:
    """A function from a model to its accuracy and loss on repeats."""

    def evaluate(model: Any) -> dict[str, float]:
        with torch.no_grad():
            logits = model(tokens)
        return {
            "loss": float(induction_loss(logits, tokens).mean()),
            "accuracy": float(induction_accuracy(logits, tokens).mean()),
        }

    return evaluate


def behaviour(model: HookedModel, tokens: Int[Tensor, "batch pos"]) -> dict[str, Any]:
    """Accuracy and loss on the tokens that induction can predict, and the loss by position."""
    with torch.no_grad():
        logits = model(tokens)
    losses = per_token_loss(logits, tokens).double()
    return {
        "accuracy": float(induction_accuracy(logits, tokens).mean()),
        "loss": float(induction_loss(logits, tokens).mean()),
        "loss_by_position": _rounded(losses.mean(0)),
        "n_targets": int(predictable(tokens).sum()),
    }


@torch.no_grad()
def with_patterns(
    model: HookedModel, tokens: Int[Tensor, "batch pos"]
) -> tuple[Float[Tensor, "batch pos d_vocab"], Any]:
    """Logits, and a cache of every attention pattern."""
    return model.run_with_cache(tokens, names_filter=lambda name: name.endswith("hook_pattern"))


def head_scores(
    model: HookedModel, tokens: Int[Tensor, "batch pos"], *, example: bool
) -> dict[str, Any]:
    """Every head's induction, previous-token and duplicate-token score, and the best of each.

    With `example`, also the patterns of the best head's layer on the first sequence.
    """
    _, cache = with_patterns(model, tokens)
    found = {
        "induction": induction_score(cache, tokens),
        "prev_token": prev_token_score(cache),
        "duplicate_token": duplicate_token_score(cache, tokens),
    }
    summary = {name: _score_summary(scores) for name, scores in found.items()}
    if not example:
        return summary
    best = best_head(found["induction"])
    heads = cache[f"{best['layer']}.hook_pattern"][0]
    summary["example"] = {
        "layer": best["layer"],
        "head": best["head"],
        "tokens": tokens[0].tolist(),
        "patterns": [[_rounded(row, 3) for row in head] for head in heads],
    }
    return summary


def smearing(model: HookedModel, tokens: Int[Tensor, "batch pos"]) -> dict[str, Any]:
    """Kernel profile, scores by lag, smear weight, and lags removed from Q, K, V and all."""
    found: dict[str, Any] = {}
    names = list(model.hook_dict)
    few = tokens[:64]
    with torch.no_grad():
        _, cache = model.run_with_cache(few)
        attn = model.mod_dict.get("blocks.0.attn")
    for point in names:
        if point.endswith("hook_kernel"):
            profile = kernel_profile(cache, layer=point.removesuffix(".hook_kernel"))
            found["kernel"] = {
                "layer": point.removesuffix(".hook_kernel"),
                "records": profile.records(),
                "null_rms": profile.null_rms,
                "null_high": profile.null_high,
                "null_signed": profile.null_signed,
                "future_share": profile.future_share,
            }
        elif point.endswith("smear.hook_weight"):
            found["smear_weight"] = _rounded(cache[point])
    if not found:
        return found
    if (
        isinstance(attn, Attention)
        and "blocks.0.conv.hook_kernel" in names
        and model.config.positions != "rotary"
        and not model.config.norm  # nothing may stand between the convolution and the keys
        and attn.smear is None
    ):
        by_lag = score_by_lag(
            cache, attn.W_K.detach(), carried=1.0 if model.config.residual else 0.0
        )
        evidence = smear_evidence(by_lag, few)
        found["evidence_by_lag"] = {
            str(lag): float(value.detach().nanmean(0).max())
            for lag, value in sorted(evidence.items())
        }
    found["without_lags"] = _without_lags(model, tokens)
    return found


def _without_lags(model: HookedModel, tokens: Int[Tensor, "batch pos"]) -> dict[str, Any]:
    """Accuracy when Q, K, V, or all of them lose what lags carry."""
    generator = torch.Generator().manual_seed(0)
    found = {}
    for roles in ROLES:
        effect = role_without_lags(model, tokens, roles, generator=generator)
        found[roles] = {
            "accuracy": float(effect.changed.nanmean()),
            "effect": effect.mean(),
            "interval": list(effect.interval()),
            "control_accuracy": float(effect.clean.nanmean()) + effect.control,
        }
    return found


def audited(model: HookedModel, *, floor_steps: int) -> dict[str, Any]:
    """The audit as plain numbers, its long lists left out."""
    report = audit(model, floor_steps=floor_steps)
    return {
        "passed": report.passed,
        "findings": report.findings,
        "first_leak": report.future.first_leak,
        "influence": max(report.future.influence),
        "iid_floor": report.iid.floor,
        "iid_loss": report.iid.loss,
        "iid_trained_loss": report.iid.trained_loss,
        "streaming": report.streaming,
    }


def positional_test(
    model: HookedModel, *, period: int, others: tuple[int, ...], length: int, d_vocab: int
) -> dict[str, Any]:
    """Is a model trained on one period matching tokens, or looking a fixed distance back?

    Accuracy at the trained period and at others, and the weight that stays on the trained lag when
    nothing repeats.
    """
    accuracy = {}
    for other in (period, *others):
        tokens = evaluation_tokens(other, length, d_vocab, batch=128)
        accuracy[str(other)] = float(measure_with(model, tokens, []).mean())
    generator = torch.Generator().manual_seed(0)
    nothing = iid_tokens(64, length, d_vocab, generator=generator)
    tokens = evaluation_tokens(period, length, d_vocab, batch=64)
    (_, idle), (_, busy) = with_patterns(model, nothing), with_patterns(model, tokens)
    profiles = lag_profile(idle, max_lag=length - 1)
    best = best_head(induction_score(busy, tokens))
    return {
        "accuracy_by_period": accuracy,
        "induction_at_trained_period": best["score"],
        "control_at_trained_period": best["control"],
        "weight_on_trained_lag_when_nothing_repeats": float(
            profiles[best["layer"]].at(period - 1)[best["head"]]
        ),
    }


def _score_summary(scores: Scores) -> dict[str, Any]:
    best = best_head(scores)
    return {
        "best": {k: (v if isinstance(v, (str, int)) else round(v, 6)) for k, v in best.items()},
        "heads": {layer: _rounded(mean) for layer, mean in scores.mean().items()},
    }


def _rounded(values: Tensor, digits: int = 5) -> list[float]:
    return [round(float(v), digits) for v in values]
