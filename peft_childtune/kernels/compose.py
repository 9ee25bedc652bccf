"""Base weights with deltas added, as autograd sees them: gradients arrive at the child's positions only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..sparse import compose
from .gate import StepGate
from .hull import Hull

__all__ = ["Edit", "compose_all", "compose_parameter", "gradients_of_values"]


@dataclass(frozen=True, eq=False)
class Edit:
    """One adapter's delta on one base tensor.

    Attributes:
        values: `(nnz,)`, the delta, floating point.
        indices: int64 or int32, `(nnz,)`, flat positions, strictly increasing; None for every position in order.
        gate: the gradient mask of the current step (Child-Tuning-F), or None.
        hull: the rows and columns of a matrix that hold these positions; None for all.
    """

    values: Tensor
    indices: Tensor | None
    gate: StepGate | None = None
    hull: Hull | None = None


def compose_all(
    base: Tensor,
    values: Sequence[Tensor],
    indices: Sequence[Tensor | None],
    rows: Sequence[Tensor | None] | None = None,
    columns: Sequence[Tensor | None] | None = None,
) -> Tensor:
    """Return a new tensor: `base` with each delta added in turn, rounded to the base's dtype after each.

    Args:
        base: any shape, floating point.
        values: the deltas.
        indices: of each delta, flat; None for every position.
        rows: of each delta's hull, None for all; left out if unknown.
        columns: likewise.
    """
    unknown = [None] * len(values)
    for delta, positions, row, column in zip(values, indices, rows or unknown, columns or unknown, strict=True):
        if positions is None:
            wide = torch.promote_types(base.dtype, torch.float32)
            base = (base.to(wide) + delta.to(wide).view(base.shape)).to(base.dtype)
        else:
            base = compose(base, positions, delta, rows=row, columns=column)
    return base


def gradients_of_values(
    gradient: Tensor,
    values: Sequence[Tensor],
    indices: Sequence[Tensor | None],
    gates: Sequence[StepGate | None],
    needed: Sequence[bool],
) -> list[Tensor | None]:
    """Return the gradient of each delta, given the `gradient` of the composed weight; None where not `needed`."""
    flat = gradient.reshape(-1)
    out: list[Tensor | None] = []
    for delta, positions, gate, wanted in zip(values, indices, gates, needed, strict=True):
        if not wanted:
            out.append(None)
            continue
        kept = (flat if positions is None else flat.index_select(0, positions)).to(delta.dtype)
        out.append(kept if gate is None else gate(kept))
    return out


class _Compose(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, base: Tensor, gates: tuple[StepGate | None, ...], *tensors: Tensor | None) -> Tensor:
        count = len(gates)
        ctx.gates = gates
        ctx.save_for_backward(*tensors)
        return compose_all(base, tensors[:count], tensors[count:])  # type: ignore[arg-type]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        count = len(ctx.gates)
        tensors = ctx.saved_tensors
        if gradient.is_sparse:  # nn.Embedding(sparse=True)
            gradient = gradient.to_dense()
        kept = gradients_of_values(
            gradient, tensors[:count], tensors[count:], ctx.gates, ctx.needs_input_grad[2 : 2 + count]
        )
        return gradient if ctx.needs_input_grad[0] else None, None, *kept, *([None] * count)


def compose_parameter(base: Tensor, edits: Sequence[Edit]) -> Tensor:
    """Return `base` with the deltas of `edits` added in turn; gradients flow to their values only.

    W' = round(float(W) + delta) at the child's positions, bit-equal to W everywhere else, whatever the dtype of W.

    Args:
        base: any shape, floating point; never written to.
        edits: one per active adapter, in the order in which they would be merged.

    Example:
        >>> values = torch.tensor([0.5], requires_grad=True)
        >>> composed = compose_parameter(torch.zeros(3), [Edit(values, torch.tensor([1]))])
        >>> composed.tolist()
        [0.0, 0.5, 0.0]
        >>> composed.mul(torch.tensor([1.0, 2.0, 4.0])).sum().backward()
        >>> values.grad.tolist()
        [2.0]
    """
    tensors = [*(edit.values for edit in edits), *(edit.indices for edit in edits)]
    # none to compute: `torch.compile` cannot trace a Function of which no argument requires one
    if not torch.is_grad_enabled() or not any(t.requires_grad for t in (base, *(edit.values for edit in edits))):
        return compose_all(base, tensors[: len(edits)], tensors[len(edits) :])  # type: ignore[arg-type]
    gates = tuple(edit.gate for edit in edits)
    return _Compose.apply(base, gates, *tensors)  # type: ignore[no-any-return, no-untyped-call]
