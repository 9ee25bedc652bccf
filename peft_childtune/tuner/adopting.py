"""Adopting a checkpoint that PEFT hands over: verified whole before a single tensor of the model changes."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import BaseMismatchError, IntegrityError
from ..untrusted import PEFT_PREFIX
from ..verification import report, verify_seal
from .config import ChildTuningConfig
from .install import check_not_merged, check_places, device_beside, layers_of, set_values
from .layer import ChildTuningLayer
from .loading import head_tensors, sealed_tensor
from .offload import fill_away_, is_away
from .sharding import sharding_of
from .snapshot import AdapterBefore

__all__ = ["adopt_state_dict", "check_no_base_weights"]

logger = logging.getLogger(__name__)


def _take(found: dict[str, Tensor], path: str, kind: str) -> Tensor | None:
    for key in (f"{path}.child_tuning_{kind}", f"{PEFT_PREFIX}{path}.child_tuning_{kind}"):
        if key in found:
            return found.pop(key)
    return None


def check_no_base_weights(model: nn.Module, rest: Iterable[str], heads: set[str]) -> None:
    """Raise if a file holds base weights: loaders would write them over the base, unsealed.

    Embeddings that are no targets pass: PEFT saves those of a resized vocabulary whole.

    Raises:
        IntegrityError: it does.
    """
    embeddings = set()
    for name in ("get_input_embeddings", "get_output_embeddings"):
        with contextlib.suppress(NotImplementedError):  # transformers' answer for models that have none
            embeddings.add(id(getattr(model, name, lambda: None)()))
    passing = {path for path, module in model.named_modules() if id(module) in embeddings}
    for key in rest:
        path = key.rpartition(".")[0]
        if key not in heads and path not in passing and f"{PEFT_PREFIX}{path}" not in passing:
            raise IntegrityError(
                f"{key}: is neither part of the child nor of `modules_to_save`, and an adapter holds no base weights; "
                "save or fetch the file again."
            )


def _check_head_shapes(heads: Mapping[str, tuple[str, Tensor]], state_dict: Mapping[str, Tensor]) -> None:
    """Raise if a head has another shape than the model's: PEFT would find out when half of the adapter is in it."""
    for name, (key, own) in heads.items():
        if own.shape != state_dict[key].shape:
            report(
                BaseMismatchError(
                    f"{name}: has the shape {tuple(state_dict[key].shape)} in the weights file, and "
                    f"{tuple(own.shape)} in this model; make the base with the head that the adapter was trained with "
                    "(for example `num_labels`). To load all but this head, pass ignore_mismatched_sizes=True inside "
                    "of `with skip_verification():`."
                )
            )


def _is_out_of_reach(layers: Iterable[ChildTuningLayer]) -> bool:
    """Return whether the base is offloaded, and without its hooks: PEFT removes them and dispatches after loading."""
    bases = [layer.get_base_layer() for layer in layers]
    return any(p.is_meta and not is_away(base) for base in bases for p in base.parameters(recurse=False))


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
        `state_dict` without the seal, deltas in float32. With it if the base is out of reach, and verified at the
        end of loading.

    Raises:
        FormatError, IntegrityError, BaseMismatchError: before anything changed; a new adapter is out of the model
        again.
    """
    layers = layers_of(model, adapter_name)
    pending = next((layer._pending[adapter_name] for layer in layers.values() if adapter_name in layer._pending), None)
    check_not_merged(layers.values(), adapter_name)
    own_heads = head_tensors(model, adapter_name)
    heads = {name: key for name, (key, _) in own_heads.items()}
    own_keys = {key: heads.get(key.removeprefix(PEFT_PREFIX), key) for key in state_dict}
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
        check_no_base_weights(model, rest, set(heads.values()))
        if len(seals) != 1:
            raise IntegrityError(
                f"{len(seals)} seals instead of one; the weights file is incomplete: save or fetch it again."
            )
        for name, (_, _, code, values) in arrived.items():
            if (code is None) != (values is None):
                missing = "code" if code is None else "values"
                raise IntegrityError(f"{name}: its child_tuning_{missing} is missing; save or fetch the file again.")
            if (
                pending is not None  # otherwise the configuration is that of an adapter that was here before
                and config.child is not None
                and (0 if values is None else values.numel()) != (config.child.get(name) or [0])[0]
            ):
                raise IntegrityError(
                    f"{name}: adapter_config.json and the weights file list different numbers of kept entries; the "
                    "two do not belong together."
                )
        if absent := [name for name, key in heads.items() if key not in state_dict]:
            raise IntegrityError(
                f"{absent[0]}: is not in the weights file; the file is incomplete: save or fetch it again."
            )
        if sharding_of(model) is None:  # otherwise this process has parts of them only
            _check_head_shapes(own_heads, state_dict)
        later = pending is not None and _is_out_of_reach(layers.values())
        if not later:
            children = {n: sealed_tensor(n, layer, p, c, v) for n, (layer, p, c, v) in arrived.items()}
            saved_with = None if pending is None else config.file_digest
            arrived_heads = {name: state_dict[key] for name, key in heads.items()}
            verify_seal(seals[0], children, arrived_heads, config=saved_with, made_for=config.made_for)
        check_places(layers.values(), adapter_name)
        rest = fill_away_(model, rest, adapter_name)
    except BaseException:
        if pending is not None:
            pending.discard()
        raise
    if any(_is_rounded(values, layer, adapter_name) for layer, _, _, values in arrived.values()):
        logger.warning(
            "adapter %r was saved with rounded deltas (`save_dtype`), from which its training goes on now: what was "
            "below their precision is lost. Checkpoints to resume from need save_dtype=None.",
            adapter_name,
        )
    before = None  # a new adapter is taken out as a whole
    if pending is None:
        before = AdapterBefore(list(layers.values()), adapter_name, [tensor for _, tensor in own_heads.values()])
    try:  # also filled: PEFT copies the same once more, and no matter where that breaks off, the adapter is whole
        fills = sharding_of(model) is None
        _shape_after(arrived, adapter_name, config, fills=fills)
        for key, tensor in own_heads.values():
            if fills and key in rest and not tensor.is_meta and tensor.shape == rest[key].shape:
                tensor.data.copy_(rest[key])
    except BaseException:
        if before is not None:
            before.restore_()
        if pending is not None:
            pending.discard()
        raise
    if pending is not None:
        pending.postpone(seals[0]) if later else pending.finish()
    wide = {
        k: v.to(torch.float32) if v.is_floating_point() else v
        for k, v in ours.items()
        if later or "child_tuning_seal" not in k
    }
    return {**rest, **wide}


def _is_rounded(values: Tensor | None, layer: ChildTuningLayer, adapter_name: str) -> bool:
    trained = [p for p in layer._values(adapter_name).parameters() if p.requires_grad]
    return values is not None and any(p.element_size() > values.element_size() for p in trained)


def _shape_after(
    arrived: Mapping[str, tuple[Any, ...]], adapter_name: str, config: ChildTuningConfig, *, fills: bool
) -> None:
    for layer, parameter, code, values in arrived.values():
        holder = layer._code(adapter_name)
        holder.forget()
        holder.selected = True
        if code is None:
            holder._buffers.pop(parameter, None)
            layer._values(adapter_name)._parameters.pop(parameter, None)
            continue
        device = device_beside(layer.base_parameter(parameter))
        old = layer._values(adapter_name).get(parameter)
        if old is None or old.shape != values.shape:
            trainable = adapter_name in layer.active_adapters and not config.inference_mode
            place = torch.zeros(values.shape, dtype=torch.float32, device=device if old is None else old.device)
            set_values(layer, adapter_name, parameter, place, trainable=trainable)
        own = layer._values(adapter_name).get(parameter)
        if fills and own is not None and not own.is_meta:
            own.data.copy_(values)
        buffer = holder._buffers.get(parameter)
        if buffer is None or buffer.shape != code.shape:
            holder.set_child(parameter, code.to(device, copy=True))
        elif fills and not buffer.is_meta:
            buffer.copy_(code)
