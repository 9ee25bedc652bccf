"""How high a learning rate suits a child: what share of the gradient it holds decides."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor

from ..errors import ConfigError, SelectionError
from ..sparse import TensorChild
from ..untrusted import shown
from .config import ChildTuningConfig

__all__ = ["gradient_share", "suggest_learning_rate"]

_PART = 1 << 20  # entries at a time: another copy of the scores would be felt
_BLIND = ("random", "magnitude")  # sources that know nothing of gradients, so that a share of them is the density


@torch.no_grad()
def gradient_share(scores: Mapping[str, Tensor], children: Mapping[str, TensorChild], *, squared: bool) -> float:
    """Return a child's share of the sum of gradient sizes over all covered weights.

    Args:
        scores: gradient sizes of each covered tensor, or their squares; not negative, not all zero.
        children: of the same tensors.
        squared: whether they are squares.
    """
    kept = total = 0.0
    for name, each in scores.items():
        flat = each.reshape(-1)
        total += _sum(_parts(flat), squared=squared)
        kept += _sum((flat[at] for at in _parts(children[name].indices().to(each.device))), squared=squared)
    return min(1.0, kept / total)


def _parts(flat: Tensor) -> Iterator[Tensor]:
    for at in range(0, flat.numel(), _PART):
        yield flat[at : at + _PART]


def _sum(parts: Iterable[Tensor], *, squared: bool) -> float:
    return sum(float((part.sqrt() if squared else part).sum()) for part in parts)


def suggest_learning_rate(config: ChildTuningConfig, *, full: float = 1e-4) -> float:
    """Return a peak learning rate for AdamW with a short warm-up, to begin a search with.

    AdamW moves each trained weight by about the learning rate a step, so a step lowers the loss by the learning rate
    times the sum of gradient sizes over what is trained. A child that holds a share s of that sum goes as far as the
    whole model if its rate is 1/s times as high. A random child of 2 % holds 2 % of the sum; one of 2 % that was
    chosen by its gradients may hold 10 or 30 %, and diverges at the random child's rate. Of a child by movement, s is
    its share of the movement.

    Args:
        config: the adapter's, after the child was chosen: `model.peft_config["default"]`.
        full: the rate that suits full fine-tuning of the same model.

    Raises:
        SelectionError: the child is still to be chosen by data; or it was chosen by something that tells nothing of
            its share (a score of your own, `network=`).
        ConfigError: `config` or `full` is not what it should be.

    Example:
        >>> suggest_learning_rate(ChildTuningConfig(score="random", density=0.02))
        0.005

    Source: measured in examples/study/README.md.
    """
    if not isinstance(config, ChildTuningConfig):
        raise ConfigError(
            f"config: {type(config).__name__} is no ChildTuningConfig; pass model.peft_config[adapter_name]."
        )
    if isinstance(full, bool) or not isinstance(full, int | float) or not 0 < full < math.inf:
        raise ConfigError(f"full={full!r} is no learning rate; give that of full fine-tuning, for example 1e-4.")
    if config.resample:  # every weight takes part, and AdamW divides the mask's 1 / density out again
        return full
    selection = config.selection or {}
    if config.needs_data and not selection:
        raise SelectionError(
            f"score={shown(config.score)}: the learning rate depends on the child; call select_child_network first, "
            'and pass its configuration: suggest_learning_rate(model.peft_config["default"]).'
        )
    if "gradient_share" in selection:
        return full / _fraction("gradient_share", selection["gradient_share"])
    if selection.get("source", "random" if config.mode == "task_free" else config.score) in _BLIND:
        return full / _fraction("density", selection.get("density", config.density))
    chosen = "network=" if selection.get("source") == "given" else f"score={shown(config.score)}"
    raise SelectionError(
        f"{chosen}: nothing is known of the share of the gradient that this child holds; begin at "
        f"{full:g}, and search upwards, not above {full / config.density:g}, the rate of a random child."
    )


def _fraction(name: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 1e-9 < value <= 1:
        raise ConfigError(
            f"selection: {name}={shown(value)} is no share; the record is damaged, choose the child anew."
        )
    return float(value)
