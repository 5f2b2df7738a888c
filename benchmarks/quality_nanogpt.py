"""Is CharGPT as good as nanoGPT? Its recipe for a CPU on tiny Shakespeare, in several seeds.

    python benchmarks/quality_nanogpt.py --out runs/nanogpt

nanoGPT's README trains 4 layers of 4 heads, 128 wide, on 12 windows of 64 characters for 2,000
updates without dropout, and prints a validation loss of 1.88, estimated on 20 random batches. Here
the same model, split and updates, and the loss of the whole validation text with contexts of 1 to
64 characters, which is what the estimate estimates; beside it the estimate itself with its standard
error. A window of 65 characters has 64 targets, so the model has 65 positions, the last of which is
only ever a target. Beside it the same with rotary instead of learned positions, and nothing else
changed. The same command continues where it stopped and writes `quality.json`.

That this is the recipe and no other is checked by the recipe written out in plain torch below:
from the same weights and batches its losses are those of our log, update by update.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import smearlens
from smearlens._files import write_atomically
from smearlens.analysis.behaviour import per_token_loss
from smearlens.analysis.stats import over_seeds
from smearlens.data.batches import TokenBatches
from smearlens.data.corpora import load_corpus
from smearlens.data.tokenizers import CharTokenizer
from smearlens.experiments.threads import one_thread
from smearlens.models.char_gpt import CharGPT
from smearlens.training.config import TrainConfig
from smearlens.training.evaluation import text_loss
from smearlens.training.loop import train
from smearlens.training.randomness import observing

README = 1.88  # nats per character, printed by nanoGPT
BATCH, LENGTH, STEPS = 12, 65, 2000  # 64 targets per window
ESTIMATED = 20  # batches of nanoGPT's estimate
COMPARED = 150  # updates compared with plain torch
N_HEADS = 4


def run_seed(seed: int, out: Path, positions: str = "learned") -> dict[str, Any]:
    """Train and evaluate one seed in `out`, or read what a finished one found."""
    path = out / "measures.json"
    if path.exists():
        return json.loads(path.read_text())
    texts = [load_corpus("tiny-shakespeare", split).text for split in ("train", "validation")]
    tokens, held_out = map(CharTokenizer(texts[0]).encode, texts)
    model = fresh(seed, positions)
    config = TrainConfig(
        steps=STEPS, lr=1e-3, warmup=100, weight_decay=0.1, betas=(0.9, 0.99), seed=seed,
        checkpoint_every=STEPS // 4,
    )  # fmt: skip
    started = time.process_time()
    result = train(model, TokenBatches(tokens, BATCH, LENGTH, seed), config, out=out)
    seconds = time.process_time() - started
    whole = text_loss(model, held_out, length=LENGTH)
    windows = [
        TokenBatches(held_out, BATCH, LENGTH, seed).batch(step)["tokens"]
        for step in range(ESTIMATED)
    ]
    with observing(model):
        each = torch.cat([per_token_loss(model(w), w).double().mean(1) for w in windows])
    measures = {
        "seed": seed,
        "val_loss": whole.nats_per_token,
        "bits_per_character": whole.bits_per_character,
        "n_targets": whole.n_targets,
        "estimate": float(each.mean()),
        "estimate_standard_error": float(each.std() / len(each) ** 0.5),
        "train_loss": sum(row["loss"] for row in result.log("metrics")[-100:]) / 100,
        "cpu_seconds": round(seconds, 1),  # of this call: less for a run that was continued
    }
    write_atomically(path, json.dumps(measures) + "\n")
    return measures


def fresh(seed: int, positions: str = "learned") -> CharGPT:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return CharGPT.from_preset("cpu", n_ctx=LENGTH, positions=positions)


def summary(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Over the seeds: the loss of the whole text with its interval, and the mean estimate."""
    losses = over_seeds([run["val_loss"] for run in runs])
    return {
        "val_loss": {"mean": losses.mean, "low": losses.low, "high": losses.high, "n": losses.n},
        "estimate": sum(run["estimate"] for run in runs) / len(runs),
        "runs": runs,
    }


def plain_loss(w: dict[str, Tensor], x: Tensor, targets: Tensor) -> Tensor:
    """The recipe's model in plain torch: loss of [batch 64] characters, `w` by our names."""

    def norm(name: str, x: Tensor) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], w[f"{name}.weight"])

    x = w["embed.weight"][x] + w["pos_embed.table"][: x.shape[1]]
    for i in range(4):
        block = f"blocks.{i}"
        qkv = F.linear(norm(f"{block}.ln1", x), w[f"{block}.attn.in_proj.weight"])
        q, k, v = (t.unflatten(-1, (N_HEADS, -1)).transpose(1, 2) for t in qkv.chunk(3, -1))
        z = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
        x = x + F.linear(z, w[f"{block}.attn.out_proj.weight"])
        up = F.gelu(F.linear(norm(f"{block}.ln2", x), w[f"{block}.mlp.up.weight"]))
        x = x + F.linear(up, w[f"{block}.mlp.down.weight"])
    logits = F.linear(norm("ln_final", x), w["embed.weight"])
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def plain_losses(seed: int, updates: int) -> list[float]:
    """Losses of the first updates of the recipe, written out in plain torch."""
    text = load_corpus("tiny-shakespeare").text
    batches = TokenBatches(CharTokenizer(text).encode(text), BATCH, LENGTH, seed)
    weights: dict[str, Tensor] = {
        name: nn.Parameter(p.detach()) for name, p in fresh(seed).named_parameters()
    }
    groups = [[p for p in weights.values() if (p.ndim > 1) == matrix] for matrix in (True, False)]
    optimizer = torch.optim.AdamW(
        [{"params": p, "weight_decay": d} for p, d in zip(groups, (0.1, 0.0), strict=True)],
        betas=(0.9, 0.99),
    )
    losses = []
    for step in range(updates):
        tokens = batches.batch(step)["tokens"]
        loss = plain_loss(weights, tokens[:, :-1], tokens[:, 1:])
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(weights.values(), 1.0)
        cosine = (1 + math.cos(math.pi * (step - 100) / (STEPS - 100))) / 2
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * (step + 1) / 101 if step < 100 else 1e-4 + 9e-4 * cosine
        optimizer.step()
        losses.append(loss.item())
    return losses


def compared(seed: int, out: Path) -> dict[str, float]:
    """The largest difference between the losses of plain torch and those of our log; nats."""
    rows = (out / "metrics.jsonl").read_text().splitlines()[:COMPARED]
    ours = [json.loads(row)["loss"] for row in rows]
    gaps = [abs(a - b) for a, b in zip(plain_losses(seed, COMPARED), ours, strict=True)]
    return {"updates": COMPARED, "seed": seed, "largest_difference": max(gaps)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/nanogpt"))
    parser.add_argument("--seeds", type=int, default=3)
    given = parser.parse_args()
    with one_thread():
        runs = [run_seed(seed, given.out / f"seed{seed}") for seed in range(given.seeds)]
        plain = compared(0, given.out / "seed0")
        rotary = [
            run_seed(seed, given.out / f"rotary-seed{seed}", "rotary")
            for seed in range(given.seeds)
        ]
    result = {
        "command": f"python benchmarks/quality_nanogpt.py --seeds {given.seeds}",
        "recipe": "CharGPT preset cpu: 4 layers, 4 heads, 128 wide, no biases, tied, exact GELU; "
        "12 random windows with 64 targets, 2,000 updates, AdamW (betas 0.9 and 0.99, weight decay "
        "0.1 on matrices), rate 1e-3 after 100 updates of warm-up, cosine to 1e-4, norm of the "
        "gradient clipped at 1, no dropout, float32",
        "versions": {"smearlens": smearlens.__version__, "torch": torch.__version__,
                     "python": platform.python_version()},
        "nanogpt_readme": README,
        "plain_torch": plain,
        **summary(runs),
        "rotary": summary(rotary),
    }  # fmt: skip
    write_atomically(given.out / "quality.json", json.dumps(result, indent=1) + "\n")
    for name, each in (("the recipe", runs), ("with rotary positions", rotary)):
        for run in each:
            print(
                f"{name}, seed {run['seed']}: validation {run['val_loss']:.4f} nats per character "
                f"({run['bits_per_character']:.3f} bits), training {run['train_loss']:.4f}, "
                f"nanoGPT's estimate {run['estimate']:.3f} ± {run['estimate_standard_error']:.3f}"
            )
        losses = over_seeds([run["val_loss"] for run in each])
        print(f"{name}: mean {losses}; nanoGPT's README: {README}")
    print(
        f"the recipe in plain torch, same weights and batches: the losses of {COMPARED} updates "
        f"differ by at most {plain['largest_difference']:.1e}"
    )


if __name__ == "__main__":
    main()
