"""Nothing that is not finite gets into the scores, and whoever finds it says where."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from peft_childtune.errors import ScoreError
from peft_childtune.scores.batch import lacks_labels

__all__ = ["check_scores", "has_loss"]

_WAY_OUT = "look at that batch, or score in float32 or bfloat16, which overflow later than float16."


def has_loss(loss: Tensor, batch: Any, *, index: int, position: int | None = None) -> bool:
    """Return whether a loss is finite, or False if it is 0 / 0 because no label of the batch counts.

    Args:
        loss: scalar.
        batch: what the loss was computed from.
        index: number of the batch in the dataloader, for messages.
        position: number of the example in it, if `batch` holds just that one.

    Raises:
        ScoreError: the loss is infinite, or NaN although there are labels.
    """
    if bool(torch.isfinite(loss)):
        return True
    if bool(torch.isnan(loss)) and lacks_labels(batch):
        return False
    what = "the loss" if position is None else f"the loss of example {position}"
    raise ScoreError(f"batch {index}: {what} is {loss.item()}; {_WAY_OUT}")


def check_scores(sums: Mapping[str, Tensor], *, index: int) -> None:
    """Raise a ScoreError that names the first tensor with NaN or infinity in it, and the batch that brought it."""
    names = [name for name, scores in sums.items() if scores.numel()]
    # all verdicts before the first is read: reading one waits for the device
    verdicts = [torch.isfinite(torch.stack(sums[name].aminmax())).all() for name in names]
    for name, is_finite in zip(names, verdicts, strict=True):
        if not bool(is_finite):
            raise ScoreError(f"batch {index}: a gradient of {name} is not finite; {_WAY_OUT}")
