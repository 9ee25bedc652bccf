"""Saving: the tensors of one adapter as they go into the file, with the seal that vouches for them."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor, nn

from ..codec import STEP_BYTES, is_resampled
from ..errors import SelectionError, UnsupportedError
from ..ranks import rank
from ..seal import Sealed, make_seal
from ..weights import Fingerprint, check_finite, fingerprint, is_sharded
from .config import ChildTuningConfig
from .gathered import is_partitioned, remembered_fingerprint
from .install import layers_of
from .layer import ChildTuningLayer
from .loading import head_tensors
from .offload import onloaded
from .sharding import ZERO3, sharding_of

__all__ = ["adapter_state_dict", "drop_base_weights_"]

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def _fingerprint(layer: ChildTuningLayer, adapter_name: str, parameter: str, base: Tensor | None) -> Fingerprint:
    if (base is None or not base.numel()) and is_partitioned(layer.base_parameter(parameter)):
        return remembered_fingerprint(layer, adapter_name, parameter)
    with onloaded(layer):
        base = layer.unmerged_base(parameter, None if base is None or base.is_meta else base)
        return fingerprint(base, layer.indices_in(base, adapter_name, parameter), whole=True)


def _whole(key: str, tensor: Tensor, own: Tensor | None, sharding: str | None) -> Tensor:
    """Return a tensor to be saved, detached; raise if it is but FSDP's part of a parameter for this process."""
    if is_sharded(tensor) or (
        sharding not in (None, ZERO3)
        and own is not None
        and (not tensor.numel() or tensor.data_ptr() == own.data_ptr())
    ):
        raise UnsupportedError(
            f"{key}: {sharding} has divided it among processes, and this one would save its part only. On every "
            "process call `state = accelerator.get_state_dict(model)`, then on the first one "
            "`accelerator.unwrap_model(model).save_pretrained(folder, state_dict=state)`; with Trainer set "
            "`fsdp_state_dict_type: FULL_STATE_DICT`."
        )
    return tensor.detach()


def _first_sharded(model: nn.Module, adapter_name: str, state_dict: Mapping[str, Tensor]) -> str | None:
    """Return the key of a tensor to be saved of which ZeRO-3 has left nothing here, or None."""
    keys = [
        f"{path}.child_tuning_values.{adapter_name}.{parameter}"
        for path, layer in layers_of(model, adapter_name).items()
        for parameter in layer.covered
    ]
    saved = {key: state_dict[key] for key in keys if key in state_dict}
    saved |= {key: state_dict.get(key, tensor) for key, tensor in head_tensors(model, adapter_name).values()}
    return next((key for key, tensor in saved.items() if not tensor.numel()), None)


def _check_code(key: str, code: Tensor, *, live: Tensor) -> None:
    """Raise unless a coded child from a state dict is the one that the model has, at whatever step."""
    if code is live or live.is_meta:
        return
    payload = slice(None, -STEP_BYTES) if is_resampled(live) else slice(None)
    if code.shape != live.shape or not torch.equal(code[payload].cpu(), live[payload].cpu()):
        raise SelectionError(
            f"{key}: the state dict holds the delta of another child than the model has now, so the two cannot be "
            "saved together; take the state dict after the selection, or after loading."
        )


def _check_values(key: str, values: Tensor, *, kept: int | None) -> None:
    """Raise unless a delta from a state dict has the length that its child asks for.

    Args:
        key: of the delta.
        values: the delta.
        kept: how many entries its child has; None where this process does not know.
    """
    if kept not in (None, values.numel()):
        raise SelectionError(
            f"{key}: the state dict holds {values.numel()} numbers for the {kept} kept entries of this tensor; take "
            "the state dict after the selection, or after loading."
        )


def adapter_state_dict(
    model: nn.Module, config: ChildTuningConfig, adapter_name: str, state_dict: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Return what is saved of an adapter: codes, deltas in `save_dtype`, and the seal; keys hold the adapter's name.

    The configuration is told the sizes, so that PEFT's next step, saving it, writes them down.

    Args:
        model: a `PeftModel`, or a base model with injected layers.
        config: the adapter's.
        adapter_name: of the adapter.
        state_dict: the model's, possibly gathered from shards; base weights in it are preferred to the model's own.

    Raises:
        SelectionError: the adapter has no child yet, or `state_dict` lacks its tensors, or holds those of another.
        DeltaError: a delta is not finite.
        UnsupportedError: they are divided among processes.
    """
    if not state_dict and rank() > 0:  # a gathered state dict is empty on all processes but the first
        return {}
    layers = layers_of(model, adapter_name)
    sharding = sharding_of(model)
    if sharding == ZERO3 and (missing := _first_sharded(model, adapter_name, state_dict)):
        if rank() > 0:  # `accelerator.get_state_dict` gives None there: PEFT asks, and writes nothing
            return {missing: torch.empty(1, device="meta")}  # nor could it write this
        raise UnsupportedError(
            f"{missing}: DeepSpeed ZeRO-3 has divided it among processes. Gather the weights, by a call on every "
            "process: model.save_pretrained(path, is_main_process=accelerator.is_main_process, "
            "state_dict=accelerator.get_state_dict(engine)), with stage3_gather_16bit_weights_on_model_save: true in "
            "DeepSpeed's configuration; or let Trainer save."
        )
    out: dict[str, Tensor] = {}
    sealed: dict[str, Sealed] = {}
    layout: dict[str, list[int]] = {}
    for path, layer in layers.items():
        layer._require_child(adapter_name)
        for parameter in layer.covered:
            name = layer.full_name(parameter)
            base = state_dict.get(f"{path}.base_layer.{parameter}")
            code, values = torch.zeros(0, dtype=torch.uint8), torch.zeros(0)
            if (own := layer._values(adapter_name).get(parameter)) is not None:
                code_key, values_key = (
                    f"{path}.child_tuning_{kind}.{adapter_name}.{parameter}" for kind in ("code", "values")
                )
                if values_key not in state_dict:
                    raise SelectionError(
                        f"{name}: the state dict to be saved lacks {values_key}; pass the model's whole state dict."
                    )
                live = layer._code(adapter_name).get(parameter)
                code = state_dict.get(code_key, live)
                values = _whole(values_key, state_dict[values_key], own, sharding)
                _check_code(values_key, code, live=live)
                _check_values(values_key, values, kept=None if sharding else own.numel())
                if config.save_dtype is not None:
                    values = values.to(_DTYPES[config.save_dtype])
                if not values.is_meta:
                    check_finite(name, values)
                out[code_key], out[values_key] = code, values
            layout[name] = [values.numel(), code.numel()]
            sealed[name] = Sealed(code, values, partial(_fingerprint, layer, adapter_name, parameter, base))
    heads = {
        name: _whole(key, state_dict.get(key, tensor), tensor, sharding)
        for name, (key, tensor) in head_tensors(model, adapter_name).items()
    }
    out[f"{next(iter(layers))}.child_tuning_seal.{adapter_name}"] = make_seal(
        sealed, heads, config=config.own_digest(child=layout)
    )
    config.__dict__["_layout"] = layout
    return out


def drop_base_weights_(state_dict: dict[str, Tensor], model: nn.Module) -> None:
    """Remove the base weights of adapted layers from a state dict, in place.

    With embeddings among the targets, PEFT goes on to add the whole base embedding to the file, unsealed.
    """
    adapted = tuple(f"{path}.base_layer." for path, m in model.named_modules() if isinstance(m, ChildTuningLayer))
    for key in [key for key in state_dict if key.startswith(adapted)]:
        del state_dict[key]
