"""How high a learning rate suits a child: what share of the gradient it holds decides."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ..errors import ConfigError, SelectionError
from ..sparse import TensorChild
from .config import ChildTuningConfig

__all__ = ["gradient_share", "suggest_learning_rate"]

_SQUARED = ("fisher", "fisher_batch")  # scores that are means of squared gradients


@torch.no_grad()
def gradient_share(scores: Mapping[str, Tensor], children: Mapping[str, TensorChild], *, score: str) -> float | None:
    """Return a child's share of the sum of gradient sizes over all covered weights; None if scores tell nothing of it.

    Args:
        scores: of each covered tensor.
        children: of the same tensors.
        score: what the scores are; of `fisher` and `fisher_batch` the roots are summed.
    """
    if score not in (*_SQUARED, "gradient"):
        return None
    kept = total = 0.0
    for name, each in scores.items():
        sizes = each.sqrt() if score in _SQUARED else each.abs()
        total += float(sizes.sum(dtype=torch.float64))
        kept += float(sizes.reshape(-1)[children[name].indices().to(sizes.device)].sum(dtype=torch.float64))
    return kept / total if total else None


def suggest_learning_rate(config: ChildTuningConfig, *, full: float = 1e-4) -> float:
    """Return a peak learning rate for AdamW with a short warm-up, to begin a search with.

    AdamW moves each trained weight by about the learning rate a step, so a step lowers the loss by the learning rate
    times the sum of gradient sizes over what is trained. A child that holds a share s of that sum goes as far as the
    whole model if its rate is 1/s times as high. A random child of 2 % holds 2 % of the sum; one of 2 % that was
    chosen by its gradients may hold 10 or 30 %, and diverges at the random child's rate.

    Args:
        config: the adapter's, after the child was chosen: `model.peft_config["default"]`.
        full: the rate that suits full fine-tuning of the same model.

    Raises:
        SelectionError: the child is still to be chosen by data.
        ConfigError: `full` is not above 0.

    Example:
        >>> suggest_learning_rate(ChildTuningConfig(score="random", density=0.02))
        0.005

    Source: measured in examples/study/README.md.
    """
    if not full > 0:
        raise ConfigError(f"full={full!r} is no learning rate; give that of full fine-tuning, for example 1e-4.")
    if config.resample:  # every weight takes part, and AdamW divides the mask's 1 / density out again
        return full
    selection = config.selection or {}
    if config.needs_data and not selection:
        raise SelectionError(
            f'score="{config.score}": the learning rate depends on the child; call select_child_network first, and '
            'pass its configuration: suggest_learning_rate(model.peft_config["default"]).'
        )
    share = selection.get("gradient_share")
    return full / (share if isinstance(share, float) and 0 < share <= 1 else config.density)
