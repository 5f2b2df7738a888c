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
import matplotlib.pyplot as plt
import torch

from smearlens import (
    Mamba,
    RepeatBatches,
    TrainConfig,
    induction_accuracy,
    induction_score,
    kernel_profile,
    mixings,
    prev_token_score,
    repeated_tokens,
    train,
)
from smearlens.analysis.patterns import lag_profile
from smearlens.analysis.states import half_life, memory_profile, retention
from smearlens.viz.plots import draw_kernel_profile
from smearlens.viz.widgets import attention_heads, delta_strip, state_map

torch.manual_seed(0)
model = Mamba.from_preset("cpu", d_model=32, d_state=8)
data = RepeatBatches(batch_size=32, period=(4, 6), length=24, d_vocab=16, seed=0)
result = train(model, data, TrainConfig(steps=STEPS, lr=1e-2, warmup=40))
model.eval()
