"""The three products of a linear layer over a composed weight, as plain functions and as operators of torch.

`torch.compile` sees the operators, and not into them: traced, the composed weight of the forward would be recognised
as that of the backward and kept in between, a second copy of the model.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .compose import compose_all
from .hull import Hull
from .operator import operator
from .weight_gradient import child_gradient

__all__ = ["delta_gradients", "input_gradient", "linear_output", "plain_linear"]


def plain_linear(x: Tensor, weight: Tensor, bias: Tensor | None, *, transposed: bool) -> Tensor:
    """Return the very operation of `nn.Linear`, or of GPT-2's `Conv1D` (weight `(in, out)`), so that bits agree."""
    if not transposed:
        return F.linear(x, weight, bias)
    flat = x.reshape(-1, x.shape[-1])
    out = torch.mm(flat, weight) if bias is None else torch.addmm(bias, flat, weight)
    return out.view(*x.shape[:-1], weight.shape[1])


@operator(
    "linear_output",
    fake=lambda x, weight, bias, values, indices, rows, columns, transposed, cast: x.new_empty(
        *x.shape[:-1], weight.shape[1 if transposed else 0]
    ),
)
def linear_output(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    values: Sequence[Tensor],
    indices: Sequence[Tensor | None],
    rows: Sequence[Tensor | None],
    columns: Sequence[Tensor | None],
    transposed: bool,
    cast: bool,
) -> Tensor:
    """Return the output `(..., out)` of a linear layer over `weight` with deltas added; nothing else stays.

    Args:
        x: `(..., in)`.
        weight: `(out, in)`, or `(in, out)` if `transposed`.
        bias: `(out,)` or None.
        values: the deltas.
        indices: of each delta, flat; None for every position.
        rows: of each delta's hull, None for all.
        columns: likewise.
        transposed: see `weight`.
        cast: multiply in the precision of `x`, as autocast does, rather than refuse another one of the weight.
    """
    composed = compose_all(weight, values, indices, rows, columns)
    if cast:
        composed = composed.to(x.dtype)
    out = plain_linear(x, composed, bias, transposed=transposed)
    # a view made in here could not be changed in place by the model's code, as DeBERTa and inplace ReLUs do
    return torch.ops.aten._unsafe_view(out, out.shape) if out._is_view() else out


@operator(
    "input_gradient",
    fake=lambda gradient, weight, values, indices, rows, columns, transposed: gradient.new_empty(
        gradient.shape[0], weight.shape[0 if transposed else 1]
    ),
)
def input_gradient(
    gradient: Tensor,
    weight: Tensor,
    values: Sequence[Tensor],
    indices: Sequence[Tensor | None],
    rows: Sequence[Tensor | None],
    columns: Sequence[Tensor | None],
    transposed: bool,
) -> Tensor:
    """Return the gradient `(tokens, in)` of the input, of the dtype of the output's `gradient`, `(tokens, out)`."""
    composed = compose_all(weight, values, indices, rows, columns).to(gradient.dtype)
    return gradient @ (composed.t() if transposed else composed)


def _empty_gradients(
    gradient: Tensor, x: Tensor, indices: Any, rows: Any, columns: Any, wanted: Any, in_features: int, transposed: bool
) -> list[Tensor]:
    numel = gradient.shape[1] * in_features
    counts = [numel if positions is None else positions.shape[0] for positions in indices]
    return [gradient.new_empty(count if kept else 0) for count, kept in zip(counts, wanted, strict=True)]


@operator("delta_gradients", fake=_empty_gradients)
def delta_gradients(
    gradient: Tensor,
    x: Tensor,
    indices: Sequence[Tensor | None],
    rows: Sequence[Tensor | None],
    columns: Sequence[Tensor | None],
    wanted: Sequence[bool],
    in_features: int,
    transposed: bool,
) -> list[Tensor]:
    """Return the gradient `(nnz,)` of each delta, `(0,)` where none is `wanted`.

    Args:
        gradient: `(tokens, out)`.
        x: `(tokens, in)`, of the same dtype; of the columns, all or those of the one delta's hull.
        indices: of each delta, flat; None for every position.
        rows: of each delta's hull, None for all.
        columns: likewise.
        wanted: which gradients to compute.
        in_features: of the layer.
        transposed: the weight is `(in, out)`.
    """
    a, b = (x, gradient) if transposed else (gradient, x)
    out_features = gradient.shape[1]
    shape = (in_features, out_features) if transposed else (out_features, in_features)
    dense = a.t() @ b if any(w and i is None for w, i in zip(wanted, indices, strict=True)) else None
    out = []
    for positions, row, column, is_wanted in zip(indices, rows, columns, wanted, strict=True):
        if not is_wanted:
            out.append(gradient.new_empty(0))
        elif positions is None:
            assert dense is not None  # made above for exactly this case
            out.append(dense.reshape(-1).clone() if len(indices) > 1 else dense.reshape(-1))
        elif dense is not None:
            out.append(dense.reshape(-1).index_select(0, positions))
        else:
            out.append(child_gradient(a, b, indices=positions, hull=Hull(shape, row, column)))
    return out
