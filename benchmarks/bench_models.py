"""Training step and generation of the two attention models and of Mamba beside what torch, Hugging
Face and mamba.py offer. CharGPT and Seq2Seq have files of their own.

    python benchmarks/bench_models.py

A step is forward, backward and the same fused AdamW on both sides. Memory is the rise of the peak
resident set during one step after the first, each side in a fresh process.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from importlib.util import find_spec
from typing import Any

import torch
from children import GIVING_BACK, call, peak_rise
from peers import MambaPy, TorchStack, hugging_face_mamba, recomputed, stepper
from timing import MEMORY, Row, compare, report, row
from torch import Tensor, nn
from torch.nn import functional as F

from smearlens import AttnAttn, AttnAttnConfig, ConvAttn, ConvAttnConfig, Mamba, MambaConfig

LENGTH = 256  # of a generated text
SMALL = {"d_vocab": 64, "d_model": 64, "n_heads": 4, "n_ctx": LENGTH}
WIDE = {"d_vocab": 512, "d_model": 256, "n_heads": 8, "n_ctx": LENGTH}
ATTENTION: dict[str, tuple[Callable[[], Any], tuple[int, int]]] = {  # model; batch, pos
    "ConvAttn": (lambda: ConvAttn(ConvAttnConfig(**SMALL)), (32, 48)),
    "ConvAttn, wide": (lambda: ConvAttn(ConvAttnConfig(**WIDE)), (8, 256)),
    "AttnAttn": (lambda: AttnAttn(AttnAttnConfig(**SMALL)), (32, 48)),
    "AttnAttn, wide": (lambda: AttnAttn(AttnAttnConfig(**WIDE)), (8, 256)),
}
MAMBA = MambaConfig(d_vocab=65, d_model=64, n_layers=2, n_ctx=LENGTH)
MAMBA_BATCH = (16, 128)
MEMORY_BAR = 1.05  # both keep the same activations
TOKEN_WHY = (
    "each token passes hook points, and the convolution and the scan of whole sequences, set up "
    "anew for one position"
)
SAME_WHY = "the activations kept are the same ones; the rest is rounding to pages"
STEP_WHY = "every intermediate passes a hook point, and these models are small"


def mamba_peers() -> dict[str, Callable[[MambaConfig], Any]]:
    """By name; mamba.py is an optional package."""
    peers = {"MambaForCausalLM": hugging_face_mamba, "mamba.py": MambaPy}
    return {k: v for k, v in peers.items() if k != "mamba.py" or find_spec("mambapy")}


def loss_of(model: nn.Module, tokens: Tensor) -> Callable[[], Tensor]:
    """The mean loss of the next tokens, by whatever means the model has."""
    if isinstance(model, (ConvAttn, AttnAttn, Mamba)):
        return lambda: model(tokens, return_type="loss")

    def loss() -> Tensor:
        out = model(tokens)
        logits = out if isinstance(out, Tensor) else out.logits
        return F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())

    return loss


def step_rows() -> Iterator[Row]:
    for name, (make, (batch, pos)) in ATTENTION.items():
        ours = make()
        theirs = TorchStack(ours.config)
        tokens = torch.randint(ours.config.d_vocab, (batch, pos))
        sides = [stepper(model, loss_of(model, tokens)) for model in (ours, theirs)]
        shape = (batch, pos, ours.config.d_model, ours.config.n_layers)
        yield compare(f"training step / torch's layers, {name}", shape, *sides, why=STEP_WHY)
    tokens = torch.randint(MAMBA.d_vocab, MAMBA_BATCH)
    ours = Mamba(MAMBA)
    shape = (*MAMBA_BATCH, MAMBA.d_model, MAMBA.n_layers)
    for name, make in mamba_peers().items():
        sides = [stepper(model, loss_of(model, tokens)) for model in (ours, make(MAMBA))]
        yield compare(f"training step / {name}, Mamba", shape, *sides)


def generation_rows() -> Iterator[Row]:
    prompt = torch.zeros(1, 1, dtype=torch.int64)
    models = [make().eval() for make, _ in ATTENTION.values()] + [Mamba(MAMBA).eval()]
    for name, model in zip((*ATTENTION, "Mamba"), models, strict=True):
        shape = (1, LENGTH, model.config.d_model, model.config.n_layers)

        def ours(model: Any = model) -> Tensor:
            return model.generate(prompt, LENGTH - 1, temperature=0)

        def again(model: Any = model) -> Tensor:
            return recomputed(model, prompt, LENGTH - 1)

        yield compare(f"generation / running the context again, {name}", shape, ours, again,
                      rounds=5)  # fmt: skip
    for name, make in mamba_peers().items():
        theirs = _generation(make(MAMBA).eval(), prompt)
        yield compare(f"generation / {name}, Mamba", shape, ours, theirs, rounds=5, why=TOKEN_WHY)


def _generation(model: Any, prompt: Tensor) -> Callable[[], object]:
    """Greedy, with the state that the model keeps."""
    if isinstance(model, MambaPy):
        return lambda: model.generate(prompt, LENGTH - 1)
    options = {"max_new_tokens": LENGTH - 1, "min_new_tokens": LENGTH - 1, "do_sample": False}
    return lambda: model.generate(prompt, **options)


def memory_rows() -> Iterator[Row]:
    weight = {name: call(step_peak, name, environment=GIVING_BACK) for name in
              ("Mamba", *mamba_peers())}  # fmt: skip
    shape = (*MAMBA_BATCH, MAMBA.d_model, MAMBA.n_layers)
    for name in mamba_peers():
        ratio = weight["Mamba"] / weight[name]
        yield row(f"training step / {name}, Mamba", shape, ratio, 1.0, unit=MEMORY)
    wide = {side: call(step_peak, side, environment=GIVING_BACK) for side in ("ours", "torch")}
    ratio = wide["ours"] / wide["torch"]
    name = "training step / torch's layers, AttnAttn, wide"
    yield row(name, ATTENTION["AttnAttn, wide"][1], ratio, MEMORY_BAR, unit=MEMORY, why=SAME_WHY)


def step_peak(name: str) -> float:
    """MB by which the peak rises in the second step, in a process of its own."""
    make, sizes = ATTENTION["AttnAttn, wide"]
    if name in ("ours", "torch"):
        model = make() if name == "ours" else TorchStack(make().config)
        tokens = torch.randint(WIDE["d_vocab"], sizes)
    else:
        model = ({"Mamba": Mamba} | mamba_peers())[name](MAMBA)
        tokens = torch.randint(MAMBA.d_vocab, MAMBA_BATCH)
    step = stepper(model, loss_of(model, tokens))
    step()
    return peak_rise(step)


def main() -> list[Row]:
    torch.manual_seed(0)

    def rows() -> Iterator[Row]:
        yield from step_rows()
        yield from generation_rows()
        yield from memory_rows()

    return report(rows())


if __name__ == "__main__":
    main()
