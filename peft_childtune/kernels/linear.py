"""Linear layers whose weight is composed in the forward, dropped, and composed again in the backward.

Keeping the composed weight for the backward would cost a second copy of the model.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from .compose import Edit, compose_all, flatten_edits, gradients_of_values
from .gate import StepGate

__all__ = ["child_linear", "plain_linear"]


def plain_linear(x: Tensor, weight: Tensor, bias: Tensor | None, *, transposed: bool) -> Tensor:
    """Return the very operation of `nn.Linear`, or of GPT-2's `Conv1D` (weight `(in, out)`), so that bits agree."""
    if not transposed:
        return F.linear(x, weight, bias)
    flat = x.reshape(-1, x.shape[-1])
    out = torch.mm(flat, weight) if bias is None else torch.addmm(bias, flat, weight)
    return out.view(*x.shape[:-1], weight.shape[1])


class _ChildLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        transposed: bool,
        gates: tuple[StepGate | None, ...],
        *tensors: Tensor | None,
    ) -> Tensor:
        count = len(gates)
        ctx.gates, ctx.transposed = gates, transposed
        ctx.bias_dtype = None if bias is None else bias.dtype
        ctx.save_for_backward(x, weight, *tensors)
        composed = compose_all(weight, tensors[:count], tensors[count:])  # type: ignore[arg-type]
        out = plain_linear(x, composed, bias, transposed=transposed)
        # a view made in here could not be changed in place by the model's code, as DeBERTa and inplace ReLUs do
        return torch.ops.aten._unsafe_view(out, out.shape) if out._is_view() else out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, *tensors = ctx.saved_tensors
        count = len(ctx.gates)
        values, indices = tensors[:count], tensors[count:]
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        needs_values = ctx.needs_input_grad[5 : 5 + count]
        # Under autocast the gradient comes in the low precision in which the forward multiplied.
        flat = gradient.reshape(-1, gradient.shape[-1])
        grad_x = grad_weight = grad_bias = None
        kept: list[Tensor | None] = [None] * count
        if needs_x:
            composed = compose_all(weight, values, indices).to(flat.dtype)
            grad_x = (flat @ (composed.t() if ctx.transposed else composed)).view(x.shape).to(x.dtype)
            del composed
        if needs_weight or any(needs_values):
            inputs = x.reshape(-1, x.shape[-1]).to(flat.dtype)
            dense = inputs.t() @ flat if ctx.transposed else flat.t() @ inputs
            kept = gradients_of_values(dense, values, indices, ctx.gates, needs_values)
            grad_weight = dense.to(weight.dtype) if needs_weight else None
        if needs_bias:
            grad_bias = flat.sum(0).to(ctx.bias_dtype)
        return grad_x, grad_weight, grad_bias, None, None, *kept, *([None] * count)


def child_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, edits: Sequence[Edit], *, transposed: bool = False
) -> Tensor:
    """Return the output of a linear layer whose weight carries the deltas of `edits`.

    Between forward and backward only references to the arguments are kept, nothing of the weight's size.

    Args:
        x: `(..., in)`, floating point.
        weight: `(out, in)`, or `(in, out)` if `transposed`; never written to.
        bias: `(out,)` or None, already composed.
        edits: one per active adapter, in the order in which they would be merged.
        transposed: the weight is stored as in GPT-2's `Conv1D`.

    Returns:
        `(..., out)`, bit-equal to the same layer with the deltas merged.

    Example:
        >>> edit = Edit(torch.tensor([1.0]), torch.tensor([3]))
        >>> child_linear(torch.ones(1, 2), torch.zeros(2, 2), None, [edit]).tolist()
        [[0.0, 1.0]]
    """
    gates, tensors = flatten_edits(edits)
    return _ChildLinear.apply(x, weight, bias, transposed, gates, *tensors)  # type: ignore[no-any-return, no-untyped-call]
