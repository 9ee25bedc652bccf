"""The gradient of a child's delta from a layer's input and output gradient, at a cost that follows the child."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .extension import load_extension
from .hull import Hull, columns_of
from .options import WeightGradient, kernel_options
from .sampled import can_sample, sampled_product

__all__ = ["child_gradient", "choose_path"]

# Costs in multiply-adds of a dense product, fitted on two CPU cores in float32; that the choice is right shows in the
# cases `element:sampled` and `element:gather` of examples/benchmarks/step.py.
ENTRY_COST = {True: 3.3, False: 9.5}  # one kept entry, one token, of `sampled` by the extension or by torch
TRANSPOSE_COST = {True: 30.0, False: 120.0}  # one row or column of the hull, one token, for `sampled`
SELECT_COST = 40.0  # one row or column picked out of the others, one token
CALL_COST = 1e6  # of a `sampled` product, whatever its size


def choose_path(
    hull: Hull, *, nnz: int, tokens: int, dtype: torch.dtype, device: torch.device, is_whole: bool = True
) -> WeightGradient:
    """Return the path of the least estimated cost, or the one that `use_kernels` forces.

    Without the whole of both factors (`is_whole`) there is no dense product of the whole weight. The entry-by-entry
    product is a candidate on CPUs in float32 and float64 only: a CPU's low-precision dense product is 3 to 4 times as
    fast as its float32 one, and an accelerator's faster still relative to scattered reads.
    """
    if kernel_options.weight_gradient is not None:
        path = kernel_options.weight_gradient
        can_run = {"gather": is_whole, "hull": True, "sampled": can_sample(device.type, dtype)}
        return path if can_run[path] else "hull"
    rows, columns = hull.size
    cost: dict[WeightGradient, float] = {
        "gather": math.prod(hull.shape) * tokens,
        "hull": (rows * columns + _selection_cost(hull)) * tokens,
    }
    if not is_whole:
        del cost["gather"]
    if device.type == "cpu" and dtype in (torch.float32, torch.float64) and can_sample("cpu", dtype):
        fast = dtype == torch.float32 and load_extension() is not None
        per_token = ENTRY_COST[fast] * nnz + TRANSPOSE_COST[fast] * (rows + columns) + _selection_cost(hull)
        cost["sampled"] = per_token * tokens + CALL_COST
    return min(cost, key=cost.__getitem__)


def _selection_cost(hull: Hull) -> float:
    picked = [part.numel() for part in (hull.rows, hull.columns) if part is not None]
    return SELECT_COST * sum(picked)


def child_gradient(a: Tensor, b: Tensor, *, indices: Tensor, hull: Hull) -> Tensor:
    """Return the entries of `a.T @ b` at a child's positions.

    Args:
        a: `(tokens, rows)`, floating point; of `rows`, all of them or those of the hull alone.
        b: `(tokens, columns)`, of the same dtype, likewise.
        indices: `(nnz,)`, flat positions in `(rows, columns)`, strictly increasing.
        hull: of these positions.

    Returns:
        `(nnz,)`, of the dtype of `a`.

    Example:
        >>> a, b = torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, 5.0]])
        >>> child_gradient(a, b, indices=torch.tensor([1, 2]), hull=Hull((2, 2))).tolist()
        [5.0, 6.0]

    Source: SDDMM, sampled dense-dense matrix multiplication, as `torch.sparse.sampled_addmm`.
    """
    is_whole = (a.shape[1], b.shape[1]) == hull.shape
    path = choose_path(hull, nnz=indices.numel(), tokens=a.shape[0], dtype=a.dtype, device=a.device, is_whole=is_whole)
    if path == "gather":
        return (a.t() @ b).reshape(-1).index_select(0, indices)
    if path == "sampled":
        return sampled_product(a, b, indices=indices, hull=hull)
    one, other = columns_of(a, hull.rows), columns_of(b, hull.columns)
    is_flipped = one.shape[1] > other.shape[1]  # a product of few rows is faster than one of few columns
    dense = other.t() @ one if is_flipped else one.t() @ other
    if dense.numel() == indices.numel():  # the child fills its hull, as children of rows and columns do
        return (dense.t() if is_flipped else dense).reshape(-1)
    row, column = hull.place(indices)
    if is_flipped:
        row, column = column, row
    return dense.view(-1).index_select(0, row * dense.shape[1] + column)
