"""Budgets shared by output neurons: every neuron keeps the same number of its best entries, give or take one."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .budget import share_of
from .units import UnitGrid

_CHUNK = 1 << 22  # scores at a time


def select_per_neuron(grid: UnitGrid, *, density: float, read: Callable[[Tensor], Tensor]) -> Tensor:
    """Return the entries of a child whose budget is spread over the output neurons.

    Every neuron keeps `floor(density * inputs)` of its best entries. What is left of the tensor's budget goes to the
    neurons whose next-best entry is largest, one each, the lowest neuron first among equals.

    Args:
        grid: an element grid of a weight with two dimensions or more.
        density: in (0, 1].
        read: maps flat positions (int64, any shape) to scores of that shape, in any totally ordered dtype.

    Returns:
        int64, `(budget,)`, flat row-major positions, strictly increasing.
    """
    rows, columns = grid.matrix_shape
    neurons, inputs = (columns, rows) if grid.transposed else (rows, columns)
    stride_neuron, stride_input = (1, columns) if grid.transposed else (columns, 1)
    budget = share_of(density, grid.numel)
    each = min(int(density * inputs), budget // max(neurons, 1))
    kept, next_values, next_positions = [], [], []
    step = max(1, _CHUNK // max(inputs, 1))
    for start in range(0, neurons if budget else 0, step):
        numbers = torch.arange(start, min(start + step, neurons))[:, None]
        positions = numbers * stride_neuron + torch.arange(inputs) * stride_input
        scores = read(positions)
        chosen, last = _best_of_each_row(scores, min(each + 1, inputs))
        if each < inputs:
            chosen.scatter_(1, last, False)
            next_values.append(scores.gather(1, last).flatten())
            next_positions.append(positions.to(last.device).gather(1, last).flatten())
        kept.append(positions[chosen.to(positions.device)])
    extra = budget - each * neurons
    if extra:
        order = torch.sort(torch.cat(next_values), descending=True, stable=True).indices[:extra]
        kept.append(torch.cat(next_positions)[order].to(kept[0].device))
    return torch.cat(kept).sort().values if kept else torch.empty(0, dtype=torch.int64)


def _best_of_each_row(scores: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return a mask of the best `count` of each row, leftmost first among equals, and the worst of them `(n, 1)`."""
    bound = scores.topk(count, dim=1).values[:, -1:]
    above, equal = scores > bound, scores == bound
    rank = equal.cumsum(1)
    chosen_equal = equal & (rank <= count - above.sum(1, keepdim=True))
    last = (chosen_equal * rank).argmax(1, keepdim=True)
    return above | chosen_equal, last
