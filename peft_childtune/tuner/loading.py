"""Loading: whatever path a saved adapter takes into a model, it is verified whole, or taken out again whole."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from peft.utils.other import ModulesToSaveWrapper
from torch import Tensor, nn

from ..errors import SelectionError, UnsupportedError
from ..seal import Sealed, seal_bytes, sealed_file_tensor
from ..untrusted import PEFT_PREFIX
from ..verification import verify_seal
from .gathered import is_partitioned
from .install import covered_tensors, layers_of
from .layer import ChildTuningLayer, child_layers
from .offload import onloaded
from .snapshot import Snapshot

__all__ = [
    "NATIVE_LOADER",
    "PendingLoad",
    "begin_load",
    "head_tensors",
    "remove_adapter",
    "sealed_tensor",
]

NATIVE_LOADER = "_load_pretrained_model"  # what transformers' `load_adapter` calls, on the model


def head_tensors(model: nn.Module, adapter_name: str) -> dict[str, tuple[str, Tensor]]:
    """Return the `modules_to_save` tensors of an adapter: base name -> (key in the model's state dict, tensor)."""
    found = {}
    for path, module in model.named_modules():
        path = path.replace("_fsdp_wrapped_module.", "")
        if isinstance(module, ModulesToSaveWrapper) and adapter_name in module.modules_to_save:
            for key, tensor in module.modules_to_save[adapter_name].state_dict().items():
                full = f"{path}.{key}".removeprefix(PEFT_PREFIX)
                found[full] = (f"{path}.modules_to_save.{adapter_name}.{key}", tensor)
    return found


class _NoLoadMap:
    """Stands in for a head wrapper's `adapter_state_dict_load_map` while the adapter is on its way into a `PeftModel`.

    PEFT renames the heads before it calls any hook of ours, and breaks off with a bare KeyError where one is
    missing, leaving
    the half-made adapter behind. With an empty map the heads reach `adopt_state_dict`, which renames them itself.
    """

    def __init__(self, wrapper: ModulesToSaveWrapper, adapter_name: str) -> None:
        self.wrapper, self.adapter_name = wrapper, adapter_name

    def __call__(self, adapter_name: str) -> dict[str, str]:
        real: dict[str, str] = type(self.wrapper).adapter_state_dict_load_map(  # type: ignore[no-untyped-call]
            self.wrapper, adapter_name
        )
        return {} if adapter_name == self.adapter_name else real


def _lift_stand_ins(root: nn.Module, adapter_name: str) -> None:
    if getattr(root.__dict__.get(NATIVE_LOADER), "adapter_name", None) == adapter_name:
        del root.__dict__[NATIVE_LOADER]
    for module in root.modules():
        stand_in = module.__dict__.get("adapter_state_dict_load_map")
        if isinstance(stand_in, _NoLoadMap) and stand_in.adapter_name == adapter_name:
            del module.__dict__["adapter_state_dict_load_map"]


def sealed_tensor(
    name: str, layer: ChildTuningLayer, parameter: str, code: Tensor | None, values: Tensor | None
) -> Sealed:
    """Return what the seal vouches for, of a base tensor for which this code and these values have arrived."""

    def base() -> Tensor:
        if is_partitioned(layer.base_parameter(parameter)):
            raise UnsupportedError(
                f"{name}: DeepSpeed ZeRO-3 has divided it among processes, so it cannot be compared with the base "
                "that the adapter was made for; load it inside `with deepspeed.zero.GatheredParameters("
                "list(base.parameters())):`."
            )
        with onloaded(layer):
            return layer.unmerged_base(parameter)

    return sealed_file_tensor(name, code, values, base=base)


def remove_adapter(root: nn.Module, adapter_name: str, peft_config: dict[str, Any]) -> None:
    """Take an adapter out of a model; the last one takes the layers of this method with it."""
    layers = child_layers(root)
    for layer in layers:
        for holder in layer.adapter_layer_names + layer.other_param_names:
            if adapter_name in getattr(layer, holder):
                del getattr(layer, holder)[adapter_name]
        layer._active_adapter = [name for name in layer.active_adapters if name != adapter_name]
    peft_config.pop(adapter_name, None)
    last = not any(len(layer.child_tuning_code) for layer in layers)
    for module in list(root.modules()):
        for name, child in list(module._modules.items()):
            if isinstance(child, ModulesToSaveWrapper) and adapter_name in child._adapters:
                child.delete_adapter(adapter_name, [name for name in child.active_adapters if name != adapter_name])
                if not child._adapters:
                    module._modules[name] = child.original_module
            elif isinstance(child, ChildTuningLayer) and last:
                module._modules[name] = child.base_layer
    if last and not peft_config:
        root.__dict__.pop("peft_config", None)
        if getattr(root, "_hf_peft_config_loaded", False):
            root._hf_peft_config_loaded = False  # type: ignore[assignment]


@dataclass(eq=False)
class PendingLoad:
    """An adapter whose places are there and whose weights are on their way.

    Attributes:
        root: the base model, with the layers in it.
        peft_config: the model's table of configurations.
        before: what was trainable and active before, to be put back if the adapter is refused.
        sized: whether its configuration listed what will come; if not, nothing need come, as the child may be a
            fresh one.
    """

    adapter_name: str
    root: nn.Module
    peft_config: dict[str, Any]
    before: Snapshot
    sized: bool

    def _layers(self) -> list[ChildTuningLayer]:
        return list(layers_of(self.root, self.adapter_name).values())

    def _close(self) -> None:
        _lift_stand_ins(self.root, self.adapter_name)
        for layer in self._layers():
            layer._pending.pop(self.adapter_name, None)
            layer.child_tuning_seal._buffers.pop(self.adapter_name, None)

    def postpone(self, seal: Tensor) -> None:
        """Verify the adapter later, at the end of loading or at first use: nothing can be said about its base yet."""
        next(iter(self._layers())).child_tuning_seal[self.adapter_name] = seal

    def finish(self) -> None:
        """Accept the adapter."""
        self._close()
        for layer in self._layers():
            layer._code(self.adapter_name).selected = True

    def discard(self) -> None:
        """Take everything of the adapter out of the model."""
        _lift_stand_ins(self.root, self.adapter_name)
        remove_adapter(self.root, self.adapter_name, self.peft_config)
        self.before.restore_()

    def resolve(self, *, may_be_empty: bool = False) -> None:
        """Verify what a loader put into the places, on paths that run no hook of ours while loading.

        Args:
            may_be_empty: do nothing if no tensor has arrived at all.

        Raises:
            SelectionError: no tensor has arrived, and one is needed now.
            FormatError, IntegrityError, BaseMismatchError: the adapter is not sound; it is out of the model again.
        """
        layers = self._layers()
        seal = next(
            (s for m in layers if (s := m.child_tuning_seal._buffers.get(self.adapter_name)) is not None), None
        )
        arrived = [] if seal is None else [seal]
        if self.sized:  # otherwise a fresh child may stand there, and only the seal tells that something was loaded
            codes = (layer._code(self.adapter_name)._buffers.values() for layer in layers)
            arrived += [code for of_layer in codes for code in of_layer if code is not None]
        if not any(bool(tensor.any()) for tensor in arrived):
            if may_be_empty:
                return
            if not self.sized:
                self._close()
                return
            raise SelectionError(
                f"adapter {self.adapter_name!r} was made from the configuration of a saved one, but its weights were "
                "never loaded; use `PeftModel.from_pretrained`, or set `config.child = None` to start a new adapter."
            )
        try:
            children = {}
            for name, layer, p in covered_tensors(self.root, self.adapter_name):
                with onloaded(layer):
                    code = layer._code(self.adapter_name)._buffers.get(p)
                    children[name] = sealed_tensor(name, layer, p, code, layer._values(self.adapter_name).get(p))
            heads = {name: tensor for name, (_, tensor) in head_tensors(self.root, self.adapter_name).items()}
            seal = torch.zeros(0, dtype=torch.uint8) if seal is None else seal
            config = self.peft_config[self.adapter_name]
            verify_seal(seal, children, heads, config=config.file_digest, made_for=config.made_for)
        except BaseException:
            self.discard()
            raise
        self.finish()


def begin_load(pending: PendingLoad, *, by_peft_model: bool) -> None:
    """Mark an adapter as one whose weights are on their way.

    Args:
        pending: the adapter, and what to put back if it is refused.
        by_peft_model: a `PeftModel` is loading it, not transformers' or somebody's direct injection.
    """
    root, adapter_name = pending.root, pending.adapter_name
    layers = pending._layers()
    for layer in layers:
        layer._pending[adapter_name] = pending
    if by_peft_model:
        for module in root.modules():
            if isinstance(module, ModulesToSaveWrapper) and adapter_name in module.modules_to_save:
                module.__dict__["adapter_state_dict_load_map"] = _NoLoadMap(module, adapter_name)
    if layers:
        children = sum(1 for _ in covered_tensors(root, adapter_name))
        size = seal_bytes(children, len(head_tensors(root, adapter_name)))
        layers[0].child_tuning_seal[adapter_name] = torch.zeros(size, dtype=torch.uint8)
