# ---
# jupyter:
#   kernelspec:
#     name: python3
#     display_name: Python 3
# ---

# %% [markdown]
# # State space
#
# A selective state-space layer carries a state from token to token, and what it reads from that
# state is again a matrix over positions, its *hidden attention* (Ali et al. 2024):
# `y[i] = Σ_j M[i, j] u[j]`, one lower-triangular and signed matrix per channel. So every score of
# heads applies to channels.

# %%
import json
from pathlib import Path

import matplotlib.pyplot as plt
import torch

from smearlens import (
    Mamba,
    RepeatBatches,
    TrainConfig,
    induction_accuracy,
    induction_score,
    keep_lags,
    kernel_profile,
    mixings,
    prev_token_score,
    repeated_tokens,
    train,
)
from smearlens.analysis.patterns import lag_profile
from smearlens.analysis.states import half_life, memory_profile, retention
from smearlens.analysis.stats import over_seeds
from smearlens.causal.lags import exchange_lags
from smearlens.nn.discretize import discretize
from smearlens.viz.plots import draw_kernel_profile
from smearlens.viz.widgets import attention_heads, delta_strip, state_map

torch.manual_seed(0)
model = Mamba.from_preset("cpu", d_vocab=16, d_model=32, d_state=8, kernel_size=2, n_ctx=24)
data = RepeatBatches(batch_size=32, period=(4, 8), length=24, d_vocab=16, seed=0)
train(model, data, TrainConfig(steps=400, lr=1e-2, warmup=40))
model.eval()

tokens = repeated_tokens(64, (4, 8), 24, 16, torch.Generator().manual_seed(1))
with torch.no_grad():
    logits, cache = model.run_with_cache(tokens)
print(f"{model.n_parameters:,} parameters")
print(f"accuracy on repeats {float(induction_accuracy(logits, tokens).mean()):.3f}")

# %% [markdown]
# The state-sized activations, `hook_A_bar`, `hook_B_bar`, `hook_write` and `hook_state`, exist only
# while something is hooked to them; the layer says which way it computes:

# %%
print(model.blocks[0].ssm.path)

# %% [markdown]
# ## The hidden attention is exact
#
# `mixings` builds it from what the layer used, whatever its discretisation, and hands out rows,
# diagonals or the whole. Applied to the layer's input it gives the layer's output (up to the skip
# `D · u`, which mixes no positions).

# %%
mixing = mixings(cache)["blocks.0.ssm"]
u, y = cache["blocks.0.ssm.hook_u"], cache["blocks.0.ssm.hook_y"]
rebuilt = torch.einsum("bcqk,bkc->bqc", mixing.dense(), u) + model.blocks[0].ssm.D.detach() * u
print(f"{mixing.n_heads} channels, largest difference {float((rebuilt - y).abs().max()):.1e}")
assert torch.allclose(rebuilt, y, atol=1e-4)

# %% [markdown]
# ## Scores of channels
#
# The map is signed and its rows do not sum to 1, so a score needs weights: `normalise="abs"`, |M|
# over its row sum, is the default and is written beside the result.

# %%
scores = induction_score(cache, tokens)
print(f"{scores.name}; {scores.note}; chance {float(scores.chance['blocks.0.ssm']):.3f}")
for row in scores.top(5):
    print(
        f"channel {row['head']:>2}: {row['score']:.3f} [{row['low']:.3f}, {row['high']:.3f}], "
        f"control {row['control']:.3f}"
    )
print(f"best previous-token score {prev_token_score(cache).top(1)[0]['score']:.3f}")

# %%
channels = [row["head"] for row in scores.top(4)]
words = [f" {t}" for t in tokens[0].tolist()]
attention_heads(
    mixing.dense()[0, channels],
    words,
    mask="causal",
    normalised=False,
    labels=[f"channel {c}" for c in channels],
    title="hidden attention of the four best channels",
)

# %% [markdown]
# No channel is a clean induction head, as heads of attention are: the best lie clearly above chance
# and control, and far from 1. The work is spread over channels.
#
# The convolution in front of the layer has the two taps that a smeared key needs: the present token
# and the one before.

# %%
profile = kernel_profile(cache)
print(profile)
fig, ax = plt.subplots(figsize=(4, 3))
draw_kernel_profile(ax, profile)
fig.tight_layout()

# %% [markdown]
# Both taps lie where those of an untrained kernel do, so the profile alone says nothing. The
# intervention does: without either tap most of the accuracy goes.

# %%
for kept in ([0, 1], [0], [1]):
    with torch.no_grad(), model.hooks(fwd_hooks=keep_lags(model, "blocks.0.conv", kept)):
        accuracy = induction_accuracy(model(tokens), tokens).mean()
    print(f"convolution with lags {kept}: accuracy {float(accuracy):.3f}")

# %% [markdown]
# ## What is written: the step size Δ
#
# A large Δ writes the token and lets go of the past; a Δ near 0 passes the token over. The bars are
# one channel at a time, the slider goes through the four best.

# %%
delta = cache["blocks.0.ssm.hook_delta"][0]  # [pos channel]
delta_strip(delta[:, channels].T, words, labels=[f"channel {c}" for c in channels])

# %% [markdown]
# ## How long it is kept
#
# `retention(s → t)` is the product of |Ā| over the steps after s up to t: a token is not decayed by
# its own step. `half_life` is the first lag at which less than half is left.

# %%
A_bar, B_bar = cache["blocks.0.ssm.hook_A_bar"], cache["blocks.0.ssm.hook_B_bar"]
left = retention(A_bar).mean((0, 2, 3))  # at the last position
print("kept until the end, from each position back:")
print(" ".join(f"{float(v):.2f}" for v in left.flip(0)))
lives = half_life(A_bar)[:, : tokens.shape[1] // 2]  # the early ones have room to be forgotten
print(
    f"half-life: median {float(lives.median()):.0f} tokens, "
    f"{float((lives == torch.inf).float().mean()):.0%} longer than the sequence goes on"
)

# %%
memory = memory_profile(A_bar, B_bar, max_lag=16).nanmean(0)[channels]
lags = lag_profile(cache, max_lag=16)["blocks.0.ssm"].mean()[channels]
fig, (left_ax, right_ax) = plt.subplots(1, 2, figsize=(8, 3), sharex=True, layout="constrained")
for channel, kept, read in zip(channels, memory, lags, strict=True):
    left_ax.plot(kept, label=f"channel {channel}")
    right_ax.plot(read)
left_ax.set(xlabel="lag (tokens)", ylabel="mean write weight", title="what the state holds")
right_ax.set(xlabel="lag (tokens)", ylabel="mean hidden attention", title="what is read from it")
_ = left_ax.legend(frameon=False, fontsize=8)

# %% [markdown]
# The state of one channel after each token, eight numbers wide:

# %%
state = cache["blocks.0.ssm.hook_state"][0, :, channels[0]]
state_map(state, words, labels=[f"channel {channels[0]}"])

# %% [markdown]
# ## Three discretisations
#
# From (Δ, A, B) to the step of the recurrence there are several rules. `mamba` takes exp(ΔA) and
# Δ·B, which lets a constant input grow above its level; `zoh` and `bilinear` keep the level; and
# `bilinear` has *negative* decays where Δ|A| > 2: the state changes sign at each step.

# %%
step, rate, one = torch.tensor([[0.1], [1.0], [3.0]]), -torch.ones(1, 1), torch.ones(3, 1)
for rule in ("mamba", "zoh", "bilinear", "bilinear-clamped"):
    decays, gains = (factor.flatten() for factor in discretize(step, rate, one, rule))
    level = gains / (1 - decays)  # where a constant input of 1 settles
    print(
        f"{rule:16} Ā {' '.join(f'{v:6.3f}' for v in decays)}   "
        f"level {' '.join(f'{v:.3f}' for v in level)}"
    )

# %% [markdown]
# Do they matter for induction? `smearlens experiment mamba-induction` trains each with several
# seeds, and models with kernels of 1 to 4 taps beside them. These are the numbers of the committed
# run, with intervals over seeds, if it is in this repository.

# %%
found = Path("results/mamba-induction/result.json")
if found.exists():
    induction = json.loads(found.read_text("utf-8"))
    for name in dict.fromkeys(m["name"] for m in induction["measures"]):
        runs = [m for m in induction["measures"] if m["name"] == name]
        accuracy = over_seeds([m["accuracy"] for m in runs])
        negative = sum(m["negative_decays"] for m in runs) / len(runs)
        print(f"{name:26} accuracy {accuracy}, negative Ā {negative:.1%}")
    for verdict in induction["verdicts"]:
        print(f"\n{verdict['outcome'].upper()}: {verdict['claim']['statement']}")
        print(f"  {verdict['because']}")
else:
    print("none here: run the command above, or this from the root of the repository")

# %% [markdown]
# The same study exchanges what the lags of the convolution bring to one role of the layer with
# those of an example in which the same tokens stand in another order. `exchange_lags` does it here,
# for the model trained above: with B, the key under which a token is written, the model stops
# finding what followed in its own example; the other roles matter less.

# %%
other = torch.stack([row[torch.randperm(len(row))] for row in tokens])
for role in ("u", "B", "C", "delta"):
    with torch.no_grad(), model.hooks(exchange_lags(model, tokens, other, [role])):
        accuracy = induction_accuracy(model(tokens), tokens).mean()
    print(f"{role:5} with the lags of shuffled examples: accuracy {float(accuracy):.3f}")

# %% [markdown]
# ## Scans and their precision
#
# The recurrence can be run position by position, in blocks (what models train with here), by
# doubling, or as sums of logarithms. `smearlens experiment scans` compares them. A sum of
# logarithms loses digits as it grows; products of decays do not. Drawn from its committed run, if
# that is in this repository.

# %%
found = Path("results/scans/result.json")
if found.exists():
    scans = json.loads(found.read_text("utf-8"))
    fig, ax = plt.subplots(figsize=(6, 3.4), layout="constrained")
    for scan in dict.fromkeys(row["scan"] for row in scans["measures"]):
        points = [
            (row["length"], row["error"])
            for row in scans["measures"]
            if (row["scan"], row["regime"], row["dtype"]) == (scan, "gates, s = 4", "float32")
        ]
        lengths = sorted({length for length, _ in points})
        worst = [max(e for n, e in points if n == at) for at in lengths]
        ax.plot(lengths, worst, "o-", label=scan)
    ax.set(
        xscale="log", yscale="log", xlabel="length (tokens)", ylabel="relative error, worst seed"
    )
    ax.legend(frameon=False, fontsize=8)
    print(scans["verdicts"][0]["outcome"].upper(), scans["verdicts"][0]["claim"]["statement"])
    print(scans["verdicts"][0]["because"])
else:
    print("none here: run the command above, or this from the root of the repository")
