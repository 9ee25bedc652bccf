"""Scores from the gradient of whole batches: cheaper to write, and noisier, than one gradient per example."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from peft_childtune.scores.batch import batch_size
from peft_childtune.scores.finite import check_scores, has_loss
from peft_childtune.scores.gradients import for_each_gradient
from peft_childtune.scores.sums import ScoreSums

__all__ = ["BatchFisher", "BatchGradients", "MeanGradient"]


class BatchGradients:
    """Adds up a function of each batch's gradient.

    Args:
        parameters: name to parameter, each parameter once.
        loss_of: loss of a batch; takes the batch and its number.
        device: of the scores; None for each parameter's own.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        loss_of: Callable[[Any, int], Tensor],
        *,
        device: torch.device | None = None,
    ) -> None:
        self._sums = ScoreSums(parameters, device=device)
        self._parameters = dict(parameters)
        self._loss_of = loss_of

    @property
    def sums(self) -> dict[str, Tensor]:
        """What was added up so far."""
        return self._sums.tensors

    def add(self, batch: Any, index: int) -> tuple[int, float]:
        """Add one batch; return its size (1 if nothing tells) and its loss. A batch without labels adds nothing."""
        size = batch_size(batch) or 1
        for parameter in self._parameters.values():
            parameter.requires_grad = True
        try:
            loss = self._loss_of(batch, index)
            if not has_loss(loss, batch, index=index):
                return size, float("nan")
            for_each_gradient(loss, self._parameters, use=lambda name, grad: self._add(name, grad, size))
        finally:
            for parameter in self._parameters.values():
                parameter.requires_grad = False
        check_scores(self.sums, index=index)
        return size, float(loss.detach())

    def means(self, *, num_examples: int, num_batches: int) -> dict[str, Tensor]:
        """Return the scores."""
        raise NotImplementedError

    def _add(self, name: str, grad: Tensor, size: int) -> None:
        raise NotImplementedError


class BatchFisher(BatchGradients):
    """Mean over batches of the squared batch gradient: the estimate of the authors' code, not clipped beforehand.

    Source: Xu et al. 2021 (arXiv:2109.05687), `calculate_fisher` of the published code.
    """

    def means(self, *, num_examples: int, num_batches: int) -> dict[str, Tensor]:
        """Return the mean over batches."""
        return self._sums.divide(num_batches)

    def _add(self, name: str, grad: Tensor, size: int) -> None:
        self._sums.add_square(name, grad)


class MeanGradient(BatchGradients):
    """Absolute value of the mean gradient; a batch counts as many times as it has examples."""

    def means(self, *, num_examples: int, num_batches: int) -> dict[str, Tensor]:
        """Return the absolute mean over examples."""
        return {name: mean.abs_() for name, mean in self._sums.divide(num_examples).items()}

    def _add(self, name: str, grad: Tensor, size: int) -> None:
        self._sums.add(name, grad, factor=size)
