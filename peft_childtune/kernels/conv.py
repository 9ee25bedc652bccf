"""Convolutions whose weight is composed in the forward, dropped, and composed again in the backward."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from .compose import Edit, compose_all, gradients_of_values
from .gate import StepGate

__all__ = ["child_conv"]

_CONVOLUTIONS = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}  # by their number of sizes
Window = tuple[list[int], list[int], list[int], int]  # stride, padding, dilation, groups


class _ChildConv(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        window: Window,
        gates: tuple[StepGate | None, ...],
        *tensors: Tensor | None,
    ) -> Tensor:
        count = len(gates)
        ctx.gates, ctx.window = gates, window
        ctx.bias = None if bias is None else (list(bias.shape), bias.dtype)
        ctx.save_for_backward(x, weight, *tensors)
        composed = compose_all(weight, tensors[:count], tensors[count:])  # type: ignore[arg-type]
        return _CONVOLUTIONS[weight.ndim - 2](x, composed, bias, *window)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, *tensors = ctx.saved_tensors
        count = len(ctx.gates)
        values, indices = tensors[:count], tensors[count:]
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        needs_values = ctx.needs_input_grad[5 : 5 + count]
        stride, padding, dilation, groups = ctx.window
        grad_x, dense, grad_bias = torch.ops.aten.convolution_backward(
            gradient,
            x.to(gradient.dtype),  # under autocast the gradient comes in the forward's low precision
            compose_all(weight, values, indices).to(gradient.dtype),
            None if ctx.bias is None else ctx.bias[0],
            stride,
            padding,
            dilation,
            False,
            [0] * len(stride),
            groups,
            [needs_x, needs_weight or any(needs_values), needs_bias],
        )
        kept: list[Tensor | None] = [None] * count
        if any(needs_values):
            kept = gradients_of_values(dense, values, indices, ctx.gates, needs_values)
        return (
            grad_x.to(x.dtype) if needs_x else None,
            dense.to(weight.dtype) if needs_weight else None,
            grad_bias.to(ctx.bias[1]) if needs_bias else None,
            None,
            None,
            *kept,
            *([None] * count),
        )


def child_conv(x: Tensor, weight: Tensor, bias: Tensor | None, edits: Sequence[Edit], *, window: Window) -> Tensor:
    """Return the output of a convolution whose weight carries the deltas of `edits`.

    Between forward and backward only references to the arguments are kept, nothing of the weight's size.

    Args:
        x: `(batch, in, *sizes)` or `(in, *sizes)`, floating point, zeros around it.
        weight: `(out, in / groups, *kernel)`; never written to.
        bias: `(out,)` or None, already composed.
        edits: one per active adapter, in the order in which they would be merged.
        window: stride, padding and dilation, one number per size, and the number of groups.

    Returns:
        `(batch, out, *sizes)` or `(out, *sizes)`, bit-equal to the same layer with the deltas merged.

    Example:
        >>> edit = Edit(torch.tensor([1.0]), torch.tensor([1]))
        >>> x = torch.tensor([[[1.0, 2.0, 3.0]]])
        >>> child_conv(x, torch.zeros(1, 1, 2), None, [edit], window=([1], [0], [1], 1)).tolist()
        [[[2.0, 3.0]]]
    """
    is_single = x.ndim == weight.ndim - 1
    gates = tuple(edit.gate for edit in edits)
    tensors = [*(edit.values for edit in edits), *(edit.indices for edit in edits)]
    out = _ChildConv.apply(  # type: ignore[no-untyped-call]
        x.unsqueeze(0) if is_single else x, weight, bias, window, gates, *tensors
    )
    return out.squeeze(0) if is_single else out  # type: ignore[no-any-return]
