"""Watches optimizers: counts the steps of Child-Tuning-F, and refuses those on a delta that was replaced."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.utils.weak import WeakTensorKeyDictionary

from ..codec import advance_step_
from ..errors import SelectionError
from .state import ChildCode

__all__ = ["count_steps", "refuse_steps_on"]

# The parameters whose steps count, and where. Filled in the forward: parameters are exchanged by `.to`, by sharding,
# by copies.
_COUNTED: Any = WeakTensorKeyDictionary()
_HOOK: list[Any] = []
_REPLACED: Any = WeakTensorKeyDictionary()
_GUARD: list[Any] = []


def count_steps(values: nn.Parameter, code: ChildCode, parameter: str) -> None:
    """Advance the step counter in a coded child by one whenever an optimizer has stepped on `values`."""
    if not _HOOK:
        _HOOK.append(register_optimizer_step_post_hook(_after_step))
    _COUNTED[values] = (weakref.ref(code), parameter)


@torch.no_grad()
def _after_step(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    # A gradient scaler that found an overflow calls no step at all, except for fused optimizers: those step, and
    # skip inside.
    skipped: Tensor | None = getattr(optimizer, "found_inf", None)
    for group in optimizer.param_groups:
        for values in group["params"]:
            if (found := _COUNTED.get(values)) is None or (code := found[0]()) is None:
                continue
            buffer = code.get(found[1])
            advance_step_(buffer, 1 if skipped is None else (1 - skipped).to(torch.int64).to(buffer.device))


def refuse_steps_on(values: nn.Parameter) -> None:
    """Let every optimizer that still holds a replaced delta raise at its next step: it would train nothing."""
    if not _GUARD:
        _GUARD.append(register_optimizer_step_pre_hook(_before_step))
    _REPLACED[values] = True


def _before_step(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    if any(values in _REPLACED for group in optimizer.param_groups for values in group["params"]):
        raise SelectionError(
            f"the {type(optimizer).__name__} holds deltas of a child that was replaced since, so the present child "
            "would not be trained; make the optimizer after `select_child_network`, or after loading."
        )
