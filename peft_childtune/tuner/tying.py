"""Tied weights: one storage has one child, whichever of the modules that share it is called."""

from __future__ import annotations

from typing import Any

from torch import nn

from ..errors import TargetError
from .holder import AdapterHolder
from .layer import ChildTuningLayer, child_layers
from .modules import wrap
from .targets import covered_names, unsupported_reason

__all__ = ["tie_layers"]


def _parents(model: nn.Module, target: nn.Module) -> list[tuple[nn.Module, str]]:
    return [
        (module, name)
        for module in model.modules()
        if not isinstance(module, ChildTuningLayer)
        for name, child in module._modules.items()
        if child is target
    ]


def _identities(model: nn.Module) -> dict[int, int]:
    """Return the identity of the weight that an offloaded one is tied to: accelerate has parted them."""
    named = {
        name.replace(".base_layer.", "."): parameter
        for name, parameter in model.named_parameters(remove_duplicate=False)
    }
    tied = getattr(model, "all_tied_weights_keys", {})  # transformers' names of the weights that follow another one
    pairs = [(named[name], named[other]) for name, other in tied.items() if name in named and other in named]
    return {id(follower): id(leader) for follower, leader in pairs if follower.is_meta or leader.is_meta}


def tie_layers(model: nn.Module, adapter_name: str) -> None:
    """Let every module that shares a covered parameter use the one child of it.

    A module that was not a target, such as an output head tied to targeted embeddings, is wrapped too: merging
    writes into the shared storage, so otherwise merged and unmerged models would differ.

    Raises:
        TargetError: a module that shares a covered parameter cannot be wrapped.
    """
    leaders: dict[int, tuple[AdapterHolder, str]] = {}
    same = _identities(model)

    def identity(parameter: Any) -> int:
        return same.get(id(parameter), id(parameter))

    layers = child_layers(model)
    for layer in layers:  # who serves a weight stays so: earlier adapters have their children there
        leaders |= {identity(layer.base_parameter(name)): leader for name, leader in layer._tied.items()}
    inner = {id(m) for layer in layers for m in layer.get_base_layer().modules()}
    for layer in layers:
        for name in covered_names(layer.get_base_layer()):
            leader = leaders.setdefault(identity(layer.base_parameter(name)), (layer, name))
            if leader[0] is not layer:
                layer._tied[name] = leader
                if adapter_name in layer.child_tuning_code and adapter_name not in leader[0].child_tuning_code:
                    leader[0].update_layer(adapter_name)
    for path, module in list(model.named_modules()):
        if isinstance(module, ChildTuningLayer) or id(module) in inner:
            continue
        shared = [name for name in covered_names(module) if identity(module._parameters[name]) in leaders]
        if not shared or "modules_to_save" in path.split(".") or "original_module" in path.split("."):
            continue
        parents = _parents(model, module)
        if not parents or (reason := unsupported_reason(module)) is not None:
            reason = "is the model itself" if not parents else reason
            owner, name = leaders[identity(module._parameters[shared[0]])]
            raise TargetError(f"{path}: shares `{shared[0]}` with {owner.full_name(name)}, but {reason}.")
        follower = wrap(module, path)
        follower._active_adapter = next(iter(layers)).active_adapters
        follower._tied = {name: leaders[identity(module._parameters[name])] for name in shared}
        follower.train(module.training)
        for parent, slot in parents:
            parent._modules[slot] = follower
