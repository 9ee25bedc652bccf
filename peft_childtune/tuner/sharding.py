"""Models that several processes train: what DDP leaves alone, and weights that are divided among processes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn

from ..errors import UnsupportedError
from ..ranks import agree, world_size
from ..untrusted import PEFT_PREFIX
from ..weights import is_sharded
from .ddp import DIFFERENT_CHILDREN, children_of
from .gathered import is_partitioned
from .layer import ChildTuningLayer, child_layers

__all__ = ["ZERO3", "compare_divided", "is_in_engine", "keep_codes_out_of_ddp", "refuse_sharded", "sharding_of"]

ZERO3 = "DeepSpeed ZeRO-3"
_DDP_IGNORES = "_ddp_params_and_buffers_to_ignore"
_COMPARED: WeakSet[nn.Module] = WeakSet()


def keep_codes_out_of_ddp(base: nn.Module) -> None:
    """Let DistributedDataParallel leave the coded children alone: it would send them anew at every forward."""
    paths = {id(module): path for path, module in base.named_modules()}
    codes = [
        f"{paths[id(layer)]}.child_tuning_code.{adapter_name}.{parameter}"
        for layer in child_layers(base)
        for adapter_name in layer.child_tuning_code
        for parameter in layer.covered
    ]
    others = [name for name in getattr(base, _DDP_IGNORES, ()) if ".child_tuning_code." not in name]
    # DDP finds this list whether it wraps the base or the PeftModel around it
    setattr(base, _DDP_IGNORES, [*others, *codes, *(f"{PEFT_PREFIX}{name}" for name in codes)])


def sharding_of(model: nn.Module) -> str | None:
    """Return the name of what has divided a model's parameters among processes, or None if they are whole."""
    for module in model.modules():
        if type(module).__name__ == "FullyShardedDataParallel":
            return "FSDP1"
        for tensor in module._parameters.values():
            if tensor is not None and (name := _sharded_by(tensor)) is not None:
                return name
    return None


def is_in_engine(model: nn.Module) -> bool:
    """Return whether a model is a DeepSpeed engine, or one whose parameters an engine's ZeRO optimizer trains."""
    marks = ("_hp_mapping", "_z3_optimizer")
    is_engine = any(kind.__module__.startswith("deepspeed.") for kind in type(model).__mro__)
    return is_engine or any(hasattr(parameter, mark) for parameter in model.parameters() for mark in marks)


def compare_divided(model: nn.Module) -> None:
    """Compare children over the processes, once, in the first training forward of a model in FSDP or DeepSpeed.

    These share the deltas and not the positions, so different ones would be trained as if they were the same.

    Raises:
        SelectionError: they differ.
    """
    if world_size() == 1 or model in _COMPARED or not torch.is_grad_enabled() or torch.compiler.is_compiling():
        return
    layer = next((module for module in model.modules() if isinstance(module, ChildTuningLayer)), None)
    # FSDP marks every module that it manages
    if layer is not None and ("_is_fsdp_managed_module" in layer.__dict__ or is_in_engine(layer)):
        meshes: Iterator[Any] = (getattr(p, "device_mesh", None) for p in model.parameters() if is_sharded(p))
        for group in [None] if (mesh := next(meshes, None)) is None else mesh.get_all_groups():
            agree(children_of(model), what=DIFFERENT_CHILDREN, group=group)
        _COMPARED.add(model)


def _sharded_by(tensor: Tensor) -> str | None:
    # by what they carry: DeepSpeed is optional, and slow to import
    if is_partitioned(tensor):
        return ZERO3
    return "FSDP2 (or tensor parallelism)" if is_sharded(tensor) else None


def refuse_sharded(model: nn.Module, *, what: str, instead: str) -> None:
    """Raise if a model's parameters are divided among processes.

    Raises:
        UnsupportedError: they are; the message says `what` is impossible and what to do `instead`.
    """
    if (name := sharding_of(model)) is not None:
        raise UnsupportedError(f"{what}: {name} has divided the model's weights among processes; {instead}")
