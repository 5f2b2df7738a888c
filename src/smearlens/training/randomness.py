"""The state that training shares with whoever calls it or looks at it: generators and train modes.

Dropout draws from torch's global generator; so a look at the model in the middle of training must
put every generator back, and training itself leaves its caller's generators as it found them.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn


def random_states() -> dict[str, Any]:
    """The states of the global generators of torch, this process's GPU, numpy and Python.

    Returns:
        a dictionary of tensors, numbers and strings, which `torch.load` reads without pickled code
    """
    kind, words, *rest = np.random.get_state()  # noqa: NPY002 - the generator others may draw from
    python_version, python_words, python_gauss = random.getstate()
    states = {
        "python": [python_version, torch.tensor(python_words), python_gauss],
        "numpy": [kind, torch.from_numpy(np.asarray(words, dtype=np.int64)), *rest],
        "torch": torch.get_rng_state(),
    }
    if device := _device():
        states["device"] = device.get_rng_state()
    return states


def restore_random_states(states: dict[str, Any]) -> None:
    """Put the global generators back to what `random_states` returned."""
    python_version, python_words, python_gauss = states["python"]
    random.setstate((python_version, tuple(python_words.tolist()), python_gauss))
    kind, words, *rest = states["numpy"]
    np.random.set_state((kind, words.numpy().astype(np.uint32), *rest))  # noqa: NPY002 - as above
    torch.set_rng_state(states["torch"])
    if "device" in states and (device := _device()):
        device.set_rng_state(states["device"])


def seed_all(seed: int) -> None:
    """Seed the same generators."""
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002 - as above
    torch.manual_seed(seed)


@contextmanager
def leave_as_found(model: nn.Module) -> Iterator[None]:
    """Restore, whatever happens inside, the generators and which modules were in train mode."""
    states = random_states()
    training = [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        for module, mode in training:
            module.training = mode
        restore_random_states(states)


@contextmanager
def observing(model: nn.Module) -> Iterator[None]:
    """Look at `model` in eval mode and without gradients, and leave no trace in its training."""
    with leave_as_found(model), torch.no_grad():
        model.eval()
        yield


def _device() -> Any:
    """The module with `get_rng_state` of this process's GPU, if it has one."""
    if torch.cuda.is_available():
        return torch.cuda
    return torch.mps if torch.backends.mps.is_available() else None
