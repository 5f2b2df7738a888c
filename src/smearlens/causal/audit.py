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

from smearlens._explain import explained
from smearlens.causal.leaks import FutureRead, IidFloor, iid_floor, reads_future, streaming_gap
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
        found = []
        if not math.isfinite(self.iid.loss):
            found.append(f"its loss on independent tokens is {self.iid.loss}")
        if self.future.leaks:
            found.append(
                f"reads the future: later tokens change logits by up to "
                f"{max(self.future.influence):.2g} (first at {self.future.first_leak})"
            )
        if self.iid.broken:
            loss = self.iid.loss if self.iid.trained_loss is None else self.iid.trained_loss
            found.append(
                f"beats the floor: loss {min(loss, self.iid.loss):.4f} on independent tokens, "
                f"ln V = {self.iid.floor:.4f}"
            )
        if self.streaming is not None and self.streaming > self.future.tolerance * 10:
            found.append(f"step by step its logits differ by {self.streaming:.2g} from one run")
        return found

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain numbers."""
        return {**asdict(self), "passed": self.passed, "findings": self.findings}

    def __repr__(self) -> str:
        future, iid = self.future, self.iid
        where = f"yes, first at {future.first_leak}" if future.leaks else "no"
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
            + ("impossible" if self.streaming is None else f"differs by {self.streaming:.2g}"),
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
def audit(
    model: HookedModel,
    tokens: Int[Tensor, "batch pos"] | None = None,
    *,
    loss_mask: Bool[Tensor, "mask_batch mask_pos"] | None = None,
    length: int | None = None,
    floor_steps: int = 0,
    tolerance: float = 1e-4,
    generator: torch.Generator | None = None,
) -> Audit:
    """Check a decoder for leaks and its accuracy for padding.

    Args:
        model: the model, in any state of training
        tokens: what its accuracy is reported on; without them accuracy is not checked
        loss_mask: True where a token is real, not padding
        length: of the random sequences; default: as many as fit, at most 48
        floor_steps: also train a copy for so many steps on independent tokens; a leak that the
            model has not learned to use yet shows then (300 steps are enough for small models)
        tolerance: largest change of a logit that rounding may cause
        generator: of the random tokens; default: seeded with 0, so that an audit repeats

    Returns:
        an `Audit`; its repr is a readable summary
    """
    generator = torch.Generator().manual_seed(0) if generator is None else generator
    length = min(48, model.config.n_ctx) if length is None else length
    if not 3 <= length <= model.config.n_ctx:
        raise ValueError(f"length must be in 3..n_ctx={model.config.n_ctx}, got {length}")
    training = model.training
    model.eval()
    try:
        random = iid_tokens(8, length, model.config.d_vocab, generator=generator)
        return Audit(
            f"{type(model).__name__} ({model.n_parameters:,} parameters)",
            reads_future(model, random, tolerance=tolerance, generator=generator),
            iid_floor(model, length, steps=floor_steps, generator=generator),
            streaming_gap(model, random),
            None if tokens is None else count_targets(model, tokens, loss_mask),
        )
    finally:
        model.train(training)


@torch.no_grad()
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
    hit = model(tokens)[:, :-1].argmax(-1) == targets
    everything = torch.bincount(targets.flatten(), minlength=model.config.d_vocab)
    counts = torch.bincount(targets[real], minlength=model.config.d_vocab).double()
    share = counts / counts.sum()
    return Targets(
        n_targets=int(real.sum()),
        pad_fraction=float((~real).double().mean()),
        accuracy=float(hit[real].double().mean()),
        accuracy_with_pads=float(hit.double().mean()),
        constant=float(everything.max() / everything.sum()),
        unigram=float(share.max()),
        unigram_entropy=float(-(share * share.clamp_min(1e-300).log()).sum()),
    )
