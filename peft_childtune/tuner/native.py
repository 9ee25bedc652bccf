"""transformers' own loader, watched: it knows nothing of this method and asks it nothing before it writes."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from ..errors import IntegrityError
from ..untrusted import PEFT_PREFIX, TensorEntry, read_header, refuse_pickle, shown
from .adopting import check_no_base_weights
from .config_file import check_beside
from .install import layers_of
from .loading import NATIVE_LOADER, PendingLoad, head_tensors

__all__ = ["watch"]


def watch(pending: PendingLoad) -> None:
    """Put a guard before transformers' loader on one model, until the adapter is there or refused."""
    if hasattr(type(pending.root), NATIVE_LOADER):
        pending.root.__dict__[NATIVE_LOADER] = _WatchedLoader(pending)


class _WatchedLoader:
    """Stands in for the loader: transformers would ignore tensors it has no place for, and overwrite base weights."""

    def __init__(self, pending: PendingLoad) -> None:
        self.pending, self.adapter_name = pending, pending.adapter_name

    def __call__(self, *args: Any, **options: Any) -> Any:
        pending, loader = self.pending, getattr(type(self.pending.root), NATIVE_LOADER)
        if next(reversed(pending.peft_config)) != pending.adapter_name:
            return loader(*args, **options)  # an adapter of another method that was added later
        try:
            for path in options.get("checkpoint_files") or ():
                refuse_pickle(path)
                if not os.path.exists(path):  # transformers names it whether it is there or not
                    check_beside(os.path.dirname(path), None, pickled=False)
                _check_contents(pending.root, pending.adapter_name, read_header(path))
            if (tensors := options.get("state_dict")) is not None:
                _check_contents(pending.root, pending.adapter_name, tensors)
            loaded = loader(*args, **options)
        except BaseException:
            pending.discard()
            raise
        pending.resolve()  # after `eval()` transformers would find it verified already; without, nothing else asks
        return loaded


def _check_contents(model: nn.Module, adapter_name: str, found: Mapping[str, TensorEntry | Tensor]) -> None:
    """Raise unless every tensor has its place, of its shape, in the adapter."""
    names = [key.removeprefix(PEFT_PREFIX) for key in found]
    if len(set(names)) != len(names):
        twice = next(name for name in names if f"{PEFT_PREFIX}{name}" in found and name in found)
        raise IntegrityError(f"{shown(twice)}: is in the weights file twice, with and without {PEFT_PREFIX!r}.")
    places: dict[str, Tensor | None] = {}
    for path, layer in layers_of(model, adapter_name).items():
        places[f"{path}.child_tuning_seal"] = None
        for parameter in layer.covered:
            places[f"{path}.child_tuning_code.{parameter}"] = layer._code(adapter_name)._buffers.get(parameter)
            places[f"{path}.child_tuning_values.{parameter}"] = layer._values(adapter_name).get(parameter)
    heads = head_tensors(model, adapter_name)
    for name, tensor in zip(names, found.values(), strict=True):
        if ".child_tuning_" not in name:
            continue
        if name not in places:
            raise IntegrityError(
                f"{shown(name)}: matches nothing in this model; the adapter was made for another base model or other "
                "target_modules."
            )
        place = places[name]
        if not name.endswith(".child_tuning_seal") and (place is None or tuple(place.shape) != tuple(tensor.shape)):
            raise IntegrityError(
                f"{name}: has the shape {tuple(tensor.shape)} in the weights file, and by adapter_config.json "
                f"{'none' if place is None else tuple(place.shape)}; the two do not belong together."
            )
    check_no_base_weights(model, [name for name in names if ".child_tuning_" not in name], set(heads))
