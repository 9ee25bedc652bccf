"""How much each example weighs in the loss of its batch.

One backward pass of a batch yields `w_i * d loss_i / d w` for example i. Losses differ in `w_i`: most are a mean over
examples, language models average over tokens, with or without the shift by one, and some losses are sums. Which of
them a model follows is not declared anywhere, so `fisher.py` finds out by comparing with examples scored one by one.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from peft_childtune.scores.batch import label_counts

__all__ = ["WEIGHTINGS", "example_weights", "groups"]

WEIGHTINGS = ("mean", "labels", "shifted labels", "sum")


def example_weights(batch: Any, *, size: int) -> dict[str, Tensor]:
    """Return the weight of each example under every weighting that this batch allows.

    Args:
        batch: its `labels`, if there are any, are counted.
        size: the batch size.

    Returns:
        Weighting to float64, `(size,)`. A weighting by labels is left out if there is nothing to count.

    Example:
        >>> example_weights({"labels": torch.tensor([[-100, 1, 2], [-100, -100, 4]])}, size=2)["labels"]
        tensor([0.6667, 0.3333], dtype=torch.float64)
    """
    ones = torch.ones(size, dtype=torch.float64)
    weights = {"mean": ones / size}
    for name, shifted in (("labels", False), ("shifted labels", True)):
        counts = label_counts(batch, size=size, shifted=shifted)
        if counts is not None and counts.any():
            weights[name] = counts / counts.sum()
    weights["sum"] = ones
    return weights


def groups(weights: dict[str, Tensor], names: Iterable[str], *, tolerance: float) -> list[list[str]]:
    """Return `names` grouped by equal weights, up to a relative `tolerance`, each group led by its first name.

    Example:
        >>> weights = example_weights({"labels": torch.tensor([1, 0])}, size=2)
        >>> groups(weights, ["mean", "labels", "sum"], tolerance=1e-6)
        [['mean', 'labels'], ['sum']]
    """
    found: list[list[str]] = []
    for name in names:
        for group in found:
            if torch.allclose(weights[group[0]], weights[name], rtol=tolerance, atol=0.0):
                group.append(name)
                break
        else:
            found.append([name])
    return found
