"""What a scoring pass hands back, and the scores that need no data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

__all__ = ["ScoreResult", "magnitude_scores"]


@dataclass(frozen=True)
class ScoreResult:
    """Scores of a set of parameters, and what they were computed from.

    Args:
        scores: fp32, one per parameter, of its shape; higher = worth training.
        num_examples: examples that were counted, those without any label included; 0 if nobody counted.
        num_batches: batches that were read, likewise.
        loss: mean loss of the pass, a sanity figure. A batch scored in one go counts with its own mean (over tokens,
            if that is how the model averages), one scored example by example with the mean of theirs.
        source: the built-in score that these are; None for what was made of one, or of nothing known.
    """

    scores: dict[str, Tensor]
    num_examples: int = 0
    num_batches: int = 0
    loss: float = float("nan")
    source: str | None = None


def magnitude_scores(parameters: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    """Return the absolute value of every weight, in fp32.

    Args:
        parameters: name to parameter; nothing is changed.

    Returns:
        New tensors of the same shapes, on the same devices.

    Example:
        >>> magnitude_scores({"bias": nn.Parameter(torch.tensor([0.5, -2.0]))})
        {'bias': tensor([0.5000, 2.0000])}
    """
    with torch.no_grad():
        return {name: parameter.detach().to(torch.float32, copy=True).abs_() for name, parameter in parameters.items()}
