"""What one adapter holds on one layer: deltas as parameters, the coded child as buffers, the decoded one cached."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..codec import decode_child
from ..errors import IntegrityError
from ..sparse import ResampledUnits, TensorChild

__all__ = ["ChildCode", "ChildValues"]


class ChildValues(nn.Module):
    """The deltas of one adapter on one layer: one 1-D parameter per base parameter of which anything was kept."""

    def get(self, parameter: str) -> nn.Parameter | None:
        """Return the delta of one base parameter, or None where nothing was kept."""
        return self._parameters.get(parameter)


@dataclass
class _Decoded:
    code: Tensor
    version: int
    child: TensorChild
    indices: Tensor | None = None

    def is_of(self, code: Tensor) -> bool:
        """Return whether this was decoded from that buffer as it is: DDP, for one, copies into buffers in place."""
        if self.code is not code:
            return False
        return self.version == _version(code) or isinstance(self.child.units, ResampledUnits)  # its steps count up


def _version(code: Tensor) -> int:
    return 0 if code.is_inference() else code._version


class ChildCode(nn.Module):
    """The child of one adapter on one layer, in the coded form that is saved: the file is the runtime state.

    Loaders that know nothing of this library fill buffers, so nothing can be lost on the way; the decoded form is
    made on
    first use, and again whenever a buffer was exchanged.
    """

    def __init__(self) -> None:
        super().__init__()
        self.selected = False
        self._decoded: dict[str, _Decoded] = {}

    def get(self, parameter: str) -> Tensor:
        """Return the coded child of one base parameter, uint8."""
        code = self._buffers[parameter]
        assert code is not None  # registered together with the values
        return code

    def set_child(self, parameter: str, code: Tensor) -> None:
        """Store a coded child."""
        self._buffers.pop(parameter, None)
        self.register_buffer(parameter, code)
        self._decoded.pop(parameter, None)

    def clear(self) -> None:
        """Forget every child."""
        self._buffers.clear()
        self._decoded.clear()
        self.selected = False

    def _entry(self, parameter: str, shape: tuple[int, ...], name: str) -> _Decoded | None:
        code = self._buffers.get(parameter)
        if code is None:
            return None
        entry = self._decoded.get(parameter)
        if entry is None or not entry.is_of(code):
            if code.device.type == "meta":
                raise IntegrityError(
                    f"{name}: the child is on the meta device: its adapter's weights were never loaded."
                )
            try:
                with torch.inference_mode(False):  # kept for training, which cannot save an inference tensor
                    entry = _Decoded(code, _version(code), decode_child(code.cpu(), shape=shape))
            except ValueError as error:
                raise type(error)(f"{name}: {error}") from error
            self._decoded[parameter] = entry
        return entry

    def child(self, parameter: str, shape: tuple[int, ...], name: str) -> TensorChild | None:
        """Return the child of one base parameter of that shape, or None where nothing was kept."""
        entry = self._entry(parameter, shape, name)
        return None if entry is None else entry.child

    def indices(self, parameter: str, shape: tuple[int, ...], device: torch.device, name: str) -> Tensor:
        """Return the kept positions of one base parameter: int64, `(nnz,)`, flat, strictly increasing."""
        entry = self._entry(parameter, shape, name)
        if entry is None:
            return torch.zeros(0, dtype=torch.int64, device=device)
        if isinstance(entry.child.units, ResampledUnits):
            return entry.child.indices(device=device)  # every position: not worth keeping
        if entry.indices is None or entry.indices.device != device:
            with torch.inference_mode(False):
                entry.indices = entry.child.indices(device=device).to(device)
        return entry.indices

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._decoded.clear()  # `load_state_dict` writes into the buffers in place
        super()._load_from_state_dict(*args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        """Return the state without the cache, which would triple a pickle."""
        return {**self.__dict__, "_decoded": {}}
