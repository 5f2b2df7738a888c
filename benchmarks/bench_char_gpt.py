"""CharGPT beside Hugging Face's GPT-2 of the same sizes, and its loss, generation and tracking.

    python benchmarks/bench_char_gpt.py

A training step is forward, backward and the same fused AdamW on both sides; no dropout. The peers
of generation are a loop that runs the whole context again for each token, and GPT-2 with its cache;
that of the streamed loss is the plain one, that of tracking a number of training steps.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from peers import gpt2, recomputed, stepper
from timing import ERROR, Row, compare, report, row
from torch import Tensor

from smearlens.data.synthetic import repeated_tokens
from smearlens.models.char_gpt import CharGPT
from smearlens.nn.large_vocab import plain_loss, streamed_loss
from smearlens.training.attention_tracking import AttentionTracking

STEP_BARS = {"cpu": 1 / 1.25, "shakespeare": 1 / 1.1}  # time of a step, as a fraction of GPT-2's
GENERATION_BAR = 1 / 5  # of a loop that runs the whole context again
STREAMED_BAR = 0.8  # of the loss with all its logits
BATCH = 12  # sequences in a step
STEP_WHY = "products of matrices take three quarters of the time and more, and equally long"
GENERATION_WHY = "products of matrices with one vector take nearly all the time, and equally long"
LENGTH = 256  # of a generated text
D_VOCAB = 50257  # of GPT-2's tokenizer


def step_rows() -> Iterator[Row]:
    for name, bar in STEP_BARS.items():
        model = CharGPT.from_preset(name, dropout=0.0)
        config, peer = model.config, gpt2(model.config)
        tokens = torch.randint(config.d_vocab, (BATCH, config.n_ctx))
        ours = stepper(model, lambda m=model, t=tokens: m(t, return_type="loss"))
        theirs = stepper(peer, lambda m=peer, t=tokens: m(t, labels=t).loss)
        shape = (*tokens.shape, config.d_model, config.n_layers)
        title = f"training step / GPT2LMHeadModel, {name}"
        yield compare(title, shape, ours, theirs, bar, rounds=99, budget=50.0, why=STEP_WHY)


def product_rows() -> Iterator[Row]:
    """What torch's other library for products of matrices makes of a step, in time and digits."""
    model = CharGPT.from_preset("shakespeare", dropout=0.0)
    tokens = torch.randint(model.config.d_vocab, (BATCH, model.config.n_ctx))
    step = stepper(model, lambda: model(tokens, return_type="loss"))

    def medium(run: Callable[[], Any]) -> Any:
        torch.set_float32_matmul_precision("medium")
        try:
            return run()
        finally:
            torch.set_float32_matmul_precision("highest")

    shape = (*tokens.shape, model.config.d_model, model.config.n_layers)
    name = "training step, matmul precision medium / highest"
    yield compare(name, shape, lambda: medium(step), step, None, rounds=5, budget=20.0)
    with torch.no_grad():
        exact, other = model(tokens), medium(lambda: model(tokens))
    apart = float((other - exact).abs().max() / exact.abs().max())
    name = "largest relative difference of logits, matmul precision medium and highest"
    yield row(name, shape, apart, None, unit=ERROR)


def generation_rows() -> Iterator[Row]:
    prompt = torch.zeros(1, 1, dtype=torch.int64)
    for name in STEP_BARS:
        model = CharGPT.from_preset(name, n_ctx=LENGTH).eval()
        peer = gpt2(model.config).eval()
        options = {"max_new_tokens": LENGTH - 1, "min_new_tokens": LENGTH - 1, "do_sample": False}
        peers = {
            "running the context again": (lambda m=model: recomputed(m, prompt, LENGTH - 1)),
            "GPT2LMHeadModel.generate": (lambda m=peer, o=options: m.generate(prompt, **o)),
        }
        shape = (1, LENGTH, model.config.d_model, model.config.n_layers)

        def ours(model: CharGPT = model) -> Tensor:
            return model.generate(prompt, LENGTH - 1, temperature=0)

        for other, run in peers.items():
            bar = GENERATION_BAR if other.startswith("running") else 1.0
            title = f"generation / {other}, {name}"
            yield compare(title, shape, ours, run, bar, rounds=15, budget=25.0, why=GENERATION_WHY)


def loss_rows() -> Iterator[Row]:
    for rows, d_model in ((1008, 32), (1008, 64), (2040, 64)):
        hidden = torch.randn(rows, d_model, requires_grad=True)
        weight = (torch.randn(D_VOCAB, d_model) * 0.1).requires_grad_()
        targets = torch.randint(D_VOCAB, (rows,))

        def run(loss, given=(hidden, weight, targets)) -> None:
            torch.autograd.grad(loss(*given), given[:2])

        name = "streamed / plain loss with gradients"
        shape = (rows, D_VOCAB, d_model)
        yield compare(
            name, shape, lambda run=run: run(streamed_loss), lambda run=run: run(plain_loss),
            STREAMED_BAR, rounds=9, budget=15.0,
        )  # fmt: skip


def tracking_rows(batch: int = BATCH, n_steps: int = 10) -> Iterator[Row]:
    """One look at the model beside the steps that make 2 % of the 500 between two looks."""
    model = CharGPT.from_preset("cpu")
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(65, (batch, 64), generator=generator)
    step = stepper(model, lambda: model(tokens, return_type="loss"))
    repeats = repeated_tokens(batch, (8, 24), 64, 65, generator=generator)
    tracking = AttentionTracking(tokens, generator=generator, repeats=repeats)

    def steps() -> None:
        for _ in range(n_steps):
            step()

    name = "tracking once / ten training steps (2 % of 500), cpu"
    yield compare(name, (batch, 64), lambda: tracking(model), steps, 1.0, rounds=5)


def main() -> list[Row]:
    """Rows of every case."""
    warnings.simplefilter("ignore")
    torch.manual_seed(0)

    def rows() -> Iterator[Row]:
        yield from step_rows()
        yield from product_rows()
        yield from generation_rows()
        yield from loss_rows()
        yield from tracking_rows()

    return report(rows())


if __name__ == "__main__":
    main()
