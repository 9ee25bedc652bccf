"""The modules that hold scored parameters, and single calls of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["Owner", "Use", "owners_of"]


@dataclass(frozen=True, eq=False)
class Owner:
    """A module that holds scored parameters itself; `names` takes its own name of each to the name it is scored by."""

    path: str
    module: nn.Module
    names: Mapping[str, str]


@dataclass(eq=False)
class Use:
    """One call of an owner: its inputs, and the gradients of its outputs once the backward pass has come by.

    Args:
        owner: whose call.
        args: its inputs, detached, like `kwargs`.
        kwargs: see `args`.
        size: the number of examples.
        rows: leading rows of an output that belong to one example: more than 1 if tokens were flattened into them.
        grads: place of an output, 0 if there is just one, to its gradient, rows as they came.
    """

    owner: Owner
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    size: int
    rows: int = 1
    grads: dict[int, Tensor] = field(default_factory=dict)
    _versions: list[tuple[Tensor, int]] = field(default_factory=list)

    def __post_init__(self) -> None:
        inputs = [*self.args, *self.kwargs.values()]
        self._versions = [(value, value._version) for value in inputs if isinstance(value, Tensor)]

    def is_stale(self) -> bool:
        """Return whether an input was overwritten after the call."""
        return any(tensor._version != version for tensor, version in self._versions)

    @property
    def device(self) -> torch.device:
        """Where its gradients are."""
        return next(iter(self.grads.values())).device

    def release(self) -> None:
        """Let go of the tensors, so that memory falls as the backward pass goes on."""
        self.args, self.kwargs, self.grads, self._versions = (), {}, {}, []


def owners_of(model: nn.Module, parameters: Mapping[str, nn.Parameter]) -> list[Owner]:
    """Return the modules of `model` that hold any of `parameters`, found by identity; tied weights have several."""
    names = {id(parameter): name for name, parameter in parameters.items()}
    owners, inlined = [], set()
    for path, module in model.named_modules():
        if id(module) in inlined:
            continue
        found = dict(module._parameters)
        if isinstance(module, nn.MultiheadAttention):  # computes with its output layer's weight, and never calls it
            inlined.add(id(module.out_proj))
            found |= {f"out_proj.{own}": p for own, p in module.out_proj._parameters.items()}
        own = {own: names[id(p)] for own, p in found.items() if p is not None and id(p) in names}
        if own:
            owners.append(Owner(path, module, own))
    return owners
