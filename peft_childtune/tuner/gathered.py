"""Base weights under ZeRO-3, which brings them in for a forward or backward only: what saving must know of them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from ..errors import UnsupportedError
from ..weights import Fingerprint, fingerprint

if TYPE_CHECKING:
    from .holder import AdapterHolder

__all__ = ["is_partitioned", "remember_base", "remembered_fingerprint", "shape_of"]


def is_partitioned(tensor: Tensor) -> bool:
    """Return whether ZeRO-3 has left of a parameter only this process's part, which its `data` does not show."""
    return not tensor.numel() and hasattr(tensor, "ds_id")


def shape_of(parameter: Tensor) -> tuple[int, ...]:
    """Return the shape of a parameter as a whole."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def remember_base(layer: AdapterHolder, adapters: list[str]) -> None:
    """Keep the fingerprints of a layer's base weights, in a forward that has them: the base is frozen."""
    for adapter_name in adapters:
        if adapter_name not in layer._held("child_tuning_code"):
            continue
        known = layer._fingerprints.setdefault(adapter_name, {})
        for parameter in layer.covered:
            base = layer.base_parameter(parameter)
            if not base.numel():
                continue
            found = layer._code(adapter_name).decoded(parameter, base, layer.full_name(parameter))
            indices = None if found is None else found.indices
            if parameter not in known or known[parameter][0] is not indices:
                at = layer.indices_in(base, adapter_name, parameter)
                known[parameter] = indices, fingerprint(base, at, whole=True)


def remembered_fingerprint(layer: AdapterHolder, adapter_name: str, parameter: str) -> Fingerprint:
    """Return the fingerprint of a base weight that is not there now.

    Raises:
        UnsupportedError: no forward has seen it together with the present child.
    """
    decoded = layer._code(adapter_name)._decoded.get(parameter)
    indices = None if decoded is None else decoded.indices
    known = layer._fingerprints.get(adapter_name, {}).get(parameter)
    if known is None or known[0] is not indices:
        raise UnsupportedError(
            f"{layer.full_name(parameter)}: DeepSpeed ZeRO-3 has divided it among processes, and no forward has seen "
            "it whole, so the file could not say for which base it is; save after a forward (not compiled), or hand "
            "over all weights: save_pretrained(path, state_dict=accelerator.get_state_dict(model))."
        )
    return known[1]
