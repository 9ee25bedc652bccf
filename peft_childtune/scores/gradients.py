"""Gradients one at a time: each is used as soon as it is there, and gone before the next one comes."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

__all__ = ["for_each_gradient"]


def for_each_gradient(
    loss: Tensor, parameters: Mapping[str, nn.Parameter], *, use: Callable[[str, Tensor], None]
) -> None:
    """Call `use(name, gradient)` for every parameter that a scalar loss depends on, in the order of the backward pass.

    The gradient of a parameter with several uses is their sum. `.grad` is neither read nor written.

    Args:
        loss: scalar, computed while the parameters required gradients.
        parameters: name to parameter.
        use: gets the gradient dense, fp32 and without history.
    """
    if not loss.requires_grad:
        return

    def listener(name: str) -> Callable[[Tensor], Tensor | None]:
        def listen(grad: Tensor) -> Tensor | None:
            use(name, (grad.to_dense() if grad.is_sparse else grad).detach().float())
            # autograd keeps what is returned until the pass is over: a single number instead of a dense gradient
            return None if grad.is_sparse else grad.new_zeros(()).expand(grad.shape)

        return listen

    handles = [p.register_hook(listener(name)) for name, p in parameters.items()]  # type: ignore[no-untyped-call]
    try:
        torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
    finally:
        for handle in handles:
            handle.remove()
