# ---
# jupyter:
#   kernelspec:
#     name: python3
#     display_name: Python 3
# ---

# %% [markdown]
# # Longer than trained
#
# A model is trained on windows of some length. What happens on longer ones? A learned table of
# positions has no rows beyond its end. Rotary positions have no table: they turn queries and keys
# by an angle, and can be asked for any. Here a convolution before one rotary attention layer
# ("Conv + Rotary + SDPA"), against the same without the convolution and without positions.

# %%
import json
from dataclasses import replace
from pathlib import Path

import matplotlib.pyplot as plt
import torch

from smearlens import ConvAttn, TrainConfig, train
from smearlens.analysis.behaviour import ar_split, per_token_loss
from smearlens.experiments.long_context.measures import GapBatches, gap_scores, gap_tokens

# %% [markdown]
# ## `n_ctx` of a rotary model is a limit, not a weight
#
# The same weights in a model built for 4,096 tokens say the same of short inputs, and do not refuse
# long ones. So build with the length you want to read, and train with the length you can afford.

# %%
torch.manual_seed(0)
size = {"d_vocab": 64, "d_model": 64, "n_heads": 4, "kernel_size": 3, "n_ctx": 96}
short = ConvAttn.from_preset("hybrid", **size)
long = ConvAttn(replace(short.config, n_ctx=4096))
long.load_state_dict(short.state_dict())
tokens = torch.randint(64, (2, 96), generator=torch.Generator().manual_seed(1))
print("equal logits:", torch.equal(short(tokens), long(tokens)))
try:
    short(torch.zeros(1, 97, dtype=torch.int64))
except ValueError as error:
    print(error)

learned = ConvAttn(replace(short.config, positions="learned"))
print(f"weights: rotary {long.n_parameters:,}, with a learned table {learned.n_parameters:,}")

# %% [markdown]
# ## Repeats at a distance
#
# A block of 16 distinct tokens comes back every `gap` tokens; everything else is noise of other
# tokens. Nothing but an earlier copy tells what comes next, and only what it predicts counts in the
# loss. In tests the block stands there once before.

# %%
example, targets = gap_tokens(1, 20, 48, 64, generator=torch.Generator().manual_seed(2))
print(example[0].tolist(), "of which count", int(targets.sum()))

models = {}
for name, changes in {
    "conv + rotary": {},
    "rotary": {"conv_on": None},
    "conv, no positions": {"positions": None},
}.items():
    torch.manual_seed(0)
    model = ConvAttn(replace(long.config, **changes))
    data = GapBatches(batch_size=16, gap=(16, 80), length=96, d_vocab=64, seed=0)
    train(model, data, TrainConfig(steps=200, lr=1e-2, warmup=20))
    models[name] = model.eval()

# %% [markdown]
# ## Trained at 96, read at up to 1,536
#
# The gap stays as trained; only the number of tokens that attention is spread over grows.

# %%
LENGTHS = (96, 384, 1536)


def repeats(gap, length, seed=3):
    generator = torch.Generator().manual_seed(seed)
    return gap_tokens(16, gap, length, 64, copies=2, generator=generator).tokens


accuracy = {
    name: [gap_scores(model, repeats(48, length))["accuracy"] for length in LENGTHS]
    for name, model in models.items()
}
fig, ax = plt.subplots(figsize=(6, 3))
for name, values in accuracy.items():
    ax.plot(LENGTHS, values, marker="o", label=name)
    print(
        f"{name:<20}",
        "  ".join(f"{length}: {v:.2f}" for length, v in zip(LENGTHS, values, strict=True)),
    )
ax.axvline(96, color="#9aa3ab", linestyle=":")
ax.set_xscale("log", base=2)
ax.set(xlabel="tokens of the sequence (trained: 96)", ylabel="accuracy at gap 48", ylim=(0, 1.02))
ax.legend(frameon=False, fontsize=8)
fig.tight_layout()

# %% [markdown]
# ## Larger gaps than trained
#
# Now the block lies further back than it ever did. Rotary attention meets angles it has not been
# trained on; without positions there is nothing to be surprised by.

# %%
for gap in (48, 160, 640, 1500):
    given = repeats(gap, gap + 36)
    scores = {name: gap_scores(model, given)["accuracy"] for name, model in models.items()}
    print(f"gap {gap:>5}  ", "  ".join(f"{name}: {v:.2f}" for name, v in scores.items()))

# %% [markdown]
# ## Recall in a text
#
# In a text the tokens that recall can help are those whose bigram stood in the context before.
# `ar_split` parts the loss by that (Arora et al. 2023); here on the sequences above, where the hits
# are the second block and, one in twelve, noise pairs that met before by chance: these cost the
# most.

# %%
given = repeats(48, 96)
for name, model in models.items():
    with torch.no_grad():
        logits = model(given)
    split = ar_split(logits, given)
    last = per_token_loss(logits, given)[:, -15:].mean()
    print(f"{name:<20} hits {split.hit_loss:.2f}  others {split.other_loss:.2f}  end {last:.2f}")

# %% [markdown]
# ## What the study found
#
# `smearlens experiment long-context --data FOLDER` trains at 256 tokens and reads up to 4,096, on
# repeats, tiny Shakespeare and TinyStories, with five seeds, matched weights and two layers of
# attention beside them. Its verdicts, if they are in this repository:

# %%
found = Path("results/long-context/result.json")
if found.exists():
    for verdict in json.loads(found.read_text("utf-8"))["verdicts"]:
        print(f"claim {verdict['claim']['number']}: {verdict['outcome']}")
        print(f"  “{verdict['claim']['statement']}”\n  {verdict['because']}\n")
else:
    print("none here: run the command above, or this from the root of the repository")
