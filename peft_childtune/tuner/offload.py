"""Weights that accelerate has offloaded, brought to the execution device for as long as a layer reads them.

Adapted layers read the weights of their base layer, and the tensors of their adapters, without calling the modules
that own these, so accelerate's hooks on those modules would never run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

import torch
from torch import Tensor, nn

from ..errors import UnsupportedError

if TYPE_CHECKING:
    from .holder import AdapterHolder

__all__ = [
    "bring_in_",
    "fill_away_",
    "follow_tied_",
    "forward_onloaded",
    "is_away",
    "must_onload",
    "onloaded",
    "out_of_reach",
]

_Out = TypeVar("_Out")


def _own_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Return the parameters and buffers that a module owns itself."""
    both = {**module._parameters, **module._buffers}
    return {name: tensor for name, tensor in both.items() if tensor is not None}


def is_away(module: nn.Module) -> bool:
    """Return whether accelerate holds tensors of a module elsewhere, and can bring them in."""
    return "_hf_hook" in module.__dict__ and any(tensor.is_meta for tensor in _own_tensors(module).values())


def out_of_reach(what: str) -> UnsupportedError:
    """Return the error for a tensor that is on the meta device still when it is read."""
    return UnsupportedError(
        f"{what} is on the meta device, and no hook of accelerate's on its own module brings it in. Use it before the "
        "model is dispatched, dispatch without `preload_module_classes`, or give its module a device."
    )


@contextmanager
def _brought_in(modules: Iterable[nn.Module]) -> Iterator[list[nn.Module]]:
    """Bring in the own tensors of those modules that are away, and give the list of these."""
    here: list[Any] = []
    try:
        for module in modules:
            if is_away(module):
                module._hf_hook.pre_forward(module)  # type: ignore[operator, union-attr]
                here.append(module)
        yield here
    finally:
        for module in reversed(here):
            module._hf_hook.post_forward(module, None)


def _keep(module: Any, tensors: Mapping[str, Tensor]) -> None:
    """Have accelerate bring in these tensors from now on."""
    for hook in getattr(module._hf_hook, "hooks", [module._hf_hook]):
        hook.weights_map = {name: tensor.detach().to("cpu") for name, tensor in tensors.items()}


def _holders(layer: AdapterHolder, adapters: Iterable[str] | None = None) -> Iterator[tuple[nn.Module, nn.Module]]:
    """Yield what adapters hold on a layer, None for all adapters: (values, code), also of those that serve it."""
    for owner in layer._owners():
        values, codes = owner._held("child_tuning_values"), owner._held("child_tuning_code")
        for adapter_name in values if adapters is None else adapters:
            if adapter_name in values and adapter_name in codes:
                yield values[adapter_name], codes[adapter_name]


def must_onload(layer: AdapterHolder, adapters: list[str]) -> bool:
    """Return whether a forward with adapters needs tensors that are away; without a delta, the base layer sees to it.

    Args:
        layer: one whose base layer has a hook of accelerate; others need not be asked.
        adapters: the names of those that take part.
    """
    pairs = list(_holders(layer, adapters))
    return any(values._parameters for values, _ in pairs) and any(
        is_away(module) for module in (layer.get_base_layer(), *(module for pair in pairs for module in pair))
    )


def _refuse_gradient(_: Tensor) -> NoReturn:
    raise UnsupportedError(
        "a delta that accelerate has offloaded cannot be trained: its gradient would be lost with the copy that the "
        "forward used. Dispatch the base model before `get_peft_model`, which leaves the deltas on a device, or give "
        "adapted modules a device in `device_map`."
    )


def _refuse_training(pairs: list[tuple[nn.Module, nn.Module]], away: list[nn.Module]) -> None:
    if not torch.is_grad_enabled():
        return
    for values, code in pairs:
        trained = [p for p in values._parameters.values() if p is not None and p.requires_grad]
        if values in away:
            for parameter in trained:  # copies, that live as long as this forward
                parameter.register_hook(_refuse_gradient)  # type: ignore[no-untyped-call]
        elif code in away and trained:
            raise UnsupportedError(
                "a child that accelerate has offloaded (`offload_buffers=True`) cannot be trained: steps are counted "
                "in it. Dispatch without `offload_buffers`, or run the model under `torch.no_grad()`."
            )


def onloaded(layer: AdapterHolder, *, writes: bool = False) -> AbstractContextManager[None]:
    """Have the weights of a layer, and what its adapters hold, on the execution device.

    Args:
        layer: any; nothing happens where nothing is away.
        writes: the base weights are written to, and are to be kept: in memory from then on, also if they came from
            a disk.
    """
    if "_hf_hook" not in layer.get_base_layer().__dict__:
        return nullcontext()
    return _onloaded(layer, writes)


@contextmanager
def _onloaded(layer: AdapterHolder, writes: bool) -> Iterator[None]:
    base = layer.get_base_layer()
    pairs = list(_holders(layer))
    with _brought_in([base, *(module for pair in pairs for module in pair)]) as away:
        _refuse_training(pairs, away)
        try:
            yield
        finally:
            layer._compose_cache.clear()  # what was composed would keep the device's memory
            if writes and base in away:
                _keep(base, _own_tensors(base))


@torch.compiler.disable  # type: ignore[untyped-decorator]  # as accelerate's hooks are
def forward_onloaded(forward: Callable[..., _Out], layer: AdapterHolder, *args: Any, **kwargs: Any) -> _Out:
    """Return what a layer's `forward` does with all its weights on the execution device."""
    with onloaded(layer):
        return forward(layer, *args, **kwargs)


def follow_tied_(layer: AdapterHolder) -> None:
    """Copy tied weights that were merged into, or restored, where accelerate has parted them: in place.

    Args:
        layer: one that is served by others, after these, and onloaded.
    """
    for name, (owner, owner_name) in layer._tied.items():
        base = layer.get_base_layer()
        if "_hf_hook" in base.__dict__ and layer.base_parameter(name) is not owner.base_parameter(owner_name):
            with onloaded(owner):
                layer.base_parameter(name).data.copy_(owner.base_parameter(owner_name).data)


def bring_in_(state_dict: dict[str, Tensor], model: nn.Module, adapter_name: str) -> None:
    """Put what an adapter holds into a state dict in place, where accelerate's offloading has left meta tensors.

    Raises:
        UnsupportedError: nothing can bring them in.
    """
    kinds = ("child_tuning_values", "child_tuning_code", "modules_to_save")
    for path, module in model.named_modules():
        if not any(f".{kind}.{adapter_name}." in f".{path}." for kind in kinds):
            continue
        with _brought_in([module]):
            for name, tensor in _own_tensors(module).items():
                key = f"{path}.{name}"
                if key in state_dict and state_dict[key].is_meta:
                    if tensor.is_meta:
                        raise out_of_reach(f"{key}: the tensor")
                    state_dict[key] = tensor.detach().cpu()


def fill_away_(model: nn.Module, tensors: Mapping[str, Tensor], adapter_name: str) -> dict[str, Tensor]:
    """Give offloaded `modules_to_save` of an adapter the loaded tensors: copying into meta tensors would lose them.

    Args:
        model: with the modules in it.
        tensors: by their keys in the model's state dict.
        adapter_name: of the adapter.

    Returns:
        The tensors that are still to be copied.

    Raises:
        UnsupportedError: a place is on the meta device and cannot be filled.
    """
    left = dict(tensors)
    for path, module in model.named_modules():
        if f".modules_to_save.{adapter_name}." not in f".{path}.":
            continue
        own = _own_tensors(module)
        if is_away(module):
            _keep(module, {name: left.pop(f"{path}.{name}", tensor) for name, tensor in own.items()})
        elif lost := [name for name, tensor in own.items() if tensor.is_meta]:
            raise out_of_reach(f"{path}.{lost[0]}: the tensor")
    return left
