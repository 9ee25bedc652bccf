"""Loading: whatever path a saved adapter takes into a model, it is verified whole, or taken out again whole."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from peft.utils.other import ModulesToSaveWrapper
from torch import Tensor, nn

from ..codec import decode_child
from ..errors import IntegrityError, SelectionError
from ..seal import Sealed, seal_bytes, verify_seal
from ..weights import Fingerprint, fingerprint
from .config import ChildTuningConfig
from .install import check_not_merged, covered_tensors, layers_of, set_values
from .layer import ChildTuningLayer
from .snapshot import Snapshot

__all__ = ["PendingLoad", "adopt_state_dict", "begin_load", "head_tensors", "remove_adapter"]

_PEFT_PREFIX = "base_model.model."


def head_tensors(model: nn.Module, adapter_name: str) -> dict[str, tuple[str, Tensor]]:
    """Return the `modules_to_save` tensors of an adapter: base name -> (key in the model's state dict, tensor)."""
    found = {}
    for path, module in model.named_modules():
        path = path.replace("_fsdp_wrapped_module.", "")
        if isinstance(module, ModulesToSaveWrapper) and adapter_name in module.modules_to_save:
            for key, tensor in module.modules_to_save[adapter_name].state_dict().items():
                full = f"{path}.{key}".removeprefix(_PEFT_PREFIX)
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


def _lift_load_maps(root: nn.Module, adapter_name: str) -> None:
    for module in root.modules():
        stand_in = module.__dict__.get("adapter_state_dict_load_map")
        if isinstance(stand_in, _NoLoadMap) and stand_in.adapter_name == adapter_name:
            del module.__dict__["adapter_state_dict_load_map"]


def _sealed(name: str, layer: ChildTuningLayer, parameter: str, code: Tensor | None, values: Tensor | None) -> Sealed:
    empty = torch.zeros(0)
    code = empty.to(torch.uint8) if code is None else code.detach().cpu()
    values = empty if values is None else values.detach().cpu()

    def compute() -> Fingerprint:
        base = layer.unmerged_base(parameter)
        if not code.numel():
            return fingerprint(base, torch.zeros(0, dtype=torch.int64))
        child = decode_child(code, shape=tuple(base.shape))
        if child.nnz != values.numel():
            raise IntegrityError(
                f"{name}: {values.numel()} values for {child.nnz} kept entries; fetch the file again."
            )
        return fingerprint(base, child.indices())

    return Sealed(code, values, compute)


def remove_adapter(root: nn.Module, adapter_name: str, peft_config: dict[str, Any]) -> None:
    """Take an adapter out of a model; the last one takes the layers of this method with it."""
    layers = [m for m in root.modules() if isinstance(m, ChildTuningLayer)]
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
        _lift_load_maps(self.root, self.adapter_name)
        for layer in self._layers():
            layer._pending.pop(self.adapter_name, None)
            layer.child_tuning_seal._buffers.pop(self.adapter_name, None)

    def finish(self) -> None:
        """Accept the adapter."""
        self._close()
        for layer in self._layers():
            layer._code(self.adapter_name).selected = True

    def discard(self) -> None:
        """Take everything of the adapter out of the model."""
        _lift_load_maps(self.root, self.adapter_name)
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
            children = {
                name: _sealed(
                    name,
                    layer,
                    p,
                    layer._code(self.adapter_name)._buffers.get(p),
                    layer._values(self.adapter_name).get(p),
                )
                for name, layer, p in covered_tensors(self.root, self.adapter_name)
            }
            heads = {name: tensor for name, (_, tensor) in head_tensors(self.root, self.adapter_name).items()}
            verify_seal(torch.zeros(0, dtype=torch.uint8) if seal is None else seal, children, heads)
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


def _take(found: dict[str, Tensor], path: str, kind: str) -> Tensor | None:
    for key in (f"{path}.child_tuning_{kind}", f"{_PEFT_PREFIX}{path}.child_tuning_{kind}"):
        if key in found:
            return found.pop(key)
    return None


def _check_rest(model: nn.Module, rest: Mapping[str, Tensor], heads: set[str]) -> None:
    """Raise if a file holds base weights: PEFT would write them over the base, unsealed.

    Embeddings that are no targets pass: PEFT saves those of a resized vocabulary whole.

    Raises:
        IntegrityError: it does.
    """
    embeddings = {
        id(layer)
        for name in ("get_input_embeddings", "get_output_embeddings")
        if hasattr(model, name) and (layer := getattr(model, name)()) is not None
    }
    passing = {path for path, module in model.named_modules() if id(module) in embeddings}
    for key in rest:
        path = key.rpartition(".")[0]
        if key not in heads and path not in passing and f"{_PEFT_PREFIX}{path}" not in passing:
            raise IntegrityError(
                f"{key}: is neither part of the child nor of `modules_to_save`, and an adapter holds no base weights; "
                "save or fetch the file again."
            )


def adopt_state_dict(
    model: nn.Module, config: ChildTuningConfig, adapter_name: str, state_dict: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Verify a checkpoint, shape the adapter's tensors after it, and return what remains for PEFT to copy.

    Args:
        model: a `PeftModel`, or a base model with injected layers.
        config: the adapter's.
        adapter_name: of the adapter.
        state_dict: keys without the adapter's name, as in the file; heads under those keys or under the model's own.

    Returns:
        `state_dict` without the seal, deltas in float32.

    Raises:
        FormatError, IntegrityError, BaseMismatchError: before anything changed; a new adapter is out of the model
        again.
    """
    layers = layers_of(model, adapter_name)
    pending = next((layer._pending[adapter_name] for layer in layers.values() if adapter_name in layer._pending), None)
    check_not_merged(layers.values(), adapter_name)
    heads = {name: key for name, (key, _) in head_tensors(model, adapter_name).items()}
    own_keys = {key: heads.get(key.removeprefix(_PEFT_PREFIX), key) for key in state_dict}
    state_dict = {own_keys[key]: tensor for key, tensor in state_dict.items()}
    ours = {k: v for k, v in state_dict.items() if ".child_tuning_" in k}
    rest = {k: v for k, v in state_dict.items() if k not in ours}
    try:
        left = dict(ours)
        seals = [s for path in layers if (s := _take(left, path, "seal")) is not None]
        arrived = {
            layer.full_name(p): (layer, p, _take(left, path, f"code.{p}"), _take(left, path, f"values.{p}"))
            for path, layer in layers.items()
            for p in layer.covered
        }
        if left:
            raise IntegrityError(
                f"{min(left)}: matches nothing in this model; the adapter was made for another base model or "
                "other target_modules."
            )
        _check_rest(model, rest, set(heads.values()))
        if len(seals) != 1:
            raise IntegrityError(
                f"{len(seals)} seals instead of one; the weights file is incomplete: save or fetch it again."
            )
        for name, (_, _, code, values) in arrived.items():
            if (code is None) != (values is None):
                missing = "code" if code is None else "values"
                raise IntegrityError(f"{name}: its child_tuning_{missing} is missing; save or fetch the file again.")
            if (
                config.child is not None
                and (0 if values is None else values.numel()) != (config.child.get(name) or [0])[0]
            ):
                raise IntegrityError(
                    f"{name}: adapter_config.json and the weights file list different numbers of kept entries; "
                    "the two do not "
                    "belong together."
                )
        if absent := [name for name, key in heads.items() if key not in state_dict]:
            raise IntegrityError(
                f"{absent[0]}: is not in the weights file; the file is incomplete: save or fetch it again."
            )
        children = {n: _sealed(n, layer, p, c, v) for n, (layer, p, c, v) in arrived.items()}
        verify_seal(seals[0], children, {name: state_dict[key] for name, key in heads.items()})
    except BaseException:
        if pending is not None:
            pending.discard()
        raise
    _shape_after(arrived, adapter_name, config)
    if pending is not None:
        pending.finish()
    wide = {
        k: v.to(torch.float32) if v.is_floating_point() else v for k, v in ours.items() if "child_tuning_seal" not in k
    }
    return {**rest, **wide}


def _shape_after(arrived: Mapping[str, tuple[Any, ...]], adapter_name: str, config: ChildTuningConfig) -> None:
    for layer, parameter, code, values in arrived.values():
        holder = layer._code(adapter_name)
        holder._decoded.pop(parameter, None)
        holder.selected = True
        if code is None:
            holder._buffers.pop(parameter, None)
            layer._values(adapter_name)._parameters.pop(parameter, None)
            continue
        device = layer.base_parameter(parameter).device
        old = layer._values(adapter_name).get(parameter)
        if old is None or old.shape != values.shape:
            trainable = adapter_name in layer.active_adapters and not config.inference_mode
            place = torch.zeros(values.shape, dtype=torch.float32, device=device if old is None else old.device)
            set_values(layer, adapter_name, parameter, place, trainable=trainable)
        buffer = holder._buffers.get(parameter)
        if buffer is None or buffer.shape != code.shape:
            holder.set_child(parameter, code.to(device, copy=True))
