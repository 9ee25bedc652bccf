"""Watches optimizers: counts the steps of Child-Tuning-F, and refuses those on a delta that was replaced."""

from __future__ import annotations

import functools
import sys
import warnings
import weakref
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.utils.weak import WeakTensorKeyDictionary

from ..codec import advance_step_
from ..errors import SelectionError, UnsupportedError
from .state import ChildCode, ChildValues

__all__ = ["count_steps", "refuse_steps_on", "watch_optimizers"]

# The codes in which steps are counted, and the holders of their deltas. These are asked for their parameters at each
# step: `.to`, copies and sharding exchange them, and FSDP2's forward sees others than the optimizer holds.
_COUNTED: weakref.WeakKeyDictionary[ChildCode, tuple[weakref.ref[ChildValues], set[str]]] = weakref.WeakKeyDictionary()
_HOOK: list[Any] = []
# The optimizers whose step is under way, innermost last, with what was counted inside: one may call another's step
# (ZeroRedundancyOptimizer on its share, Lookahead), or its own class's, and torch runs the hooks for each.
_UNDER_WAY: list[tuple[weakref.ref[torch.optim.Optimizer], set[int]]] = []
_REPLACED: Any = WeakTensorKeyDictionary()
_WATCHED: Any = WeakTensorKeyDictionary()
_GUARD: list[Any] = []


def count_steps(holder: ChildValues, code: ChildCode, parameter: str) -> None:
    """Advance the step counter in a coded child by one whenever an optimizer that holds its delta has stepped."""
    if not _HOOK:
        _HOOK.append(register_optimizer_step_pre_hook(_enter_step))
        _HOOK.append(register_optimizer_step_post_hook(_after_step))
    if (deepspeed := sys.modules.get("deepspeed.runtime.engine")) is not None:
        _watch_engines(deepspeed.DeepSpeedEngine)
    found = _COUNTED.get(code)
    if found is None or found[0]() is not holder:
        found = _COUNTED[code] = (weakref.ref(holder), set())
    found[1].add(parameter)


def _counted_deltas() -> Iterator[tuple[ChildValues, nn.Parameter, Tensor]]:
    """Yield the deltas whose steps count: their holder, the parameter that it has now, and the code that counts."""
    for code, (holder, names) in list(_COUNTED.items()):
        if (present := holder()) is None:
            continue
        for parameter in names:
            values, buffer = present.get(parameter), code._buffers.get(parameter)
            if values is not None and buffer is not None:
                yield present, values, buffer


def _enter_step(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    _UNDER_WAY.append((weakref.ref(optimizer), set()))


def _leave_step(optimizer: torch.optim.Optimizer) -> set[int]:
    """Return the ids of the deltas that were counted already inside of the step that ends now."""
    while _UNDER_WAY:  # steps that have raised have left entries behind
        entered, counted = _UNDER_WAY.pop()
        if entered() is optimizer:
            return counted
    return set()


@torch.no_grad()
def _after_step(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    counted = _leave_step(optimizer)
    # A gradient scaler that found an overflow calls no step at all, except for fused optimizers: those step, and
    # skip inside.
    skipped: Tensor | None = getattr(optimizer, "found_inf", None)
    stepped = {id(values) for group in optimizer.param_groups for values in group["params"]}
    for _holder, values, buffer in _counted_deltas():
        if id(values) in stepped and id(values) not in counted:
            advance_step_(buffer, 1 if skipped is None else (1 - skipped).to(torch.int64).to(buffer.device))
            counted.add(id(values))
    if _UNDER_WAY:
        _UNDER_WAY[-1][1].update(counted)


def _watch_engines(engine_class: Any) -> None:
    """Let DeepSpeed's engines count, for the models in them: their optimizers hold pieces of copies of the deltas."""
    take_step = getattr(engine_class, "_take_model_step", None)
    if take_step is None or not hasattr(engine_class, "was_step_applied"):
        raise UnsupportedError(
            "resample=True: this release of DeepSpeed does not tell when it has taken a step, so the mask would stay "
            "the same; use the one that the README names, or another way to train."
        )
    if hasattr(take_step, "counts_child_steps"):
        return

    @functools.wraps(take_step)
    def counted(engine: Any, *args: Any, **kwargs: Any) -> Any:
        out = take_step(engine, *args, **kwargs)
        if _COUNTED and engine.was_step_applied():  # not where it found an overflow
            _after_engine_step(engine)
        return out

    counted.counts_child_steps = True  # type: ignore[attr-defined]
    engine_class._take_model_step = counted


def _after_engine_step(engine: Any) -> None:
    inside = {id(module) for module in engine.module.modules() if isinstance(module, ChildValues)}
    # without ZeRO, in float32, the optimizer does hold the deltas, and `_after_step` has counted
    held = {id(values) for group in engine.basic_optimizer.param_groups for values in group["params"]}
    for holder, values, buffer in _counted_deltas():
        if id(holder) in inside and values.requires_grad and id(values) not in held:
            advance_step_(buffer)


def refuse_steps_on(values: nn.Parameter) -> None:
    """Let every optimizer that still holds a replaced delta raise at its next step: it would train nothing."""
    if not _GUARD:
        _GUARD.append(register_optimizer_step_pre_hook(_before_step))
    _REPLACED[values] = True


class _Watch:
    """The deltas of one child, until an optimizer has stepped on them, or one beside them has twice left them out."""

    def __init__(self, deltas: list[nn.Parameter], adapter_name: str) -> None:
        self.deltas = [weakref.ref(values) for values in deltas]
        self.adapter_name = adapter_name
        self.steps_without = 0
        self.is_over = False

    def step(self, optimizer: torch.optim.Optimizer) -> None:
        alive = [values for ref in self.deltas if (values := ref()) is not None]
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        if not alive or any(id(values) in held for values in alive):
            self.is_over = True
        elif any(values.grad is not None for values in alive):
            self.steps_without += 1
            if self.steps_without == 2:  # after one, a second optimizer that holds the child may still follow
                self.is_over = True
                warnings.warn(
                    f"an {type(optimizer).__name__} has stepped twice without the deltas of adapter "
                    f"{self.adapter_name!r}, so its child is not trained; make the optimizer after "
                    "`select_child_network`, from the parameters that require gradients.",
                    stacklevel=4,
                )


def watch_optimizers(model: nn.Module, deltas: list[nn.Parameter], adapter_name: str) -> None:
    """Warn if an optimizer that was made before the child was chosen trains the rest of the model without it."""
    if not _GUARD:
        _GUARD.append(register_optimizer_step_pre_hook(_before_step))
    watch = _Watch(deltas, adapter_name)
    for parameter in (*model.parameters(), *deltas):
        _WATCHED[parameter] = watch


def _before_step(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    watched = (_WATCHED.get(p) for group in optimizer.param_groups for p in group["params"])
    if (watch := next((w for w in watched if w is not None), None)) is not None and not watch.is_over:
        watch.step(optimizer)
    if any(values in _REPLACED for group in optimizer.param_groups for values in group["params"]):
        raise SelectionError(
            f"the {type(optimizer).__name__} holds deltas of a child that was replaced since, so the present child "
            "would not be trained; make the optimizer after `select_child_network`, or after loading."
        )
