"""The gradient of a child's delta from a layer's input and output gradient, at a cost that follows the child."""

from __future__ import annotations

import math
import warnings
from functools import lru_cache

import torch
from torch import Tensor

from .hull import Hull, columns_of
from .options import WeightGradient, kernel_options

__all__ = ["child_gradient", "choose_path"]

CHUNK = 128  # tokens of one product: their transposed copies stay in the cache
TILE = 32  # tokens that are transposed by one product with the identity

# Costs in multiply-adds of a dense product, fitted on two CPU cores in float32; that the choice is right shows in the
# cases `element:sampled` and `element:gather` of examples/benchmarks/step.py.
SAMPLED_COST = 9.5  # one kept entry, one token
TRANSPOSE_COST = 120.0  # one row or column of the hull, one token, brought into the order that `sampled` reads
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
        can_run = {"gather": is_whole, "hull": True, "sampled": _can_sample(device.type)}
        return path if can_run[path] else "hull"
    rows, columns = hull.size
    cost: dict[WeightGradient, float] = {
        "gather": math.prod(hull.shape) * tokens,
        "hull": (rows * columns + _selection_cost(hull)) * tokens,
    }
    if not is_whole:
        del cost["gather"]
    if device.type == "cpu" and dtype in (torch.float32, torch.float64) and _can_sample("cpu"):
        per_token = SAMPLED_COST * nnz + TRANSPOSE_COST * (rows + columns) + _selection_cost(hull)
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
        return _sampled(a, b, indices, hull)
    one, other = columns_of(a, hull.rows), columns_of(b, hull.columns)
    is_flipped = one.shape[1] > other.shape[1]  # a product of few rows is faster than one of few columns
    dense = other.t() @ one if is_flipped else one.t() @ other
    if dense.numel() == indices.numel():  # the child fills its hull, as children of rows and columns do
        return (dense.t() if is_flipped else dense).reshape(-1)
    row, column = hull.place(indices)
    if is_flipped:
        row, column = column, row
    return dense.view(-1).index_select(0, row * dense.shape[1] + column)


def _sampled(a: Tensor, b: Tensor, indices: Tensor, hull: Hull) -> Tensor:
    """Return the entries one by one: each a scalar product over the tokens, which must lie side by side for it."""
    dtype = a.dtype if a.dtype in (torch.float32, torch.float64) else torch.float32
    rows = hull.size[0]
    row, column = hull.place(indices)
    starts = torch.searchsorted(row, torch.arange(rows + 1, dtype=row.dtype, device=row.device), out_int32=True)
    entries = torch.zeros(indices.numel(), dtype=dtype, device=a.device)
    _pass_the_beta_warning()
    product = torch.sparse_csr_tensor(starts, column.to(torch.int32), entries, size=hull.size, check_invariants=False)
    a, b = columns_of(a, hull.rows), columns_of(b, hull.columns)
    one, other = (torch.empty(0, dtype=dtype, device=a.device) for _ in range(2))
    for start in range(0, a.shape[0], CHUNK):
        chunk = slice(start, start + CHUNK)
        one = _tokens_last(a[chunk].to(dtype), out=one)
        other = _tokens_last(b[chunk].to(dtype), out=other)
        torch.sparse.sampled_addmm(product, one, other.t(), out=product)
    return product.values().to(a.dtype)


def _tokens_last(matrix: Tensor, *, out: Tensor) -> Tensor:
    """Return `(tokens, n)` as a contiguous `(n, tokens)`, in the memory of `out` if that has this shape.

    By products with the identity where it can: torch's own transposition runs in one thread, and no faster in one.
    """
    tokens, width = matrix.shape
    if out.shape != (width, tokens):
        out = matrix.new_empty(width, tokens)
    if matrix.device.type != "cpu" or tokens % TILE:
        return out.copy_(matrix.t())
    tiles = matrix.reshape(-1, TILE, width).transpose(1, 2)
    torch.bmm(
        tiles,
        _identity(matrix.dtype).expand(len(tiles), -1, -1),
        out=out.view(width, len(tiles), TILE).transpose(0, 1),
    )
    return out


@lru_cache(maxsize=2)
def _identity(dtype: torch.dtype) -> Tensor:
    return torch.eye(TILE, dtype=dtype, device="cpu")


@lru_cache(maxsize=1)
def _pass_the_beta_warning() -> None:
    """Let torch give its warning about compressed tensors, which it gives once, where nobody has to read it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.sparse_csr_tensor([0, 0], [], [], size=(1, 1), dtype=torch.float32)


@lru_cache(maxsize=8)
def _can_sample(device_type: str) -> bool:
    """Return whether torch has the entry-by-entry product for a kind of device: not every build does."""
    one = torch.ones(1, 1, device=device_type)
    _pass_the_beta_warning()
    try:
        place = torch.tensor([0, 1], dtype=torch.int32, device=device_type)
        product = torch.sparse_csr_tensor(place, place[:1], one[0], size=(1, 1), check_invariants=False)
        return bool(torch.sparse.sampled_addmm(product, one, one).values().item() == 2)
    except (NotImplementedError, RuntimeError):
        return False
