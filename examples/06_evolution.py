# ---
# jupyter:
#   kernelspec:
#     name: python3
#     display_name: Python 3
# ---

# %% [markdown]
# # Attention over training
#
# What do the heads of a character model look like before they learn anything, and when does that
# change? `AttentionTracking` measures every layer and head at chosen steps of training; a `Tracker`
# calls it. It changes nothing: not a digit of the losses.
#
# Here a small model for a few seconds; at the end, what the whole study found.

# %%
import json
from pathlib import Path

import matplotlib.pyplot as plt
import torch

from smearlens import (
    AttentionTracking,
    CharGPT,
    CharGPTConfig,
    CharTokenizer,
    TokenBatches,
    Tracker,
    TrainConfig,
    load_corpus,
    train,
)
from smearlens.analysis.association import association_within_run
from smearlens.analysis.coherence import coherence
from smearlens.analysis.phase_change import phase_change
from smearlens.analysis.text import distinct_n, diversity
from smearlens.viz.evolution_plots import band, draw_attention_metrics, draw_layer_similarity
from smearlens.viz.widgets import evolution

text = load_corpus("tiny-shakespeare").text
tokenizer = CharTokenizer(text)
tokens = tokenizer.encode(text)
held_out = tokenizer.encode(load_corpus("tiny-shakespeare", "validation").text)
windows = held_out[: 8 * 48].view(8, 48)

STEPS = 250


def trained(callbacks=()):
    torch.manual_seed(0)
    model = CharGPT(CharGPTConfig(d_vocab=tokenizer.d_vocab, d_model=48, n_heads=3, n_layers=3,
                                  n_ctx=48))  # fmt: skip
    config = TrainConfig(steps=STEPS, lr=1e-2, warmup=20, betas=(0.9, 0.99))
    data = TokenBatches(tokens, batch_size=16, length=48, seed=0)
    return model.eval(), train(model, data, config, callbacks=callbacks)


tracking = AttentionTracking(windows, generator=torch.Generator().manual_seed(1))
shots = {}


def snapshot(moment):
    """Any function of the moment is a callback: this one keeps the patterns on one text."""
    if moment.step in (0, 10, 30, 60, 100, 150, STEPS):
        with torch.no_grad():
            _, cache = moment.model.run_with_cache(windows[:1, :32])
        patterns = [cache[f"blocks.{i}.attn.hook_pattern"][0] for i in range(3)]
        shots[moment.step] = torch.cat(patterns)


model, result = trained([Tracker(tracking), snapshot])
looks = result.log("tracking")
print(f"held-out loss {looks[0]['loss']:.2f} -> {looks[-1]['loss']:.2f} nats per character")
print(f"{len(looks)} looks, {len(looks[0])} numbers each")

# %% [markdown]
# ## Tracking changes nothing
#
# The same training without anything attached has the same log, number by number. So two runs that
# differ in what was logged cannot differ in their loss; where they seem to, it is the noise of the
# seeds.

# %%
_, plain = trained()
print("equal logs:", plain.log("metrics") == result.log("metrics"))

# %% [markdown]
# ## Entropy and distance
#
# An untrained model attends almost uniformly, so the entropy starts at its maximum *by
# construction* and has one way to go. Divided by the logarithm of the number of keys it is 1 for
# uniform attention whatever the length.

# %%
layers = {f"layer {i + 1}": f"blocks.{i}" for i in range(3)}
lines = {
    kind: {name: band([looks], f"{kind}/{layer}") for name, layer in layers.items()}
    for kind in ("normalised_entropy", "distance")
}
fig, axes = plt.subplots(2, 1, figsize=(7, 4.6), sharex=True)
draw_attention_metrics(
    axes, lines["normalised_entropy"], lines["distance"],
    null_entropy=looks[0]["normalised_entropy/blocks.0"], null_span=looks[0]["distance/blocks.0"],
)  # fmt: skip
axes[0].set_xscale("symlog")
axes[0].set_xlim(left=0)
fig.tight_layout()

# %% [markdown]
# Drag the slider: the nine heads on one held-out text, from uniform to what they became.

# %%
evolution(
    torch.stack(list(shots.values())),
    list(shots),
    tokenizer.tokens(windows[0, :32]),
    mask="causal",
    labels=[f"layer {i // 3 + 1}, head {i % 3 + 1}" for i in range(9)],
    scale="sqrt",
)

# %% [markdown]
# ## Which layers are alike?
#
# The causal mask alone makes any two patterns similar: two random heads have a cosine of 0.5 to
# 0.7. So every similarity stands beside its null. Here the null is the same model on the same text
# with its characters shuffled; the left end of each line is the untrained model.

# %%
pairs = {"1-2": "blocks.0-blocks.1", "1-3": "blocks.0-blocks.2", "2-3": "blocks.1-blocks.2"}
fig, ax = plt.subplots(figsize=(7, 3))
draw_layer_similarity(
    ax,
    {name: band([looks], f"js/{pair}") for name, pair in pairs.items()},
    null={name: looks[-1][f"shuffled/js/{pair}"] for name, pair in pairs.items()},
    null_name="shuffled text",
    ylabel="1 - JS / ln 2",
)
ax.set_xscale("symlog")
ax.set_xlim(left=0)
fig.tight_layout()

# %% [markdown]
# ## Did it happen at once?
#
# `phase_change` fits two segments that may jump, and asks whether a smooth curve does as well. Its
# interval is never finer than the looks; with one seed it says only between which two looks.

# %%
steps = [look["step"] for look in looks]
for kind in ("normalised_entropy", "js"):
    names = layers.values() if kind != "js" else pairs.values()
    series = [sum(look[f"{kind}/{name}"] for name in names) / 3 for look in looks]
    print(f"{kind:<20} {phase_change(series, steps)}")

# %% [markdown]
# ## Does it go with the loss?
#
# Within one run everything follows the step, and any two series correlate. What counts is what is
# left of the changes from look to look, or once the trend is taken out; and to claim anything, that
# over at least five seeds.

# %%
similarity = [sum(look[f"js/{pair}"] for pair in pairs.values()) / 3 for look in looks]
loss = [look["loss"] for look in looks]
print("plain correlation", f"{torch.corrcoef(torch.tensor([similarity, loss]))[0, 1]:.2f}")
print(association_within_run(similarity, loss, steps))

# %% [markdown]
# ## What it writes
#
# Sampling at a high temperature is varied and nonsense, at a low one it repeats itself: quality
# needs more than one number. Coherence is the cosine of counts of character 3-grams, beside that of
# prompts and continuations that do not belong together.

# %%
prompts = windows[:, :16]
asked = [tokenizer.decode(row) for row in prompts]
for temperature in (0.3, 0.8, 1.3):
    generator = torch.Generator().manual_seed(2)
    written = model.generate(prompts, 32, temperature=temperature, generator=generator)
    given = [tokenizer.decode(row[16:]) for row in written]
    print(
        f"{temperature}: distinct-3 {distinct_n(given, 3, unit='char'):.2f}  "
        f"diversity {diversity(given, unit='char').mean():.2f}  {coherence(asked, given)}"
    )
    print("    ", repr(given[0]))

# %% [markdown]
# ## What the study found
#
# `smearlens experiment evolution --data FOLDER` does all this for six layers, three data sets and
# five seeds, with interventions on attention while the models write. Its verdicts, if they are in
# this repository:

# %%
found = Path("results/evolution/result.json")
if found.exists():
    for verdict in json.loads(found.read_text("utf-8"))["verdicts"]:
        print(f"claim {verdict['claim']['number']}: {verdict['outcome']}")
        print(f"  “{verdict['claim']['statement']}”\n  {verdict['because']}\n")
else:
    print("none here: run the command above, or this from the root of the repository")
