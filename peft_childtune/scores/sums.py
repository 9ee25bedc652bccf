"""Running sums of scores: fp32, one per parameter, beside the model or elsewhere."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

__all__ = ["ScoreSums"]


class ScoreSums:
    """Sums that are added to in place, all zero at first.

    Args:
        parameters: name to parameter, each parameter once.
        device: of the sums; None for each parameter's own.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], *, device: torch.device | None) -> None:
        # fp32: a bf16 running sum of squares stops growing and misranks the top 1%
        self.tensors = {
            name: torch.zeros(p.shape, dtype=torch.float32, device=p.device if device is None else device)
            for name, p in parameters.items()
        }

    @contextmanager
    def adding(self, name: str, *, device: torch.device) -> Iterator[Tensor]:
        """Give the block a tensor on `device` to add to in place: the sum itself, or zeros that are then added to it.

        For sums that are elsewhere this moves each batch once, not each example.
        """
        total = self.tensors[name]
        if self._is_there(name, device):
            yield total
            return
        part = torch.zeros_like(total, device=device)
        yield part
        total += part.to(total.device)

    def _is_there(self, name: str, device: torch.device) -> bool:
        return self.tensors[name].device == device

    def add_square(self, name: str, grad: Tensor, *, factor: float = 1.0) -> None:
        """Add `factor * grad^2`."""
        total = self.tensors[name]
        grad = grad.to(total.device)
        total.addcmul_(grad, grad, value=factor)

    def add(self, name: str, values: Tensor, *, factor: float = 1.0) -> None:
        """Add `factor * values`."""
        total = self.tensors[name]
        total.add_(values.to(total.device), alpha=factor)

    def clear(self) -> None:
        """Set every sum to zero."""
        for total in self.tensors.values():
            total.zero_()

    def divide(self, count: int) -> dict[str, Tensor]:
        """Divide every sum by `count`, in place, and return them."""
        return {name: total.div_(count) for name, total in self.tensors.items()}
