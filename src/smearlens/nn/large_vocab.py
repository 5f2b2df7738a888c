"""Cross entropy over a large vocabulary whose logits never exist all at once.

Contains the streamed loss, with its gradient written by hand, and its plain twin. Leaves out which
positions are targets and when a model takes this loss (`models.decoder`).
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

CHUNK_LOGITS = 2**23  # alive at a time: 32 MB in float32
UNDERFLOW = 1e-30  # a probability below this has lost digits that its logarithm needs


def streamed_loss(
    hidden: Float[Tensor, "row d_model"],
    weight: Float[Tensor, "d_vocab d_model"],
    targets: Int[Tensor, " row"],
) -> Float[Tensor, ""]:
    r"""Mean cross entropy of `hidden @ weight.T`, chunk by chunk of rows; nats per target.

    $$\frac{1}{n} \sum_i \Big(\log \sum_v e^{h_i \cdot w_v} - h_i \cdot w_{y_i}\Big)$$

    Loss and gradient leave one pass: a chunk of logits becomes probabilities in place, these minus
    the one-hot targets are the gradient of the logits, and two products with them are the gradients
    of `hidden` and `weight`. Beside these two gradients, `CHUNK_LOGITS` logits (at least one row)
    are alive; no array [row d_vocab] waits for the backward pass. Computed in float32 at least,
    under autocast too.

    Args:
        hidden: what the unembedding reads, at the positions that have a target; at least one row
        weight: the unembedding
        targets: ids of the next tokens, each in 0 .. d_vocab - 1

    Returns:
        the loss, in float32 or float64, whichever is wider

    Raises:
        ValueError: for no rows, or sizes that disagree
    """
    n_rows, d_model = hidden.shape
    if n_rows == 0 or targets.shape != (n_rows,) or weight.shape[1] != d_model:
        raise ValueError(
            "streamed_loss takes hidden [row d_model] of at least one row, weight [d_vocab "
            f"d_model] and targets [row]; got {list(hidden.shape)}, {list(weight.shape)} and "
            f"{list(targets.shape)}"
        )
    wide = torch.promote_types(hidden.dtype, torch.float32)
    learning = torch.is_grad_enabled()
    keep = (learning and hidden.requires_grad, learning and weight.requires_grad)
    with torch.autocast(hidden.device.type, enabled=False):
        return _StreamedLoss.apply(hidden.to(wide), weight.to(wide), targets.long(), keep)


def plain_loss(
    hidden: Float[Tensor, "row d_model"],
    weight: Float[Tensor, "d_vocab d_model"],
    targets: Int[Tensor, " row"],
) -> Float[Tensor, ""]:
    """The plain twin of `streamed_loss`: all logits in memory, gradient by stock autograd."""
    wide = torch.promote_types(hidden.dtype, torch.float32)
    return F.cross_entropy(F.linear(hidden, weight).to(wide), targets.long())


class _StreamedLoss(torch.autograd.Function):
    """Autograd around the one pass; the gradients wait, up to the factor that backward brings."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, keep: tuple[bool, bool]
    ) -> Tensor:
        total, d_hidden, d_weight = _one_pass(hidden, weight, targets, *keep)
        ctx.save_for_backward(hidden, weight, targets, d_hidden, d_weight)
        return total / len(targets)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, targets, *waiting = ctx.saved_tensors
        if torch.is_grad_enabled():  # someone wants the gradient of this gradient
            found = _plain_gradients(hidden, weight, targets, grads[0])
        else:
            factor = grads[0] / len(targets)
            found = [None if grad is None else grad * factor for grad in waiting]
        return *found, None, None


def _one_pass(
    hidden: Tensor, weight: Tensor, targets: Tensor, keep_hidden: bool, keep_weight: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Sum of the losses, and its gradients by `hidden` and `weight` where they are asked for."""
    (n_rows, d_model), d_vocab = hidden.shape, len(weight)
    n_chunks = -(-n_rows // max(CHUNK_LOGITS // d_vocab, 1))
    n_chunk = -(-n_rows // n_chunks)  # equal chunks: a short last one would be slow
    logits = hidden.new_empty(n_chunk, d_vocab)  # one buffer: fresh memory costs page faults
    d_hidden = hidden.new_empty(n_rows, d_model) if keep_hidden else None
    d_weight = weight.new_zeros(d_vocab, d_model) if keep_weight else None
    total = hidden.new_zeros((), dtype=torch.float64 if hidden.device.type == "cpu" else None)
    for start in range(0, n_rows, n_chunk):
        rows = slice(start, start + n_chunk)
        x, y = hidden[rows], targets[rows].unsqueeze(1)
        p = torch.mm(x, weight.T, out=logits[: len(x)])
        torch.softmax(p, dim=1, out=p)
        picked = p.gather(1, y)
        total += _nats(picked, x, weight, y).sum()
        if d_hidden is None and d_weight is None:
            continue
        p.scatter_(1, y, picked - 1)  # now the gradient of the logits
        if d_hidden is not None:
            torch.mm(p, weight, out=d_hidden[rows])
        if d_weight is not None:
            d_weight.addmm_(p.T, x)
    return total.to(hidden.dtype), d_hidden, d_weight


def _nats(picked: Tensor, x: Tensor, weight: Tensor, y: Tensor) -> Tensor:
    """-log of the targets' probabilities [row 1]; from the logits again where they vanish."""
    nats = -picked.log()
    lost = (picked < UNDERFLOW).squeeze(1)
    if lost.any():
        logits = x[lost] @ weight.T
        nats[lost] = logits.logsumexp(1, keepdim=True) - logits.gather(1, y[lost])
    return nats


def _plain_gradients(
    hidden: Tensor, weight: Tensor, targets: Tensor, grad: Tensor
) -> list[Tensor | None]:
    """Differentiable gradients, through the plain twin.

    On views: `hidden` may depend on `weight` (a tied embedding), and what is asked for is the
    gradient of the loss alone.
    """
    own_hidden, own_weight = hidden.view_as(hidden), weight.view_as(weight)
    loss = plain_loss(own_hidden, own_weight, targets)
    asked = [x for x in (own_hidden, own_weight) if x.requires_grad]
    found = torch.autograd.grad(loss, asked, grad, create_graph=True)
    by_input = dict(zip(map(id, asked), found, strict=True))
    return [by_input.get(id(x)) for x in (own_hidden, own_weight)]
