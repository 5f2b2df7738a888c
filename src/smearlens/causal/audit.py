"""`audit(model)`: is the number you are about to report an artefact?

Does the model read the future, and which layer does? Does it beat what cannot be beaten (ln V on
independent tokens)? Are pads counted in its accuracy, and what would a constant have scored? Leaves
out how leaks are found (`causal.leaks`) and repairing anything.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from smearlens._explain import describe, explained
from smearlens.causal.leaks import (
    FutureRead,
    IidFloor,
    iid_floor,
    reads_future,
    streaming_gap,
    takes,
)
from smearlens.causal.running import observed
from smearlens.data.synthetic import iid_tokens
from smearlens.models.base import HookedModel


@dataclass(frozen=True)
class Targets:
    """What accuracy is counted on, and what predictors without a model score there.

    Attributes:
        n_targets: next tokens that are real
        pad_fraction: share of all targets that are padding
        accuracy: of the model on real targets
        accuracy_with_pads: of the model if pads are counted: not a result, shown to be compared
        constant: accuracy, pads counted, of always saying the most frequent target (often the pad)
        unigram: accuracy on real targets of always saying the most frequent real token
        unigram_entropy: of the real targets, nats
    """

    n_targets: int
    pad_fraction: float
    accuracy: float
    accuracy_with_pads: float
    constant: float
    unigram: float
    unigram_entropy: float


@dataclass(frozen=True)
class Audit:
    """The result of `audit`; `passed` unless something is wrong with the model's numbers."""

    model: str
    future: FutureRead
    iid: IidFloor
    streaming: float | None
    targets: Targets | None

    @property
    def passed(self) -> bool:
        """Finite logits, no leak, no loss below the floor, streamed logits equal to full ones."""
        return not self.findings

    @property
    def findings(self) -> list[str]:
        """What is wrong, one sentence each."""
        future, losses, found = self.future, (self.iid.loss, self.iid.trained_loss), []
        if not future.finite:
            found.append("gives logits or gradients that are not finite: nothing else is certain")
        if self.targets is not None and not math.isfinite(self.targets.accuracy):
            found.append("its logits for the given tokens are NaN")
        found += [
            f"its loss on independent tokens is {loss}"
            for loss in losses
            if loss is not None and not math.isfinite(loss)
        ]
        if future.leaks:
            found.append(f"reads the future: {_leak_in_words(future)}")
        if self.iid.broken:
            lowest = min(loss for loss in losses if loss is not None and not math.isnan(loss))
            found.append(
                f"beats the floor: loss {lowest:.4f} on independent tokens, "
                f"ln V = {self.iid.floor:.4f}"
            )
        if self.streaming is not None and self.streaming > self.future.tolerance * 10:
            found.append(f"step by step its logits differ by {self.streaming:.2g} from one run")
        return found

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain numbers."""
        return {**asdict(self), "passed": self.passed, "findings": self.findings}

    @property
    def _unstreamed(self) -> str:
        """Why nothing was run token by token: whoever reads the future cannot be."""
        if self.future.leaks:
            return "impossible"
        return "not checked: forward takes no state, or refuses it"

    def __repr__(self) -> str:
        future, iid = self.future, self.iid
        where = "yes" if future.leaks else "no"
        where += f", first at {future.first_leak}" if future.leaks and future.first_leak else ""
        lines = [
            f"audit of {self.model}: {'passed' if self.passed else 'FAILED'}",
            f"  reads the future   {where} (largest influence {max(future.influence):.2g} over "
            f"{len(future.cuts)} cuts, jacobian {future.jacobian:.2g})",
            f"  independent tokens loss {iid.loss:.4f} ± {iid.error:.4f}, ln V = {iid.floor:.4f}"
            + (
                ""
                if iid.trained_loss is None
                else f"; {iid.trained_loss:.4f} after {iid.steps} steps on such tokens"
            ),
            "  streaming          "
            + (self._unstreamed if self.streaming is None else f"differs by {self.streaming:.2g}"),
        ]
        if self.targets is None:
            lines.append("  accuracy           not checked: pass tokens (and loss_mask)")
        else:
            t = self.targets
            lines.append(
                f"  accuracy           {t.accuracy:.3f} on {t.n_targets} real targets "
                f"(unigram {t.unigram:.3f}, its entropy {t.unigram_entropy:.3f} nats)"
            )
            if t.pad_fraction:
                lines.append(
                    f"  pads               {t.pad_fraction:.1%} of the targets; counted, the model "
                    f"would show {t.accuracy_with_pads:.3f} and a constant {t.constant:.3f}"
                )
        return "\n".join(lines + [f"  -> {finding}" for finding in self.findings])


@explained
@observed
def audit(
    model: HookedModel,
    tokens: Int[Tensor, "batch pos"] | None = None,
    *,
    loss_mask: Bool[Tensor, "mask_batch mask_pos"] | None = None,
    length: int | None = None,
    floor_steps: int = 0,
    tolerance: float | int | None = None,
    generator: torch.Generator | None = None,
) -> Audit:
    """Check a decoder for leaks and its accuracy for padding.

    A model of one's own needs `config.n_ctx` and `config.d_vocab`, a forward pass from tokens to
    logits [batch pos d_vocab], and a hook point `hook_embed` that its embedding passes. If forward
    takes `state`, a dictionary that it fills and is given again with each next token, streaming is
    checked; with `floor_steps` it must take `return_type="loss"`, and return the mean loss.

    Args:
        model: the model, in any state of training; it runs in eval mode
        tokens: what its accuracy is reported on; without them accuracy is not checked
        loss_mask: True where a token is real, not padding
        length: of the random sequences; default: as many as fit, at most 48
        floor_steps: also train a copy for so many steps on independent tokens; a leak that the
            model has not learned to use yet shows then (300 steps are enough for small models)
        tolerance: largest change of a logit that rounding may cause; ten times as much from one run
            to step by step. Default 1e-4, or the rounding of the largest logit in the precision of
            the weights, if that is more (bfloat16, float16)
        generator: of the random tokens; default: seeded with 0, so that an audit repeats

    Returns:
        an `Audit`; its repr is a readable summary

    Raises:
        ValueError: for a model without what is said above, a length that does not fit, or tokens of
            which none is a real target
    """
    _check_model(model, floor_steps)
    generator = torch.Generator().manual_seed(0) if generator is None else generator
    length = min(48, model.config.n_ctx) if length is None else length
    if not 3 <= length <= model.config.n_ctx:
        raise ValueError(f"length must be in 3..n_ctx={model.config.n_ctx}, got {length}")
    random = iid_tokens(8, length, model.config.d_vocab, generator=generator)
    rounding = _rounding(model, random)
    tolerance = max(1e-4, rounding) if tolerance is None else tolerance
    return Audit(
        f"{type(model).__name__} ({model.n_parameters:,} parameters)",
        reads_future(model, random, tolerance=tolerance, generator=generator),
        iid_floor(model, length, steps=floor_steps, generator=generator),
        streaming_gap(model, random),
        None if tokens is None else count_targets(model, tokens, loss_mask),
    )


@observed
def count_targets(
    model: HookedModel,
    tokens: Int[Tensor, "batch pos"],
    loss_mask: Bool[Tensor, "mask_batch mask_pos"] | None = None,
) -> Targets:
    """Accuracy on real targets, and what it would be with pads, constants and unigrams."""
    real = torch.ones_like(tokens, dtype=torch.bool) if loss_mask is None else loss_mask
    if real.shape != tokens.shape:
        raise ValueError(
            f"loss_mask {list(real.shape)} must have the shape of the tokens {list(tokens.shape)}"
        )
    targets, real = tokens[:, 1:], real[:, 1:]
    if not real.any():
        raise ValueError(
            f"tokens {list(tokens.shape)} and loss_mask leave no target: give sequences of at "
            "least 2 tokens, with a real one after the first"
        )
    logits = model(tokens)[:, :-1]
    hit = (logits.argmax(-1) == targets).double().masked_fill(logits.isnan().any(-1), torch.nan)
    everything = torch.bincount(targets.flatten(), minlength=model.config.d_vocab)
    counts = torch.bincount(targets[real], minlength=model.config.d_vocab).double()
    share = counts / counts.sum()
    return Targets(
        n_targets=int(real.sum()),
        pad_fraction=float((~real).double().mean()),
        accuracy=float(hit[real].mean()),
        accuracy_with_pads=float(hit.mean()),
        constant=float(everything.max() / everything.sum()),
        unigram=float(share.max()),
        unigram_entropy=float(-(share * share.clamp_min(1e-300).log()).sum()),
    )


def _check_model(model: HookedModel, floor_steps: int) -> None:
    """Raise unless `model` has what an audit asks of it."""
    if floor_steps < 0:
        raise ValueError(f"floor_steps must be at least 0, got {floor_steps}")
    config = getattr(model, "config", None)
    sizes = [
        name for name in ("n_ctx", "d_vocab") if not isinstance(getattr(config, name, None), int)
    ]
    missing = [f"an int config.{size}" for size in sizes]
    if not any(name.endswith("hook_embed") for name in model.hook_dict):
        missing.append("a hook point hook_embed, which its embedding passes")
    if floor_steps and not takes(model, return_type="loss"):
        missing.append('forward(tokens, return_type="loss"), for floor_steps')
    if missing:
        raise ValueError(f"audit of this {type(model).__name__} needs {' and '.join(missing)}")


def _rounding(model: HookedModel, tokens: Int[Tensor, "batch pos"]) -> float:
    """How far the largest logit is from the next number in the precision of weights and logits."""
    logits, expected = model(tokens), [*tokens.shape, model.config.d_vocab]
    if not isinstance(logits, Tensor) or list(logits.shape) != expected:
        raise ValueError(
            f"audit of this {type(model).__name__} needs logits [batch pos d_vocab] = {expected} "
            f"from forward(tokens), got {describe(logits)}"
        )
    kinds = {logits.dtype, *(p.dtype for p in model.parameters() if p.is_floating_point())}
    largest = logits.abs().nan_to_num(nan=0, posinf=0).max()
    return float(largest) * max(torch.finfo(kind).eps for kind in kinds)


def _leak_in_words(future: FutureRead) -> str:
    """How large a leak is, and where."""
    if not max(future.influence) > future.tolerance:
        return f"gradients from later embeddings are up to {future.jacobian:.2g}"
    return (
        f"later tokens change logits by up to {max(future.influence):.2g} "
        f"(first at {future.first_leak or 'the logits'})"
    )
