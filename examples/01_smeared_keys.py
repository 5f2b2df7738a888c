# ---
# jupyter:
#   kernelspec:
#     name: python3
#     display_name: Python 3
# ---

# %% [markdown]
# # Smeared keys
#
# One attention layer cannot do induction. To continue `A B … A` with `B`, a query must find the
# position *after* the earlier `A`, so the key there has to say "an A stood before me". Nothing in a
# single layer writes that into the key. Two things can: a convolution before the attention, or a
# *smeared key*, a learned mixture of each key with the one before it (Olsson et al. 2022).
#
# Three models of the same size, trained equally long on repeated random tokens: attention alone
# (the control), attention after a causal convolution of three taps, attention with smeared keys.
# %%
import matplotlib.pyplot as plt
import torch

from smearlens import (
    ConvAttn,
    RepeatBatches,
    TrainConfig,
    audit,
    induction_accuracy,
    induction_score,
    kernel_profile,
    repeated_tokens,
    role_without_lags,
    train,
)
from smearlens.viz.plots import draw_bars, draw_kernel_profile
from smearlens.viz.widgets import attention_heads


def trained(steps, period=(8, 20), **changes):
    torch.manual_seed(0)
    model = ConvAttn.from_preset("cpu", **changes)
    data = RepeatBatches(batch_size=32, period=period, length=48, d_vocab=64, seed=0)
    train(model, data, TrainConfig(steps=steps, lr=3e-3, warmup=min(100, steps // 3)))
    return model.eval()


models = {
    "attention alone": trained(400, conv_on=None, residual=True),
    "convolution": trained(400, residual=True),
    "smeared keys": trained(400, conv_on=None, smear=True, residual=True),
}

# %% [markdown]
# ## What they do
#
# Held-out repeats, the period drawn anew for every sequence. `induction_accuracy` counts only the
# tokens that induction can predict: those whose predecessor stood earlier in the sequence.

# %%
tokens = repeated_tokens(64, (8, 20), 48, 64, torch.Generator().manual_seed(1))
caches = {}
for name, model in models.items():
    with torch.no_grad():
        logits, caches[name] = model.run_with_cache(tokens)
    accuracy = float(induction_accuracy(logits, tokens).mean())
    print(f"{name:<16} {model.n_parameters:,} parameters   accuracy on repeats {accuracy:.3f}")

# %% [markdown]
# ## Where their heads look
#
# A score is a mean weight on the tokens that followed earlier occurrences of the query's token. It
# stands beside what uniform attention gets (*chance*), the best attainable value (*maximum*) and
# the same head on another sequence's targets (*control*; lifted by the one pair in 13 whose periods
# agree by chance).

# %%
for name in models:
    print(name)
    print(induction_score(caches[name], tokens), "\n")

# %% [markdown]
# In the picture an induction head is a stripe that begins where the first repeat does. Hover a head
# to see it large, click to keep it.

# %%
best = caches["convolution"]["blocks.0.attn.hook_pattern"][0]
attention_heads(best, [f" {t}" for t in tokens[0].tolist()], mask="causal", title="convolution")

# %% [markdown]
# ## What the convolution learned
#
# Judge a kernel by its RMS over channels, next to what an untrained kernel has. The *signed mean*
# in the last column says nothing: flip the sign of a channel and of the weights that read it and
# the function is the same.

# %%
profile = kernel_profile(caches["convolution"])
print(profile)
fig, ax = plt.subplots(figsize=(5, 3))
draw_kernel_profile(ax, profile)
fig.tight_layout()

# %% [markdown]
# Lag 1, the previous token, is far above the untrained band. With smeared keys the same knowledge
# is one number per head, the weight on the previous key:

# %%
print(caches["smeared keys"]["blocks.0.attn.smear.hook_weight"])

# %% [markdown]
# ## Is it the keys?
#
# A profile is a correlation. The test is to take the lags away from one role at a time: give the
# queries, the keys or the values what they would be if the convolution read the present token only,
# and leave everything else alone. The control moves the same activations as far in a random
# direction.

# %%
effects = {
    roles: role_without_lags(
        models["convolution"], tokens, roles, generator=torch.Generator().manual_seed(2)
    )
    for roles in ("q", "k", "v", "qkv")
}
for effect in effects.values():
    print(effect)

bars = {
    f"without lags\nin {'+'.join(roles)}": {
        "accuracy": (
            float(e.changed.mean()),
            *(float(e.clean.mean()) + end for end in e.interval()),
        )
    }
    for roles, e in effects.items()
}
fig, ax = plt.subplots(figsize=(5, 3))
draw_bars(ax, bars, ylabel="accuracy on repeats", level=1 / 64, level_name="chance")
fig.tight_layout()

# %% [markdown]
# The keys carry it: without lags in K the model is as lost as without any, while V hardly matters.
# That is what "smeared keys" claims.
#
# ## The leak
#
# Two student write-ups used "same" padding: the convolution of width three then reads the *next*
# token, and next-token prediction becomes reading. Accuracy soars and nothing has been learned.

# %%
leaking = trained(150, causal=False)
with torch.no_grad():
    logits, cache = leaking.run_with_cache(tokens)
print(f"accuracy on repeats {float(induction_accuracy(logits, tokens).mean()):.3f}")
print(f"best induction score {induction_score(cache, tokens).top(1)[0]['score']:.3f}\n")
report = audit(leaking)
print(report)
assert not report.passed

# %% [markdown]
# Independent random tokens cannot be predicted, so no honest model gets below ln V on them; and
# `audit` names the first activation that depends on later tokens. The causal model passes:

# %%
assert audit(models["convolution"]).passed

# %% [markdown]
# ## The fixed-period trap
#
# Train attention *alone* on repeats of one period and it scores like an induction head. It has only
# learned to look 15 back.

# %%
positional = trained(300, period=16, conv_on=None)
same_period = repeated_tokens(64, 16, 48, 64, torch.Generator().manual_seed(3))
for name, given in {"period 16": same_period, "periods 8 to 20": tokens}.items():
    with torch.no_grad():
        logits, cache = positional.run_with_cache(given)
    head = induction_score(cache, given).top(1)[0]
    print(
        f"{name:<16} accuracy {float(induction_accuracy(logits, given).mean()):.3f}   "
        f"score {head['score']:.3f}   control {head['control']:.3f}"
    )

# %% [markdown]
# On one period the control, the targets of *another* sequence, equals the score for *any* head,
# matching or not: such a batch cannot tell them apart. Varied periods can: accuracy and score fall,
# and the score is hardly higher than its control. So draw the period for each sequence.
