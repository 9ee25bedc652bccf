"""The gradient of each example at one use of a module, from the module's inputs and the gradient of its output.

Linear, Conv1D, Embedding and LayerNorm have rules of their own, which cost one matmul, index_add or sum per example.
Any other module is called again on one example at a time with parameters that require gradients. A rule may be wrong
for a module that only looks like one of these (a wrapped `forward`, say): `fisher.py` checks it against autograd.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from peft_childtune.scores.uses import Use

__all__ = ["add_squares_", "example_gradients", "has_rule", "is_plain_embedding"]

_BLOCK = 1 << 22  # weights of one example's gradient at a time: 16 MiB, few and large matmuls
_GPU_BLOCK = 1 << 26  # weights of several examples at once on other devices: 256 MiB


def is_plain_embedding(module: nn.Module) -> bool:
    """Return whether a module is an embedding whose weight gradient is one index_add per example."""
    return (
        type(module).forward is nn.Embedding.forward
        and isinstance(module, nn.Embedding)
        and not module.scale_grad_by_freq
    )


def has_rule(use: Use) -> bool:
    """Return whether the gradients of a use come without calling the module again."""
    module, own = use.owner.module, set(use.owner.names)
    if _is_linear(module) or _is_conv1d(module) or _is_layer_norm(module):
        return own <= {"weight", "bias"}
    return is_plain_embedding(module) and own <= {"weight"}


def add_squares_(total: Tensor, use: Use, own: str, factors: Tensor) -> None:
    """Add to `total`, in place, the squared gradient of each example times its factor, in fp32, also under autocast.

    Args:
        total: fp32, of the parameter's shape.
        use: has a rule, a gradient, and is the only use of this parameter.
        own: name of the parameter in its module.
        factors: `(size,)`, 0 leaves an example out.
    """
    module, grad = use.owner.module, _grad(use)
    with torch.autocast(grad.device.type, enabled=False):
        if is_plain_embedding(module):
            for index, factor in _kept(factors):
                rows, sums = _embedding_rows(module, _input(use)[index], grad[index])
                total.index_add_(0, rows, sums.square_(), alpha=factor)
        elif own == "weight" and not _is_layer_norm(module):
            if total.device.type == "cpu":
                _add_squared_products_one_by_one_(total, use, factors)
            else:
                _add_squared_products_(total, *_factors_of_weight(use), factors)
        else:
            per_example = _small_gradients(use, own, slice(None))
            total += torch.einsum("n,n...->...", factors.to(per_example.device, torch.float32), per_example.square())


def example_gradients(use: Use, index: int) -> dict[str, Tensor]:
    """Return the gradients of example `index` at one use, in fp32, by the module's own parameter names."""
    if not has_rule(use):
        return _recomputed(use, index)
    module, grad = use.owner.module, _grad(use)
    found = {}
    with torch.autocast(grad.device.type, enabled=False):
        for own in use.owner.names:
            if is_plain_embedding(module):
                rows, sums = _embedding_rows(module, _input(use)[index], grad[index])
                table = torch.zeros(_weight_shape(module), device=sums.device)
                found[own] = table.index_add_(0, rows, sums)
            elif own == "weight" and not _is_layer_norm(module):
                left, right = _factors_of_weight(use)
                found[own] = left[index].float().T @ right[index].float()
            else:
                found[own] = _small_gradients(use, own, slice(index, index + 1))[0]
    return found


def _is_linear(module: nn.Module) -> bool:
    return type(module).forward is nn.Linear.forward


def _is_conv1d(module: nn.Module) -> bool:
    # transformers' transposed linear layer (GPT-2), which this floor does not import
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf") and hasattr(module, "nx")


def _is_layer_norm(module: nn.Module) -> bool:
    return type(module).forward is nn.LayerNorm.forward


def _grad(use: Use) -> Tensor:
    return _by_example(use.grads[0], use)


def _input(use: Use) -> Tensor:
    value = use.args[0] if use.args else use.kwargs["input"]
    assert isinstance(value, Tensor)
    return _by_example(value, use)


def _by_example(tensor: Tensor, use: Use) -> Tensor:
    """Return a view whose first dimension is the examples, of a tensor with all their tokens in one dimension."""
    return tensor if use.rows == 1 else tensor.reshape(use.size, use.rows, *tensor.shape[1:])


def _weight_shape(module: nn.Module) -> tuple[int, ...]:
    assert isinstance(module.weight, Tensor)
    return tuple(module.weight.shape)


def _kept(factors: Tensor) -> list[tuple[int, float]]:
    return [(index, factor) for index, factor in enumerate(factors.tolist()) if factor]


def _factors_of_weight(use: Use) -> tuple[Tensor, Tensor]:
    """Return `a (n, T, A)` and `b (n, T, B)` such that example i's weight gradient is `a[i].T @ b[i]`, `(A, B)`."""
    inputs, grad = (_tokens(tensor) for tensor in (_input(use), _grad(use)))
    return (inputs, grad) if _is_conv1d(use.owner.module) else (grad, inputs)


def _tokens(tensor: Tensor) -> Tensor:
    return tensor.reshape(tensor.shape[0], -1, tensor.shape[-1])


def _add_squared_products_one_by_one_(total: Tensor, use: Use, factors: Tensor) -> None:
    """Add `factor * gradient^2` of a matrix product's weight, example by example, in place and block by block.

    Only the tokens that a gradient reaches take part: padding is reached nowhere, and all but the first token of a
    classifier not in its last block.
    """
    left, right = _factors_of_weight(use)
    reached = _tokens(_grad(use)).any(dim=2)
    pairs = []
    for (index, factor), count in zip(enumerate(factors.tolist()), reached.sum(1).tolist(), strict=True):
        if factor and count:
            # below that the copy costs less than it saves
            at = reached[index] if count < 0.9 * reached.shape[1] else slice(None)
            pairs.append((left[index][at].float(), right[index][at].float(), factor))
    step = max(1, _BLOCK // max(1, total.shape[1]))
    product = torch.empty(min(step, total.shape[0]), total.shape[1])
    for start in range(0, total.shape[0], step):
        block = total[start : start + step]
        gradient = product[: block.shape[0]]
        for a, b, factor in pairs:
            torch.mm(a[:, start : start + step].T, b, out=gradient)
            block.addcmul_(gradient, gradient, value=factor)


def _add_squared_products_(total: Tensor, left: Tensor, right: Tensor, factors: Tensor) -> None:
    """Add the same for all examples, as few large matmuls: one small kernel after the other starves a GPU."""
    factors = factors.to(total.device, torch.float32)
    step = max(1, _GPU_BLOCK // max(1, total.numel()))
    for start in range(0, left.shape[0], step):
        part = slice(start, start + step)
        products = torch.bmm(left[part].float().transpose(1, 2), right[part].float())
        total.view(-1).addmv_(products.square_().flatten(1).T, factors[part])


def _small_gradients(use: Use, own: str, part: slice) -> Tensor:
    """Return the gradients of a bias or of a LayerNorm's weight, of the examples in `part`, fp32, `(n, *shape)`."""
    module, grad = use.owner.module, _grad(use)[part].float()
    if isinstance(module, nn.LayerNorm):
        if own == "weight":
            grad = grad * F.layer_norm(_input(use)[part].float(), module.normalized_shape, None, None, module.eps)
        return grad.reshape(grad.shape[0], -1, *module.normalized_shape).sum(1)
    return _tokens(grad).sum(1)


def _embedding_rows(module: nn.Module, tokens: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    """Return the rows of the table that an example used, each once, and the fp32 gradient of each."""
    rows, position = torch.unique(tokens.reshape(-1), return_inverse=True)
    sums = torch.zeros(rows.numel(), grad.shape[-1], device=grad.device)
    sums.index_add_(0, position, grad.reshape(-1, grad.shape[-1]).float())
    padding = module.padding_idx
    if padding is not None:
        sums[rows == padding] = 0.0  # autograd gives the padding row no gradient
    return rows, sums


def _recomputed(use: Use, index: int) -> dict[str, Tensor]:
    """Return the gradients of one example by calling the module on it once more."""
    module = use.owner.module
    leaves = {own: module.get_parameter(own).detach().requires_grad_() for own in use.owner.names}

    def one(value: Any) -> Any:
        if isinstance(value, Tensor) and value.dim() > 0 and value.shape[0] in (use.size, use.size * use.rows):
            rows = value.shape[0] // use.size
            return value[index * rows : (index + 1) * rows]
        if isinstance(value, tuple):
            return tuple(one(item) for item in value)
        return value

    with torch.enable_grad():
        kwargs = {key: one(value) for key, value in use.kwargs.items()}
        # a parameter that modules further in hold as well counts there: each of them is tapped on its own
        output = functional_call(module, leaves, one(use.args), kwargs, tie_weights=False)
        outputs = output if isinstance(output, tuple) else (output,)
        reached = [(outputs[place], one(grad)) for place, grad in use.grads.items() if outputs[place].requires_grad]
        grads: tuple[Tensor | None, ...] = (None,) * len(leaves)
        if reached:
            wanted = [grad.to(output.dtype) for output, grad in reached]
            ends = [output for output, _ in reached]
            grads = torch.autograd.grad(ends, list(leaves.values()), grad_outputs=wanted, allow_unused=True)
    return {
        own: torch.zeros_like(leaf, dtype=torch.float32) if got is None else got.float()
        for (own, leaf), got in zip(leaves.items(), grads, strict=True)
    }
