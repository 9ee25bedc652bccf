"""Models that several processes train: what DDP leaves alone, and weights that are divided among processes."""

from __future__ import annotations

from torch import Tensor, nn

from ..errors import UnsupportedError
from ..weights import is_sharded
from .gathered import is_partitioned
from .layer import child_layers
from .loading import PEFT_PREFIX

__all__ = ["ZERO3", "is_in_engine", "keep_codes_out_of_ddp", "refuse_sharded", "sharding_of"]

ZERO3 = "DeepSpeed ZeRO-3"
_DDP_IGNORES = "_ddp_params_and_buffers_to_ignore"


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
