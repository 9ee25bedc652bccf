"""A sparse delta of one weight, and how it is added to the base: in fp32, rounded once."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import DeltaError


@dataclass(frozen=True, eq=False)
class SparseDelta:
    """Fine-tuned minus base for one weight, at the positions of its child and nowhere else.

    Args:
        shape: the weight's shape.
        indices: int64, `(nnz,)`, flat row-major positions, strictly increasing.
        values: floating point, `(nnz,)`, one number per index.

    Raises:
        DeltaError: the three do not fit together.

    Example:
        >>> delta = SparseDelta(shape=(2, 3), indices=torch.tensor([1, 5]), values=torch.tensor([0.5, -1.0]))
        >>> delta.nnz, delta.numel
        (2, 6)
        >>> delta.to_dense()
        tensor([[ 0.0000,  0.5000,  0.0000],
                [ 0.0000,  0.0000, -1.0000]])
    """

    shape: tuple[int, ...]
    indices: Tensor
    values: Tensor

    def __post_init__(self) -> None:
        if any(size < 0 for size in self.shape):
            raise DeltaError(f"shape {self.shape} has a negative size; give the shape of the weight.")
        check_positions(self.indices, limit=self.numel, what="indices")
        if not self.values.is_floating_point():
            raise DeltaError(f"values have dtype {self.values.dtype}; a delta needs a floating point dtype.")
        if self.values.shape != self.indices.shape:
            raise DeltaError(
                f"values have shape {tuple(self.values.shape)} beside {self.indices.numel()} indices; "
                f"give exactly one value per index."
            )

    @property
    def nnz(self) -> int:
        """Kept entries."""
        return self.indices.numel()

    @property
    def numel(self) -> int:
        """All entries of the weight."""
        return math.prod(self.shape)

    @property
    def density(self) -> float:
        """`nnz / numel`, and 0 for a weight without entries."""
        return self.nnz / self.numel if self.numel else 0.0

    def to_dense(self, dtype: torch.dtype | None = None) -> Tensor:
        """Return the delta as a tensor of the weight's shape, zero outside the child.

        Args:
            dtype: of the result; the dtype of `values` if not given.
        """
        dense = torch.zeros(self.numel, dtype=dtype or self.values.dtype, device=self.values.device)
        dense[self.indices.to(dense.device)] = self.values.detach().to(dense.dtype)
        return dense.view(self.shape)


def check_positions(positions: Tensor, *, limit: int, what: str) -> None:
    """Raise `DeltaError` unless `positions` is 1-D int64, strictly increasing and within `[0, limit)`."""
    if positions.dtype != torch.int64 or positions.ndim != 1:
        raise DeltaError(
            f"{what} are {positions.dtype} of shape {tuple(positions.shape)}; give int64 positions of shape (n,)."
        )
    if positions.numel() == 0:
        return
    # numpy where it can: on a busy CPU, torch's threads wait for each other for longer than the comparison takes
    ordered = positions.numpy() if positions.device.type == "cpu" else positions
    if positions.numel() > 1 and not bool((ordered[1:] > ordered[:-1]).all()):
        raise DeltaError(f"{what} are not strictly increasing; sort them and drop repeated ones.")
    first, last = int(positions[0]), int(positions[-1])
    if first < 0 or last >= limit:
        raise DeltaError(f"{what} span {first} to {last}; they must lie within [0, {limit}).")


def compose_entries(base: Tensor, values: Tensor) -> Tensor:
    """Return `base + values`, summed in fp32 (fp64 for an fp64 base) and rounded once to the base's dtype.

    Merged and unmerged outputs are equal bit for bit because every path to a fine-tuned weight goes through this sum.

    Args:
        base: `(nnz,)`, any floating point dtype.
        values: `(nnz,)`, the delta at the same entries.

    Example:
        >>> compose_entries(torch.tensor([1.0], dtype=torch.bfloat16), torch.tensor([0.01]))
        tensor([1.0078], dtype=torch.bfloat16)
    """
    wide = torch.float64 if base.dtype == torch.float64 else torch.float32
    if base.dtype == values.dtype == wide:
        return base + values
    return (base.to(wide) + values.to(wide)).to(base.dtype)


def compose(
    base: Tensor, indices: Tensor, values: Tensor, *, rows: Tensor | None = None, columns: Tensor | None = None
) -> Tensor:
    """Return a new contiguous tensor: `base` with the delta added at `indices` as in `compose_entries`.

    Args:
        base: any shape and layout, floating point; left as it is.
        indices: int64 or int32, `(nnz,)`, flat row-major positions, none of them twice.
        values: `(nnz,)`, the delta.
        rows: of a matrix, those that hold all of `indices`, strictly increasing; None for all. Where the child is
            these rows, or these columns, whole lines are added, which is faster.
        columns: likewise.

    Example:
        >>> compose(torch.zeros(2, 2), torch.tensor([3]), torch.tensor([1.5]))
        tensor([[0.0000, 0.0000],
                [0.0000, 1.5000]])
    """
    composed = base.detach().clone(memory_format=torch.contiguous_format)
    flat = composed.view(-1)
    if base.dtype not in (torch.float32, torch.float64):
        flat.index_put_((indices.long(),), compose_entries(flat.index_select(0, indices), values.detach()))
        return composed
    delta = values.detach().to(base.dtype)  # the same sum, in one pass instead of three
    if rows is not None and columns is None and delta.numel() == rows.numel() * base.shape[1]:
        composed.index_add_(0, rows, delta.view(-1, base.shape[1]))
    elif columns is not None and rows is None and delta.numel() == base.shape[0] * columns.numel():
        composed.index_add_(1, columns, delta.view(base.shape[0], -1))
    else:
        flat.index_add_(0, indices, delta)
    return composed
