"""Linear layers whose weight is composed in the forward, dropped, and composed again in the backward.

Keeping the composed weight for the backward would cost a second copy of the model.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .compose import Edit
from .gate import StepGate
from .hull import columns_of
from .ops import delta_gradients, input_gradient, linear_output
from .options import kernel_options

__all__ = ["child_linear"]

FEW_INPUTS = 2 / 3  # a copy of a larger share of the columns saves too little to be made


class _ChildLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        transposed: bool,
        cast: bool,
        keeps_used: bool,
        gates: tuple[StepGate | None, ...],
        *tensors: Tensor | None,
    ) -> Tensor:
        count = len(gates)
        ctx.gates, ctx.transposed = gates, transposed
        ctx.x_shape, ctx.x_dtype = x.shape, x.dtype
        ctx.bias_dtype = None if bias is None else bias.dtype
        values, indices, rows, columns = _split(tensors, count)
        needs_inputs = ctx.needs_input_grad[1] or any(ctx.needs_input_grad[7 : 7 + count])
        inputs = x.reshape(-1, x.shape[-1]) if needs_inputs else x.new_empty(0, x.shape[-1])
        if keeps_used:
            inputs = columns_of(inputs, (rows if transposed else columns)[0])  # of the one edit
        ctx.save_for_backward(inputs, weight, *tensors)
        return linear_output(x, weight, bias, values, indices, rows, columns, transposed, cast)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, *tensors = ctx.saved_tensors
        count = len(ctx.gates)
        values, indices, rows, columns = _split(tensors, count)
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        needs_values = ctx.needs_input_grad[7 : 7 + count]
        flat = gradient.reshape(-1, gradient.shape[-1])
        inputs = x.to(flat.dtype)
        grad_x = grad_weight = grad_bias = None
        kept: list[Tensor | None] = [None] * count
        if needs_x:
            grad_x = input_gradient(flat, weight, values, indices, rows, columns, ctx.transposed)
            grad_x = grad_x.view(ctx.x_shape).to(ctx.x_dtype)
        if needs_weight:  # a base that is trained beside the child
            grad_weight = (inputs.t() @ flat if ctx.transposed else flat.t() @ inputs).to(weight.dtype)
        if any(needs_values):
            found = delta_gradients(
                flat, inputs, indices, rows, columns, needs_values, ctx.x_shape[-1], ctx.transposed
            )
            for i, (delta, entries, gate) in enumerate(zip(values, found, ctx.gates, strict=True)):
                if needs_values[i]:
                    kept[i] = entries.to(delta.dtype) if gate is None else gate(entries.to(delta.dtype))
        if needs_bias:
            grad_bias = _sum_over_tokens(flat).to(ctx.bias_dtype)
        return grad_x, grad_weight, grad_bias, None, None, None, None, *kept, *([None] * 3 * count)


def _sum_over_tokens(matrix: Tensor) -> Tensor:
    if matrix.device.type != "cpu" or matrix.dtype not in (torch.float32, torch.float64):
        return matrix.sum(0)  # of low precision in half the time of the product
    return (matrix.new_ones(1, matrix.shape[0]) @ matrix).view(-1)  # faster than the sum


def _split(tensors: Sequence[Any], count: int) -> Iterator[Sequence[Any]]:
    """Return values, indices, rows and columns of `count` edits."""
    return (tensors[i * count : (i + 1) * count] for i in range(4))


def _uses_few_inputs(edits: Sequence[Edit], in_features: int, transposed: bool) -> bool:
    """Return whether the gradients need so few columns of the input that a copy of them is worth it."""
    if len(edits) != 1 or edits[0].hull is None or kernel_options.weight_gradient == "gather":
        return False
    used = edits[0].hull.rows if transposed else edits[0].hull.columns
    return used is not None and used.numel() <= FEW_INPUTS * in_features


def child_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    edits: Sequence[Edit],
    *,
    transposed: bool = False,
    owns_input: bool = False,
) -> Tensor:
    """Return the output of a linear layer whose weight carries the deltas of `edits`.

    Between forward and backward only references to the arguments are kept, nothing of the weight's size.

    Args:
        x: `(..., in)`, floating point.
        weight: `(out, in)`, or `(in, out)` if `transposed`; never written to.
        bias: `(out,)` or None, already composed.
        edits: one per active adapter, in the order in which they would be merged.
        transposed: the weight is stored as in GPT-2's `Conv1D`.
        owns_input: nothing else keeps `x` for the backward: of one in which the child uses few columns, only these
            are kept.

    Returns:
        `(..., out)`, bit-equal to the same layer with the deltas merged.

    Example:
        >>> edit = Edit(torch.tensor([1.0]), torch.tensor([3]))
        >>> child_linear(torch.ones(1, 2), torch.zeros(2, 2), None, [edit]).tolist()
        [[0.0, 1.0]]
    """
    cast = torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64
    if cast:  # here rather than in the product, so that the backward finds the input in the forward's precision
        low = torch.get_autocast_dtype(x.device.type)
        x, bias = x.to(low), None if bias is None else bias.to(low)
    values, indices = [edit.values for edit in edits], [edit.indices for edit in edits]
    rows = [None if edit.hull is None else edit.hull.rows for edit in edits]
    columns = [None if edit.hull is None else edit.hull.columns for edit in edits]
    if not torch.is_grad_enabled():
        return linear_output(x, weight, bias, values, indices, rows, columns, transposed, cast)
    gates = tuple(edit.gate for edit in edits)
    # a flag, not the columns: `torch.compile` traces no Function that gets a tensor twice
    keeps_used = owns_input and not weight.requires_grad and _uses_few_inputs(edits, x.shape[-1], transposed)
    return _ChildLinear.apply(  # type: ignore[no-any-return, no-untyped-call]
        x, weight, bias, transposed, cast, keeps_used, gates, *values, *indices, *rows, *columns
    )
