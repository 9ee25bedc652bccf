"""The slow, obvious reference: one backward pass per example, squared and averaged."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

LoopFisher = Callable[..., dict[str, Tensor]]


def _cut(batch: Any, i: int) -> Any:
    if isinstance(batch, Mapping):
        return {key: value[i : i + 1] for key, value in batch.items()}
    return tuple(value[i : i + 1] for value in batch)


def _loss(model: nn.Module, batch: Any) -> Tensor:
    return model(**batch).loss


@pytest.fixture
def loop_fisher() -> LoopFisher:
    """Return a function that computes the Fisher information of all parameters, and leaves the model frozen."""

    def compute(
        model: nn.Module, batches: Sequence[Any], loss_fn: Callable[[nn.Module, Any], Tensor] = _loss
    ) -> dict[str, Tensor]:
        model.eval().requires_grad_(True)
        parameters = dict(model.named_parameters())
        sums = {name: torch.zeros_like(p, dtype=torch.float64) for name, p in parameters.items()}
        sizes = [len(batch["labels"] if isinstance(batch, Mapping) else batch[0]) for batch in batches]
        examples = [_cut(batch, i) for batch, size in zip(batches, sizes, strict=True) for i in range(size)]
        for one in examples:
            loss = loss_fn(model, one)
            if torch.isnan(loss):
                continue
            grads = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
            for name, grad in zip(parameters, grads, strict=True):
                if grad is not None:
                    sums[name] += grad.double().square()
        model.requires_grad_(False)
        return {name: total / len(examples) for name, total in sums.items()}

    return compute
