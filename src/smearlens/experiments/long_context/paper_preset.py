r"""WikiText-2 with GPT-2's vocabulary at the sizes of the write-up: how to train it, what it costs.

    python -c "from smearlens.experiments.long_context.paper_preset import train_paper; \
        train_paper('ConvAttn', 'wikitext-2-raw', 'runs/paper-conv')"

The loss streams over the 50,257 logits of a token and never holds [batch pos d_vocab]. Leaves out
evaluation (`training.evaluation.text_loss`).
"""

from __future__ import annotations

import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch

from smearlens._files import write_atomically
from smearlens.data.batches import TokenBatches
from smearlens.data.corpora import load_corpus
from smearlens.data.synthetic import iid_tokens
from smearlens.data.tokenizers import gpt2_tokenizer
from smearlens.experiments.threads import one_thread
from smearlens.models.base import HookedModel
from smearlens.models.families import family
from smearlens.training.config import TrainConfig
from smearlens.training.loop import TrainResult, train
from smearlens.training.update import adamw

BATCH, LENGTH, EPOCHS = 32, 256, 15  # of the write-up
MODELS = ("ConvAttn", "AttnAttn")
TRAIN_TOKENS = 2_400_000  # of WikiText-2's training part in GPT-2's tokens, rounded
TIMED_WINDOWS = 2  # per timed update: its tokens are scaled up, its optimiser step is not


def train_paper(
    model: str, corpus: str | Path, out: str | Path, *, epochs: int = EPOCHS, seed: int = 0
) -> TrainResult:
    """Train preset `paper` of a model class as the write-up did: 15 epochs, 32 windows of 256.

    Args:
        model: "ConvAttn" or "AttnAttn"
        corpus: a name or path that `load_corpus` takes
        out: folder of the run; the same call continues a killed one
        epochs: passes over the text
        seed: of weights and data order
    """
    tokens = gpt2_tokenizer().encode(load_corpus(corpus).text)
    steps = max(1, epochs * len(tokens) // (BATCH * LENGTH))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        made = family(model).from_preset("paper")
    config = TrainConfig(steps=steps, lr=3e-4, warmup=min(500, steps // 10), seed=seed)
    return train(made, TokenBatches(tokens, BATCH, LENGTH, seed, "shuffled"), config, out=out)


def paper_costs(path: Path, steps: int) -> list[dict[str, Any]]:
    """The cost of both models, measured once and kept in a file; nothing for 0 steps."""
    if steps and not path.exists():
        found = [paper_cost(name, steps=steps) for name in MODELS]
        write_atomically(path, json.dumps(found) + "\n")
    return json.loads(path.read_text()) if steps else []


def paper_cost(model: str, *, steps: int, preset: str = "paper") -> dict[str, Any]:
    """Time a few updates of a preset on one thread, and what 15 epochs would take.

    Gradients cost in proportion to their tokens, the optimiser once per update, whatever the batch:
    the two are timed apart (medians of `steps`, after one more that is not counted).

    Returns:
        CPU seconds per thousand tokens and per optimiser step, updates and hours of 15 epochs,
        number of weights
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        made: HookedModel = family(model).from_preset(preset)
    length = min(LENGTH, made.config.n_ctx)
    tokens = iid_tokens(
        TIMED_WINDOWS, length, made.config.d_vocab, generator=torch.Generator().manual_seed(0)
    )
    gradient, update = _timed(made, tokens, steps)
    updates = EPOCHS * TRAIN_TOKENS // (BATCH * LENGTH)
    per_token = gradient / tokens.numel()
    seconds = EPOCHS * TRAIN_TOKENS * per_token + updates * update
    return {
        "model": model, "preset": preset, "n_parameters": made.n_parameters,
        "seconds_per_1000_tokens": 1000 * per_token, "seconds_per_optimiser_step": update,
        "updates": updates, "hours": seconds / 3600, "streams_loss": bool(made.streams_loss),
    }  # fmt: skip


def _timed(model: Any, tokens: torch.Tensor, steps: int) -> tuple[float, float]:
    """Median CPU seconds of a gradient and of an optimiser step."""
    optimizer = adamw(model.train(), TrainConfig(steps=1))
    seconds: list[tuple[float, float]] = []
    with one_thread():
        for _ in range(steps + 1):
            optimizer.zero_grad()
            started = time.process_time()
            model(tokens, return_type="loss").backward()
            middle = time.process_time()
            optimizer.step()
            seconds.append((middle - started, time.process_time() - middle))
    gradients, updates = zip(*seconds[1:], strict=True)
    return statistics.median(gradients), statistics.median(updates)
