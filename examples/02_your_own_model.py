# ---
# jupyter:
#   kernelspec:
#     name: python3
#     display_name: Python 3
# ---

# %% [markdown]
# # Your own model
#
# smearlens does not ask for its own models. An analysis function reads a mapping from names to
# tensors, and the names are the interface. Three ways in, from the least work to the most:
# a dictionary, hook points in a model of your own, a new kind of layer.
#
# Each is checked here against structure that was planted, so that the right answer is known.

# %%
from types import SimpleNamespace

import torch
from torch import nn

from smearlens import (
    HookedModel,
    HookPoint,
    Mixing,
    ablate,
    audit,
    duplicate_token_score,
    induction_score,
    prev_token_score,
    repeated_tokens,
)
from smearlens.analysis.patterns import attention_span, lag_profile
from smearlens.viz.widgets import attention_heads

tokens = repeated_tokens(6, (5, 9), 30, 40, torch.Generator().manual_seed(0))
batch, length = tokens.shape

# %% [markdown]
# ## A dictionary
#
# Head 0 is a perfect induction head: it goes to what followed the last occurrence of its token, and
# rests on the first key where there is none. Head 1 always looks one back. Head 2 is uniform. (The
# control of head 0 is 1/6: one of the six examples has the period of its neighbour by chance.)

# %%
pattern = torch.zeros(batch, 3, length, length)
for b in range(batch):
    for q in range(length):
        earlier = [k for k in range(q) if tokens[b, k] == tokens[b, q]]
        pattern[b, 0, q, earlier[-1] + 1 if earlier else 0] = 1
        pattern[b, 1, q, max(q - 1, 0)] = 1
        pattern[b, 2, q, : q + 1] = 1 / (q + 1)

cache = {"blocks.0.attn.hook_pattern": pattern}  # [batch head query key]
scores = induction_score(cache, tokens)
print(scores)
print(prev_token_score(cache))
assert torch.equal(scores["blocks.0.attn"][:, 0], torch.ones(batch).double())

# %% [markdown]
# Where a model hands out q and k and no pattern (fused attention), cache those: the rows are then
# computed block by block and no [query, key] array is kept.

# %%
q, k = torch.randn(2, batch, length, 3, 8, generator=torch.Generator().manual_seed(1))
from_qk = {"blocks.0.attn.hook_q": q, "blocks.0.attn.hook_k": k}
weights = (q.transpose(1, 2) @ k.transpose(1, 2).mT * 8**-0.5).masked_fill(
    torch.ones(length, length).triu(1).bool(), -torch.inf
)
dense = {"blocks.0.attn.hook_pattern": weights.softmax(-1)}
a, b = (prev_token_score(c)["blocks.0.attn"] for c in (from_qk, dense))
print(f"from q and k, from the pattern: largest difference {float((a - b).abs().max()):.1e}")
assert torch.allclose(a, b, atol=1e-6)

# %% [markdown]
# ## Hook points
#
# To intervene and not only look, put each intermediate through a `HookPoint` under these names,
# in a `HookedModel`, which refuses names that it does not have. (In TransformerLens' own
# `HookedRootModule` our `HookPoint` works as well; what it adds to theirs is that no later hook can
# reach into a tensor that was cached before.) Below, a bare model with one planted head: its keys
# are the *previous* token's embedding, its queries and values the present one's, so that matching a
# key finds what followed. That is an induction head without any training.


# %%
class PlantedAttention(nn.Module):
    def __init__(self):
        super().__init__()
        self.hook_k = HookPoint()  # [batch pos head d_head]
        self.hook_pattern = HookPoint()  # [batch head query key]

    def forward(self, x):
        q, v = x[:, :, None], x
        k = self.hook_k(nn.functional.pad(x, (0, 0, 1, 0))[:, :-1, None])  # the token before
        scores = 20 * torch.einsum("bqhd,bkhd->bhqk", q, k)
        future = torch.ones(scores.shape[-2:]).triu(1).bool()
        pattern = self.hook_pattern(scores.masked_fill(future, -torch.inf).softmax(-1))
        return pattern[:, 0] @ v


class PlantedBlock(nn.Module):
    def __init__(self):
        super().__init__()
        self.attn = PlantedAttention()

    def forward(self, x):
        return self.attn(x)


class Planted(HookedModel):
    def __init__(self, d_vocab, n_ctx):
        super().__init__(SimpleNamespace(d_vocab=d_vocab, n_ctx=n_ctx))  # what `audit` must know
        self.embed = nn.functional.one_hot(torch.arange(d_vocab)).float()
        self.hook_embed = HookPoint()  # [batch pos d_vocab]
        self.blocks = nn.ModuleList([PlantedBlock()])
        self.setup()

    def forward(self, tokens):
        x = self.hook_embed(self.embed[tokens])
        for block in self.blocks:
            x = block(x)
        return x  # the embedding of the answer: logits over the vocabulary


model = Planted(40, n_ctx=length)
logits, cache = model.run_with_cache(tokens)
print(induction_score(cache, tokens))

# %% [markdown]
# Interventions run on it as on ours. `audit` needs what stands in its docstring: the two sizes in
# `config`, logits from tokens, and `hook_embed`:

# %%
print(ablate(model, tokens, "blocks.0.attn.hook_pattern", generator=torch.Generator()))
print(audit(model))
assert audit(model).passed

# %% [markdown]
# What they have no name for is a hook of one line. Give
# the keys the present token, and the induction head becomes a duplicate-token head (short of 1,
# since each query finds itself as well):


# %%
def unsmear(key, hook):
    return torch.cat((key[:, 1:], key[:, :1]), dim=1)


with model.hooks(fwd_hooks=[("blocks.0.attn.hook_k", unsmear)]):
    _, without = model.run_with_cache(tokens)
for name, given in {"as planted": cache, "keys moved back": without}.items():
    scores = [f(given, tokens).mean()["blocks.0.attn"] for f in
              (induction_score, duplicate_token_score)]  # fmt: skip
    print(f"{name:<16} induction {float(scores[0]):.3f}   duplicate token {float(scores[1]):.3f}")

# %% [markdown]
# ## A new kind of layer
#
# A layer that moves information between positions applies a matrix over positions, `M[query, key]`.
# Tell smearlens how to hand out rows of it, by subclassing `Mixing`, and every score, statistic and
# picture works. Here an exponential moving average, `y[t] = a · y[t-1] + (1 - a) · x[t]`, whose
# matrix is `M[q, k] = (1 - a) · a^(q - k)`: one decay per head, and no matrix in memory.


# %%
class MovingAverage(Mixing):
    signed = True  # the rows do not sum to 1: tell the scores to normalise them
    causal = True

    def __init__(self, decay, length):
        self.decay = decay
        self.n_examples, self.n_heads = 1, len(decay)
        self.n_queries = self.n_keys = length

    def rows(self, start, stop):
        lag = torch.arange(start, stop)[:, None] - torch.arange(self.n_keys)
        a = self.decay[:, None, None]
        return ((1 - a) * a ** lag.clamp(min=0) * (lag >= 0))[None]


decay = torch.tensor([0.2, 0.5, 0.9], dtype=torch.float64)
layer = MovingAverage(decay, 200)
x = torch.randn(200, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
y, state = [], torch.zeros(3, dtype=torch.float64)
for value in x:
    state = decay * state + (1 - decay) * value
    y.append(state)
assert torch.allclose(layer.dense()[0] @ x, torch.stack(y, -1))  # it is the layer's matrix

# %% [markdown]
# Far from the first row, the mean weight at lag 1 is `(1 - a) a` and the mean distance is
# `a / (1 - a)` tokens:

# %%
queries = torch.arange(200) >= 150
lag_1 = lag_profile(layer, max_lag=4, query_mask=queries).at(1)
span = attention_span({"blocks.0.ema": layer}, query_mask=queries).mean()["blocks.0.ema"]
for i, a in enumerate(decay.tolist()):
    print(
        f"a = {a}: weight at lag 1 {float(lag_1[i]):.4f} (closed form {(1 - a) * a:.4f}), "
        f"distance {float(span[i]):.3f} ({a / (1 - a):.3f}) tokens"
    )
assert torch.allclose(lag_1, (1 - decay) * decay, atol=1e-6)
assert torch.allclose(span, decay / (1 - decay), atol=1e-4)

# %% [markdown]
# Scores take a dictionary of mixings by layer name, pictures take the dense matrix:

# %%
short = MovingAverage(decay, length)
print(prev_token_score({"blocks.0.ema": short}))
attention_heads(
    short.dense()[0],
    [f" {t}" for t in tokens[0].tolist()],
    mask="causal",
    normalised=False,
    labels=[f"a = {a}" for a in decay.tolist()],
    title="moving averages",
)
