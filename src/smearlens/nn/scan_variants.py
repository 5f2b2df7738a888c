"""Ways to run the diagonal linear recurrence h_t = a_t · h_{t-1} + write_t, one signature for all.

Contains the definition (a loop over positions), the doubling scan and two log-space scans that are
here to be studied: they lose precision with length. Leaves out discretisation, read-out and the
blocked kernel that models train with (`scan`, `scan_blocks`).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from difflib import get_close_matches
from itertools import pairwise

import torch
from jaxtyping import Float
from torch import Tensor

LOG_OF_ZERO = -12.0  # what the approximation `logspace-floor` takes for log 0
LOG_OF_NOTHING = -1e30  # -inf for every purpose but gradients, which -inf would turn into nan


def linear_scan(
    a: Float[Tensor, "#batch #pos #channel #d_state"],
    write: Float[Tensor, "batch pos channel d_state"],
    *,
    initial_state: Float[Tensor, "batch channel d_state"] | None = None,
    method: str = "sequential",
) -> tuple[Float[Tensor, "batch pos channel d_state"], Float[Tensor, "batch channel d_state"]]:
    """The states h_t = a_t · h_{t-1} + write_t after each position, and the last of them.

    - `sequential`: the definition, position by position.
    - `doubling`: log2(pos) rounds of shifted products, each with twice the shift; as precise.
    - `logspace`: exp(S) · cumulative sum of write · exp(-S), with S = cumulative log a, all held as
      logarithms. Wrong by about 2^-24 · max |S| in float32, so worse the longer the sequence.
      Signs and zeros are exact: positive and negative terms are summed apart, a zero write adds
      nothing, and where some a is exactly 0 the scan starts afresh.
    - `logspace-floor`: the same with every logarithm cut off at -12 (log 0 := -12), so that a
      write of 0 counts as exp(-12) = 6e-6.

    The log-space methods have the gradient of their formulas, as a model trained with them would: a
    write that is exactly 0 (or below the floor) receives gradient 0, though its true one is not 0.

    Args:
        a: decay per step, of any sign; axes of size 1 broadcast
        write: what each step adds
        initial_state: the state before the first position; None for zeros
        method: one of these four

    Returns:
        all states, and the state after the last position

    Raises:
        ValueError: if there is no such method or no position

    Source:
        Hillis & Steele 1986, "Data parallel algorithms"; Heinsen 2023, arXiv 2311.06281

    Example:
        >>> a, write = torch.full((1, 3, 1, 1), 0.5), torch.ones(1, 3, 1, 1)
        >>> linear_scan(a, write)[0].flatten().tolist()
        [1.0, 1.5, 1.75]
    """
    if method not in METHODS:
        nearest = get_close_matches(method, METHODS, n=1, cutoff=0)
        raise ValueError(f"no scan {method!r}; nearest: {nearest}; methods: {list(METHODS)}")
    if write.shape[1] == 0:
        raise ValueError(f"write needs at least one position, got shape {tuple(write.shape)}")
    a = a.expand(*write.shape[:3], a.shape[3])
    if initial_state is None:
        initial_state = torch.zeros_like(write[:, 0])
    return METHODS[method](a, write, initial_state)


def _sequential(a: Tensor, write: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """The definition. Steps come from `unbind`: indexing inside the loop is quadratic in pos."""
    states = []
    for a_t, write_t in zip(a.unbind(1), write.unbind(1), strict=True):
        state = torch.addcmul(write_t, a_t, state)
        states.append(state)
    return torch.stack(states, 1), state


def _doubling(a: Tensor, write: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """After the round with shift s, `states` sums over the last 2s steps, `a` is their decay."""
    states = _absorb(a, write, state)
    shift = 1
    while shift < states.shape[1]:
        later = torch.addcmul(states[:, shift:], a[:, shift:], states[:, :-shift])
        states = torch.cat([states[:, :shift], later], 1)
        a = torch.cat([a[:, :shift], a[:, shift:] * a[:, :-shift]], 1)
        shift *= 2
    return states, states[:, -1]


def _logspace(a: Tensor, write: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """Pieces without a zero decay inside, joined by their states: a product with 0 has no log."""
    resets = (a == 0).any(3).any(2).any(0).nonzero().flatten().tolist()
    cuts = [0, *(position for position in resets if position > 0), a.shape[1]]
    pieces = []
    for start, stop in pairwise(cuts):
        piece = slice(start, stop)
        states = _log_sums(a[:, piece], _absorb(a[:, piece], write[:, piece], state), _exact_log)
        pieces.append(states)
        state = states[:, -1]
    return torch.cat(pieces, 1), state


def _logspace_floor(a: Tensor, write: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """One piece whatever `a` holds: a decay of 0 becomes exp(-12) as well."""
    states = _log_sums(a, _absorb(a, write, state), _floored_log)
    return states, states[:, -1]


def _absorb(a: Tensor, write: Tensor, state: Tensor) -> Tensor:
    """`write` with the decayed initial state added to its first step; a_0 is then used up."""
    first = torch.addcmul(write[:, 0], a[:, 0], state)
    return torch.cat([first.unsqueeze(1), write[:, 1:]], 1)


def _log_sums(a: Tensor, write: Tensor, log: Callable[[Tensor], Tensor]) -> Tensor:
    """h_t = Σ_{j<=t} write_j · a_{j+1} ⋯ a_t by logarithms of the moduli, the signs apart."""
    a = torch.cat([torch.ones_like(a[:, :1]), a[:, 1:]], 1)
    sign = torch.where(a < 0, -1.0, 1.0).to(a.dtype).cumprod(1)
    log_decay = log(a.abs()).cumsum(1)
    signed = write * sign
    terms = log(signed.abs()) - log_decay
    gained = torch.where(signed < 0, LOG_OF_NOTHING, terms).logcumsumexp(1)
    lost = torch.where(signed < 0, terms, LOG_OF_NOTHING).logcumsumexp(1)
    return sign * (torch.exp(log_decay + gained) - torch.exp(log_decay + lost))


def _exact_log(modulus: Tensor) -> Tensor:
    """log, with log 0 so far down that adding any sum of logarithms leaves its exp exactly 0."""
    empty = modulus == 0
    return torch.where(empty, LOG_OF_NOTHING, torch.where(empty, 1.0, modulus).log())


def _floored_log(modulus: Tensor) -> Tensor:
    """log, cut off at -12: the approximation log 0 := -12."""
    return modulus.clamp(min=math.exp(LOG_OF_ZERO)).log()


METHODS: dict[str, Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]] = {
    "sequential": _sequential,
    "doubling": _doubling,
    "logspace": _logspace,
    "logspace-floor": _logspace_floor,
}
