"""A batch shared among processes: which rows are whose, and what the loss of a share weighs.

Leaves out the processes themselves and the averaging of gradients: `accelerate`'s work, in
`update`. Loaded only where there is more than one process.
"""

from __future__ import annotations

from torch import Tensor


def share_of_batch(
    batch: dict[str, Tensor], process: int, processes: int
) -> tuple[dict[str, Tensor], float]:
    r"""Rows of `batch` for one process, and the weight of their mean loss.

    With the targets counted in share r as $c_r$, of R shares, the weight is

    $$w_r = \frac{R \, c_r}{\sum_s c_s}, \qquad
      \frac{1}{R} \sum_r w_r \, \ell_r = \ell_{\text{whole batch}}$$

    so that the mean of the weighted losses, and of their gradients, over processes is that of one
    process with the whole batch. Every process has the whole batch, so nothing is sent to count.

    >>> import torch
    >>> batch = {"tokens": torch.arange(15).view(5, 3)}
    >>> rows, weight = share_of_batch(batch, process=1, processes=2)
    >>> rows["tokens"][:, 0].tolist(), weight  # 3 of 5 rows, with as many targets each
    ([6, 9, 12], 1.2)

    Args:
        batch: tensors whose first axis are the rows; `loss_mask` [batch pos], if there is one, is
            True where a token is a target (position 0 never is), otherwise every row has as many
        process: number of this process
        processes: how many there are

    Returns:
        its rows and their weight. A share without a target is the whole batch, at weight 0: its
        own loss would not be defined.

    Raises:
        ValueError: if the tensors differ in rows, or there are fewer rows than processes
    """
    rows = {name: t.shape[0] if t.ndim else 0 for name, t in batch.items()}
    n_rows = next(iter(rows.values()))
    if set(rows.values()) != {n_rows}:
        raise ValueError(f"the tensors of a batch must have the same number of rows, got {rows}")
    if n_rows < processes:
        raise ValueError(
            f"a batch of {n_rows} rows cannot be shared among {processes} processes; make "
            "batch_size at least the number of processes"
        )
    own = slice(process * n_rows // processes, (process + 1) * n_rows // processes)
    share = {name: t[own] for name, t in batch.items()}
    count, total = _n_targets(share, own.stop - own.start), _n_targets(batch, n_rows)
    return (share, processes * count / total) if count else (batch, 0.0)


def _n_targets(batch: dict[str, Tensor], n_rows: int) -> int:
    """Targets of these rows, in units that cancel."""
    mask = batch.get("loss_mask")
    return n_rows if mask is None else int(mask[:, 1:].sum())
