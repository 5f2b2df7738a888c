# ---
# jupyter:
#   kernelspec:
#     name: python3
#     display_name: Python 3
# ---

# %% [markdown]
# # Where Mamba keeps a word
#
# A Mamba translates to Pig Latin as a decoder alone: word, `[EOS]`, translation, `[EOS]`. It has no
# attention to look back with. What it knows of the word when it starts to write must sit in its
# states, or in the last few inputs that its short convolutions still see. Which?
#
# The words below are of tiny Shakespeare; 21 of the 116 are on the list that the model was trained
# on four fifths of.

# %%
import json
from pathlib import Path

import matplotlib.pyplot as plt
import torch

from smearlens import (
    PigLatinVocabulary,
    cut_convolution,
    hold_states,
    load_model,
    pig_latin_pairs,
    read_states,
    score_words,
    set_states,
    to_pig_latin,
)
from smearlens.analysis.states import half_life, retention, state_boundary
from smearlens.experiments.pig_latin.mamba_evidence import Words, exchange, exchange_window
from smearlens.viz.widgets import delta_strip

model = load_model("pig-latin-mamba")
config = model.config
print(f"{model.n_parameters:,} parameters, {config.n_layers} layers, {config.kernel_size} taps")

words = list(pig_latin_pairs(min_letters=4, max_letters=9))[::80]
scores = score_words(model, words, layout="joined")
low, high = scores.interval()
print(
    f"{scores.right} of {scores.total} words right: {scores.accuracy:.3f} [{low:.3f}, {high:.3f}]"
)

# %% [markdown]
# ## What the steps suggest
#
# Δ says how strongly a layer writes a token and how much of the past that costs. Below, its mean
# over channels, layer by layer, for one word and its translation.

# %%
vocabulary = PigLatinVocabulary()
shown = Words((("conditioning", to_pig_latin("conditioning")),))
symbols = vocabulary.tokens(shown.tokens[0])
with torch.no_grad():
    _, cache = model.run_with_cache(shown.tokens)
layers = [f"blocks.{i}.ssm" for i in range(config.n_layers)]
delta_strip(
    [cache[f"{layer}.hook_delta"][0].mean(1) for layer in layers],
    symbols,
    labels=layers,
    title="mean Δ",
)

# %% [markdown]
# Retention is the product of the decays: the share of what a state held after each token that is
# left at the end. The half-life counts tokens until less than half is left; the flat part at the
# top, at the length of the sequence, is of states that never lost half.

# %%
fig, (left, right) = plt.subplots(1, 2, figsize=(10, 3.4), layout="constrained")
for layer in layers:
    decays = cache[f"{layer}.hook_A_bar"]
    left.plot(retention(decays)[0].mean((1, 2)), ".-", label=layer)
    lives = half_life(decays)[0, 0].flatten()  # of what the first token wrote
    right.plot(sorted(lives.clamp(max=len(symbols)).tolist()), label=layer)
left.set_xticks(range(len(symbols)), [s.replace("[EOS]", "∎") for s in symbols], fontsize=7)
left.set(xlabel="token (∎ is [EOS])", ylabel="left at the end (fraction)", ylim=(0, 1))
right.set(xlabel="state, sorted", ylabel="half-life of the first token (tokens)")
left.legend(frameon=False, fontsize=8)

# %%
some = Words(tuple(words))
with torch.no_grad():
    _, cache = model.run_with_cache(some.tokens)
for layer in layers:
    pair = (cache[f"{layer}.hook_A_bar"], cache[f"{layer}.hook_B_bar"])
    found = state_boundary(*pair, some.end, mask=some.mask)
    print(
        f"{layer}: writes after [EOS] over writes before {float(found.write_ratio.nanmean()):.2f}, "
        f"left of the state at [EOS] when all is written {float(found.retention.mean()):.2f}"
    )

# %% [markdown]
# These are weights, not effects. To say what carries the word, take it away.
#
# ## One word put into another
#
# The model reads `stone` and then gets the states that it has after reading `brown`, in all layers.
# Both words have five letters, so nothing else differs but what the convolutions saw.

# %%
brown, stone = (Words(((word, to_pig_latin(word)),)) for word in ("brown", "stone"))
mixed = Words(brown.pairs, sources=stone.pairs)  # stone, [EOS], ownbray
states = set_states(model, read_states(model, brown.tokens, brown.end), mixed.end)
windows = exchange_window(model, brown.tokens, mixed.end)
runs = {"nothing": [], "states": states, "windows": windows, "both": [*states, *windows]}
for name, hooks in runs.items():
    with torch.no_grad():
        logits = model.run_with_hooks(mixed.tokens, fwd_hooks=hooks)
    end = int(mixed.end[0])
    written = logits[0, end:-1].argmax(-1)  # given the right letters so far
    print(f"{name:8} put in: {' '.join(vocabulary.tokens(written))}")

# %% [markdown]
# Over many words: the share of the translations that come out right, letter by letter. Putting a
# word's own states into its own run must change nothing, and a third word's states must not help;
# states and windows together are all that the recurrence holds, so they must give the word's own
# run. What states alone do lies between.

# %%
for offset in (0, 2):
    print(f"exchanged {offset} tokens after [EOS]:")
    for name, value in exchange(model, some, offset).items():
        print(f"  {name:26} {value:.3f}" if name != "words" else f"  {value} words")

# %% [markdown]
# ## Each carrier taken away
#
# States set to 0 at `[EOS]`; the convolutions cut there, so that nothing from before reaches what
# comes after; Δ = 0 after `[EOS]`, so that states keep what they have and nothing is written any
# more.


# %%
def share(hooks):
    return float(some.right(model, hooks).double().mean())


empty = {k: torch.zeros_like(v) for k, v in read_states(model, some.tokens, some.end).items()}
print(f"untouched                    {share([]):.3f}")
print(f"states wiped at [EOS]        {share(set_states(model, empty, some.end)):.3f}")
print(f"convolutions cut at [EOS]    {share(cut_convolution(model, some.end)):.3f}")
print(f"nothing written after [EOS]  {share(hold_states(model, some.end + 1)):.3f}")

# %% [markdown]
# Almost two thirds of the words survive without any writing after `[EOS]`. That the rest fail does
# not say that the word is elsewhere: the states also keep track of how much was written.
#
# `smearlens experiment mamba-pig-latin` asks this of models with 4 and 16 taps and several seeds,
# and with it what the discretisation, a selective Δ and A are good for. Its committed verdicts, if
# they are in this repository:

# %%
found = Path("results/mamba-pig-latin/result.json")
if found.exists():
    for verdict in json.loads(found.read_text("utf-8"))["verdicts"]:
        print(f"{verdict['outcome'].upper()}: {verdict['claim']['statement']}")
        print(f"  {verdict['because']}")
else:
    print("none here: run the command above, or this from the root of the repository")
