"""Puts children into layers: freshly chosen ones, and empty places for those that a loader will fill."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..codec import encode_child
from ..errors import DeltaError, FormatError, SelectionError, UnsupportedError
from ..sparse import TensorChild, UnitGrid
from ..untrusted import shown
from .config import ChildTuningConfig
from .gathered import shape_of
from .layer import ChildTuningLayer
from .offload import is_away
from .steps import refuse_steps_on

__all__ = [
    "check_not_merged",
    "check_places",
    "covered_tensors",
    "device_beside",
    "grids_of",
    "install_children",
    "layers_of",
    "prepare_places",
    "set_values",
]


def layers_of(model: nn.Module, adapter_name: str) -> dict[str, ChildTuningLayer]:
    """Return the layers that hold an adapter, by their path in `model`."""
    return {
        path.replace("_fsdp_wrapped_module.", ""): module
        for path, module in model.named_modules()
        if isinstance(module, ChildTuningLayer) and adapter_name in module.child_tuning_code
    }


def covered_tensors(model: nn.Module, adapter_name: str) -> Iterator[tuple[str, ChildTuningLayer, str]]:
    """Yield (full name, layer, parameter name) of every base tensor that an adapter covers, in the model's order."""
    for layer in layers_of(model, adapter_name).values():
        for parameter in layer.covered:
            yield layer.full_name(parameter), layer, parameter


def grids_of(model: nn.Module, adapter_name: str, config: ChildTuningConfig) -> dict[str, UnitGrid]:
    """Return how each covered base tensor is divided into units."""
    side = config.block_size if config.granularity == "block" else 1
    return {
        name: UnitGrid(
            shape_of(layer.base_parameter(parameter)),
            config.granularity,
            side,
            isinstance(layer.get_base_layer(), Conv1D) and layer.base_parameter(parameter).ndim == 2,
        )
        for name, layer, parameter in covered_tensors(model, adapter_name)
    }


def check_not_merged(layers: Iterable[ChildTuningLayer], adapter_name: str) -> None:
    """Raise if an adapter is merged: its child must not change under entries that a merge has replaced.

    Raises:
        SelectionError: it is merged.
    """
    for layer in layers:
        if adapter_name in layer.merged_adapters:
            raise SelectionError(
                f"{layer._module_name}: adapter {adapter_name!r} is merged into the base weights; call "
                "`unmerge_adapter()` first."
            )


def check_places(layers: Iterable[ChildTuningLayer], adapter_name: str) -> None:
    """Raise if the places for an adapter's tensors are offloaded: what is put there would be lost.

    Raises:
        UnsupportedError: they are.
    """
    for layer in layers:
        if is_away(layer._values(adapter_name)) or is_away(layer._code(adapter_name)):
            raise UnsupportedError(
                f"{layer._module_name}: what adapter {adapter_name!r} holds is offloaded, so no child or delta can be "
                "put there; do it before the model is dispatched, or use another adapter name."
            )


def set_values(layer: ChildTuningLayer, adapter_name: str, parameter: str, values: Tensor, *, trainable: bool) -> None:
    """Make `values` the delta of one base parameter; one of the same length, dtype and device keeps its identity."""
    holder = layer._values(adapter_name)
    old = holder.get(parameter)
    if old is not None and (old.shape, old.dtype, old.device) == (values.shape, values.dtype, values.device):
        old.data.copy_(values)
        return
    keep = trainable if old is None else old.requires_grad
    if old is not None:
        refuse_steps_on(old)
    holder._parameters.pop(parameter, None)
    holder.register_parameter(parameter, nn.Parameter(values, requires_grad=keep))
    # in the layer's order, whatever was there before: a saved optimizer knows its parameters by number only
    for name in layer.covered:
        if name in holder._parameters:
            holder._parameters[name] = holder._parameters.pop(name)


def device_beside(weight: Tensor) -> torch.device:
    """Return where to keep what belongs to a weight: an offloaded one comes from the CPU, or over it."""
    return torch.device("cpu") if weight.is_meta else weight.device


def install_children(
    model: nn.Module,
    adapter_name: str,
    children: Mapping[str, TensorChild],
    *,
    config: ChildTuningConfig,
    meta: bool = False,
) -> None:
    """Give an adapter its child: code, and a delta of zeros, or of random values if `init_weights` is False.

    Args:
        model: with the adapter's layers in it.
        adapter_name: whose child.
        children: one per covered base tensor.
        config: the adapter's.
        meta: create the deltas on the meta device (PEFT's `low_cpu_mem_usage`).

    Raises:
        DeltaError: names or shapes are not those of the model; nothing was changed.
    """
    check_not_merged(layers_of(model, adapter_name).values(), adapter_name)
    check_places(layers_of(model, adapter_name).values(), adapter_name)
    covered = list(covered_tensors(model, adapter_name))
    if unknown := set(children) - {name for name, _, _ in covered}:
        raise DeltaError(
            f"{min(unknown)}: the child network has it, but adapter {adapter_name!r} does not cover it; make the "
            "adapter with the `target_modules` for which the child was chosen."
        )
    for name, layer, parameter in covered:
        if name not in children:
            raise DeltaError(f"{name}: adapter {adapter_name!r} covers it, but the child network has no entry for it.")
        shape = shape_of(layer.base_parameter(parameter))
        if children[name].grid.shape != shape:
            raise DeltaError(f"{name}: the child is of shape {children[name].grid.shape}, the base tensor of {shape}.")
    for layer in layers_of(model, adapter_name).values():
        layer._code(adapter_name).clear()
        layer._code(adapter_name).selected = True
    for name, layer, parameter in covered:
        child = children[name]
        count = child.nnz
        if not count:
            layer._values(adapter_name)._parameters.pop(parameter, None)
            continue
        weight = layer.base_parameter(parameter)
        device = device_beside(weight)
        layer._code(adapter_name).set_child(parameter, encode_child(child).to(device))
        device = torch.device("meta") if meta else device
        make = torch.zeros if config.init_weights else torch.randn
        trainable = adapter_name in layer.active_adapters and not config.inference_mode and not layer.disable_adapters
        dtype = weight.dtype if layer._values(adapter_name).in_base_dtype else torch.float32
        set_values(layer, adapter_name, parameter, make(count, dtype=dtype, device=device), trainable=trainable)


def _check_sizes(name: str, sizes: object, numel: int) -> tuple[int, int]:
    nnz, coded = -1, -1
    if isinstance(sizes, list | tuple) and len(sizes) == 2 and all(type(n) is int for n in sizes):
        nnz, coded = sizes
    # far above any coding, and keeps a hostile file from asking for more memory than the base has
    if not (0 <= nnz <= numel and 0 <= coded <= 256 + min(16 * nnz, numel) and (nnz == 0) == (coded == 0)):
        raise FormatError(
            f"{name}: `child` in adapter_config.json says {shown(sizes)}, but the tensor has {numel} entries; [kept "
            "entries, coded bytes] is expected. The configuration is damaged: save or fetch the adapter again."
        )
    return nnz, coded


def prepare_places(model: nn.Module, adapter_name: str, config: ChildTuningConfig, *, meta: bool = False) -> None:
    """Create the tensors that a loader is about to fill, of the sizes that the configuration lists.

    Raises:
        FormatError: the list is malformed, or not about this model's tensors; nothing was created.
    """
    listed = config.child or {}
    covered = list(covered_tensors(model, adapter_name))
    if different := set(listed) ^ {name for name, _, _ in covered}:
        name = min(different)
        side = "lists it, but this model does not have it" if name in listed else "does not list it"
        raise FormatError(
            f"{name}: adapter_config.json {side}; the adapter was made for another base model or other target_modules."
        )
    sizes = {n: _check_sizes(n, listed[n], math.prod(shape_of(layer.base_parameter(p)))) for n, layer, p in covered}
    for name, layer, parameter in covered:
        nnz, coded = sizes[name]
        if nnz:
            device = device_beside(layer.base_parameter(parameter))
            layer._code(adapter_name).set_child(parameter, torch.zeros(coded, dtype=torch.uint8, device=device))
            values = torch.zeros(nnz, dtype=torch.float32, device="meta" if meta else device)
            trainable = adapter_name in layer.active_adapters and not config.inference_mode
            set_values(layer, adapter_name, parameter, values, trainable=trainable)
