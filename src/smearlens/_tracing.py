"""Whether torch follows the operations of a model itself, so that only its own may be used.

Leaves out what is done then: each kernel written by hand has a plain twin of stock operations.
"""

from __future__ import annotations

import torch
from torch._C import _functorch


def is_traced() -> bool:
    """True inside `torch.compile` and `torch.export`, and where `is_transformed`.

    None of these follows a kernel that writes to memory of its own, or a look at values.
    """
    return torch.compiler.is_compiling() or is_transformed()


def is_transformed() -> bool:
    """True under a transform of `torch.func`: grad, vmap, jvp, jacrev, ..."""
    return _functorch.maybe_current_level() is not None
