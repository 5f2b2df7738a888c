"""Parity of bits read one by one: does Mamba learn what a nonlinear recurrence learns?

A control for a comparison of Mamba with recurrent networks that could otherwise not fail. Leaves
out the verdict (`mamba_verdicts`).

Source:
    Merrill et al. 2024, "The Illusion of State in State-Space Models"; Grazzi et al. 2024,
    "Unlocking State-Tracking in Linear RNNs Through Negative Eigenvalues"
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from smearlens._files import write_atomically
from smearlens.experiments.threads import one_thread
from smearlens.models.mamba import Mamba, MambaConfig

TRAINED, LONGER = 12, 48  # bits in training, bits when tested
WIDTH, BATCH, RATE = 32, 64, 3e-3
TESTED = 256  # sequences
NAMES = ("tanh network", "Mamba", "Mamba, bilinear")
TEXT = (
    f"After every bit the parity of the bits so far, trained on {TRAINED} random bits and tested "
    f"on {LONGER}: share of right answers within the trained length and beyond it, where guessing "
    "gives 0.5. The recurrent network is one tanh layer."
)


class TanhNetwork(nn.Module):
    """Embedding, one tanh recurrence, unembedding: the plain nonlinear recurrence."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(2, WIDTH)
        self.recurrence = nn.RNN(WIDTH, WIDTH, batch_first=True)
        self.unembed = nn.Linear(WIDTH, 2)

    def forward(self, bits: Int[Tensor, "batch pos"]) -> Float[Tensor, "batch pos 2"]:
        """Logits of even and odd after every bit."""
        return self.unembed(self.recurrence(self.embed(bits))[0])


def parity_runs(out: Path, *, seeds: int, steps: int) -> list[dict[str, Any]]:
    """Every model with every seed, like the measures of a grid; kept in `out/parity`, made once.

    Args:
        out: folder of the study
        seeds: of weights and bits
        steps: updates
    """
    folder, found = out / "parity", []
    folder.mkdir(parents=True, exist_ok=True)
    with one_thread():
        for name in NAMES:
            for seed in range(seeds):
                path = folder / f"{name}-seed{seed}-{steps}.json"
                if not path.exists():
                    measures = parity_run(name, seed=seed, steps=steps)
                    write_atomically(path, json.dumps(measures) + "\n")
                found.append(json.loads(path.read_text()))
    return found


def parity_run(name: str, *, seed: int, steps: int) -> dict[str, Any]:
    """Train one model and ask it for the parity within and beyond the trained length."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = _model(name)
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), RATE)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=steps)
    for _ in range(steps):
        bits = torch.randint(2, (BATCH, TRAINED), generator=generator)
        loss = nn.functional.cross_entropy(model(bits).mT, parities(bits))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    bits = torch.randint(2, (TESTED, LONGER), generator=torch.Generator().manual_seed(2**31 - 1))
    with torch.no_grad():
        right = (model.eval()(bits).argmax(-1) == parities(bits)).double()
    return {
        "task": "parity", "name": name, "seed": seed, "steps": steps,
        "n_parameters": sum(p.numel() for p in model.parameters()),
        "within": float(right[:, :TRAINED].mean()),
        "beyond": float(right[:, TRAINED:].mean()),
    }  # fmt: skip


def parities(bits: Int[Tensor, "batch pos"]) -> Int[Tensor, "batch pos"]:
    """Whether the number of ones so far is odd.

    >>> parities(torch.tensor([[1, 0, 1, 1]])).tolist()
    [[1, 1, 0, 1]]
    """
    return bits.cumsum(1) % 2


def _model(name: str) -> nn.Module:
    if name == "tanh network":
        return TanhNetwork()
    rule = "bilinear" if name.endswith("bilinear") else "mamba"
    return Mamba(MambaConfig(d_vocab=2, d_model=WIDTH, n_layers=2, n_ctx=LONGER, rule=rule))
