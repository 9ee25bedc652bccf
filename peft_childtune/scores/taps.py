"""Taps: what went into the modules that own the scored parameters, and the gradients that come back out.

No weight needs a gradient of its own for this. A forward hook keeps the inputs of every owner and listens at its
output; the backward pass then delivers `d loss / d output`, from which `rules.py` works out each example's gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx

from peft_childtune.scores.rules import is_plain_embedding
from peft_childtune.scores.uses import Owner, Use

__all__ = ["CannotSplit", "Taps", "tapped"]


class CannotSplit(Exception):
    """This batch cannot be taken apart into examples; they are scored one by one instead. Never leaves `scores`."""


class _Root(torch.autograd.Function):
    """A copy of a tensor without history that gradients are asked for; no weight has to require any."""

    @staticmethod
    def forward(ctx: FunctionCtx, output: Tensor, anchor: Tensor) -> Tensor:
        return output.clone()

    @staticmethod
    def backward(ctx: FunctionCtx, *grads: Tensor) -> tuple[None, None]:
        return None, None


class Taps:
    """The uses of one forward pass. `on_gradient` is called for each as soon as its gradient is there."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.uses: list[Use] = []
        self.anchor = torch.zeros((), requires_grad=True)
        self.on_gradient: Callable[[Use], None] = lambda use: None

    def backward(self, loss: Tensor, *, scale: float) -> None:
        """Send the gradient of `scale * loss` through the model, past every tap.

        Raises:
            CannotSplit: before anything is computed, if an input was overwritten since a tap saw it.
        """
        for use in self.uses:
            if use.is_stale():
                raise CannotSplit(f"an input of {use.owner.path} was changed in place after its call")
        if not loss.requires_grad:
            raise CannotSplit("the loss depends on no module that holds a scored parameter")
        torch.autograd.grad(loss, [self.anchor], grad_outputs=torch.full_like(loss, scale), allow_unused=True)

    def hook(self, owner: Owner) -> Callable[..., Any]:
        """Return the forward hook of one owner."""

        def listen(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
            if not torch.is_grad_enabled():
                return output  # a part of the model that no gradient reaches
            if isinstance(output, Tensor) and output.shape[:1] == (1,) and is_plain_embedding(module):
                # position embeddings: computed once, added to every example; from here on each has its own copy
                (tokens,) = (*args, *kwargs.values())
                args, kwargs = (tokens.expand(self.size, *tokens.shape[1:]),), {}
                output = output.expand(self.size, *output.shape[1:])
            # checkpointing calls a module again during the backward pass: no gradient arrives at these uses
            use = Use(owner, _detached(args), {key: _detached(value) for key, value in kwargs.items()}, self.size)
            self.uses.append(use)
            if type(output) is tuple:
                return tuple(self._tap(item, use, place) for place, item in enumerate(output))
            if not isinstance(output, Tensor):
                raise CannotSplit(f"{owner.path} returns a {type(output).__name__}")
            return self._tap(output, use, 0)

        return listen

    def _tap(self, output: Any, use: Use, place: int) -> Any:
        if not isinstance(output, Tensor) or not output.is_floating_point():
            return output
        rows, rest = divmod(output.shape[0], self.size) if output.dim() else (0, 0)
        if rest or rows < 1:
            shape = tuple(output.shape)
            raise CannotSplit(f"the output of {use.owner.path} has shape {shape}, not {self.size} examples first")
        use.rows = max(use.rows, rows)
        tapped: Tensor = output
        if not output.requires_grad:
            tapped = _Root.apply(output, self.anchor)  # type: ignore[no-untyped-call]
        tapped.register_hook(lambda grad: self._receive(use, place, grad))  # type: ignore[no-untyped-call]
        return tapped

    def _receive(self, use: Use, place: int, grad: Tensor) -> None:
        use.grads[place] = grad.detach()
        self.on_gradient(use)


@contextmanager
def tapped(owners: list[Owner], *, size: int) -> Iterator[Taps]:
    """Tap `owners` while the block runs; the hooks are gone afterwards, also when it fails."""
    taps = Taps(size)
    handles: list[Any] = []
    try:
        for owner in owners:
            # first in line: other hooks may change the output, and the rules know only the module's own
            handles.append(owner.module.register_forward_hook(taps.hook(owner), prepend=True, with_kwargs=True))
        yield taps
    finally:
        for handle in handles:
            handle.remove()


def _detached(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach()
    if isinstance(value, tuple):
        return tuple(_detached(item) for item in value)
    return value
