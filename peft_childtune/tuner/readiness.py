"""Whether a model is whole, and the same in all processes: before a child is chosen, or a head fitted."""

from __future__ import annotations

import os
import warnings

from torch import nn

from ..errors import SelectionError
from ..ranks import agree, failing_together, unwrapped, world_size
from ..weights import sampled_digest
from .config import ChildTuningConfig
from .inspection import config_of
from .install import check_not_merged, covered_tensors, layers_of
from .offload import onloaded, out_of_reach
from .sharding import ZERO3, is_in_engine, refuse_sharded, sharding_of

__all__ = ["check_untrained", "ready_model"]


def ready_model(
    model: nn.Module, adapter_name: str, *, caller: str, needs_weights: bool | None = None
) -> tuple[nn.Module, ChildTuningConfig]:
    """Return the model outside `torch.compile`, and the adapter's configuration. A collective.

    Args:
        model: which is not wrapped for training yet.
        adapter_name: an adapter of ours.
        caller: the public function that calls this, for messages.
        needs_weights: whether the values of the base are looked at, and not its shapes only; None if the configured
            choice decides it.

    Raises:
        SelectionError: no such adapter, a model that is wrapped already, processes that differ or of which one has
            failed.
        UnsupportedError: the model's weights are divided among processes already.
    """
    _warn_of_missing_group()
    with failing_together():
        _check_not_wrapped(model, caller)
        model = unwrapped(model)
        config = config_of(model, adapter_name)
        if needs_weights is None:
            needs_weights = config.score != "random" and config.mode == "task_driven"
        if needs_weights or sharding_of(model) != ZERO3:  # built under `deepspeed.zero.Init`: the shapes are known
            refuse_sharded(
                model,
                what=caller,
                instead="call it before the model is wrapped (before `accelerator.prepare`); or choose the child on "
                "one machine, and pass it in before wrapping: select_child_network(model, "
                "network=ChildNetwork.load(path)).",
            )
    if world_size() > 1:
        agree(sampled_digest(dict(model.named_parameters())), what=_DIFFERENT_MODELS)
    return model, config


def check_untrained(model: nn.Module, adapter_name: str, config: ChildTuningConfig) -> None:
    """Raise `SelectionError` if an adapter is merged, or has learnt something already."""
    check_not_merged(layers_of(model, adapter_name).values(), adapter_name)
    if not config.init_weights:
        return
    for name, layer, parameter in covered_tensors(model, adapter_name):
        layer.resolve_pending(adapter_name)
        with onloaded(layer):
            values = layer._values(adapter_name).get(parameter)
        if values is not None and values.is_meta:
            raise out_of_reach(f"{name}: the delta")
        if values is not None and bool(values.detach().any()):
            raise SelectionError(
                f"{name}: adapter {adapter_name!r} has been trained already, and another child or head would not go "
                "with its delta; merge it (`merge_and_unload`), delete it, or take a new adapter."
            )


_DIFFERENT_MODELS = (
    "the model's weights are not the same on all processes; build it from the same checkpoint, and with the same seed "
    "for a new head: transformers.set_seed(0) before `from_pretrained`."
)


def _warn_of_missing_group() -> None:
    if world_size() == 1 and os.environ.get("WORLD_SIZE", "1") not in ("", "1"):
        warnings.warn(
            f"WORLD_SIZE={os.environ['WORLD_SIZE']}, but the processes have not been connected, so this one works "
            "alone, and chooses a child of its own; make the Accelerator or TrainingArguments first (or call "
            "torch.distributed.init_process_group), and without accelerators set ACCELERATE_USE_CPU=true.",
            stacklevel=4,
        )


def _check_not_wrapped(model: nn.Module, caller: str) -> None:
    model = getattr(model, "_orig_mod", model)  # inside `torch.compile`
    if isinstance(model, nn.parallel.DistributedDataParallel):
        raise SelectionError(
            "the model is in DistributedDataParallel already, which would not synchronise a child's gradients; call "
            f"{caller} before wrapping (before `accelerator.prepare`), on every process."
        )
    if is_in_engine(model):
        raise SelectionError(
            "the model is in a DeepSpeed engine already, whose optimizer would not train the child; call "
            f"{caller} before `deepspeed.initialize` (before `accelerator.prepare`), on every process."
        )
