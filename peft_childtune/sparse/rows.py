"""Budgets shared by output neurons: every neuron keeps the same number of its best entries, give or take one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .budget import share_of
from .units import UnitGrid

_CHUNK = 1 << 22  # scores at a time


def select_per_neuron(grid: UnitGrid, *, density: float, read: Callable[[int, int], Tensor]) -> Tensor:
    """Return the entries of a child whose budget is spread over the output neurons.

    Every neuron keeps `floor(density * inputs)` of its best entries. What is left of the tensor's budget goes to the
    neurons whose next-best entry is largest, one each, the lowest neuron first among equals.

    Args:
        grid: an element grid of a weight with two dimensions or more.
        density: in (0, 1].
        read: returns the scores of the neurons from one number up to, not including, another, `(neurons, inputs)`, in
            any totally ordered dtype.

    Returns:
        int64, `(budget,)`, flat row-major positions, strictly increasing, on the CPU.
    """
    rows, columns = grid.matrix_shape
    neurons, inputs = (columns, rows) if grid.transposed else (rows, columns)
    stride_neuron, stride_input = (1, columns) if grid.transposed else (columns, 1)
    budget = share_of(density, grid.numel)
    each = min(int(density * inputs), budget // max(neurons, 1))
    kept, next_values, next_positions = [], [], []
    step = max(1, _CHUNK // max(inputs, 1))
    for start in range(0, neurons if budget else 0, step):
        scores = read(start, min(start + step, neurons)).cpu()
        # numpy finds the bound of a row ten times faster than torch 2.13, and knows no bfloat16
        array = (scores.float() if scores.dtype == torch.bfloat16 else scores).numpy()
        numbers = np.arange(start, start + len(array))
        chosen, last = _best_of_each_row(array, min(each + 1, inputs))
        if each < inputs:
            at = np.arange(len(array)), last
            chosen[at] = False
            next_values.append(array[at])
            next_positions.append(numbers * stride_neuron + last * stride_input)
        row, column = np.divmod(np.flatnonzero(chosen), inputs)
        kept.append(numbers[row] * stride_neuron + column * stride_input)
    extra = budget - each * neurons
    if extra:
        best = torch.sort(torch.from_numpy(np.concatenate(next_values)), descending=True, stable=True).indices[:extra]
        kept.append(np.concatenate(next_positions)[best.numpy()])
    # not torch's sort: with several threads on a busy machine it took 200 times as long
    return torch.from_numpy(np.sort(np.concatenate(kept))) if kept else torch.empty(0, dtype=torch.int64)


def _best_of_each_row(scores: Any, count: int) -> tuple[Any, Any]:
    """Return a mask of the best `count` of each row, leftmost first among equals, and the column of the worst."""
    place = scores.shape[1] - count
    bound = np.partition(scores, place, axis=1)[:, place, None]
    chosen = scores >= bound
    surplus = chosen.sum(1) - count
    for row in np.flatnonzero(surplus):
        equal = np.flatnonzero(scores[row] == bound[row])
        chosen[row, equal[-surplus[row] :]] = False
    last = scores.shape[1] - 1 - (chosen & (scores == bound))[:, ::-1].argmax(1)
    return chosen, last
