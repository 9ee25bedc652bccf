"""Scores from the gradient of whole batches: cheaper to write, and noisier, than one gradient per example."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from peft_childtune.scores.batch import batch_size
from peft_childtune.scores.finite import check_scores, has_loss

__all__ = ["BatchFisher", "BatchGradients", "MeanGradient"]


class BatchGradients:
    """Adds up a function of each batch's gradient.

    Args:
        parameters: name to parameter, each parameter once.
        loss_of: loss of a batch; takes the batch and its number.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], loss_of: Callable[[Any, int], Tensor]) -> None:
        self.sums = {name: torch.zeros_like(p, dtype=torch.float32) for name, p in parameters.items()}
        self._parameters = dict(parameters)
        self._loss_of = loss_of

    def add(self, batch: Any, index: int) -> tuple[int, float]:
        """Add one batch; return its size (1 if nothing tells) and its loss. A batch without labels adds nothing."""
        size = batch_size(batch) or 1
        for parameter in self._parameters.values():
            parameter.requires_grad = True
        try:
            loss = self._loss_of(batch, index)
            if not has_loss(loss, batch, index=index):
                return size, float("nan")
            if loss.requires_grad:
                grads = torch.autograd.grad(loss, list(self._parameters.values()), allow_unused=True)
                for name, grad in zip(self._parameters, grads, strict=True):
                    if grad is not None:
                        self._add(name, (grad.to_dense() if grad.is_sparse else grad).float(), size)
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
        return {name: total.div_(num_batches) for name, total in self.sums.items()}

    def _add(self, name: str, grad: Tensor, size: int) -> None:
        self.sums[name].addcmul_(grad, grad)


class MeanGradient(BatchGradients):
    """Absolute value of the mean gradient; a batch counts as many times as it has examples."""

    def means(self, *, num_examples: int, num_batches: int) -> dict[str, Tensor]:
        """Return the absolute mean over examples."""
        return {name: total.div_(num_examples).abs_() for name, total in self.sums.items()}

    def _add(self, name: str, grad: Tensor, size: int) -> None:
        self.sums[name].add_(grad, alpha=size)
