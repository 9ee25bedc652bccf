"""What one adapter holds on one layer: deltas as parameters, the coded child as buffers, the decoded one cached."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..codec import decode_child
from ..errors import IntegrityError, UnsupportedError
from ..kernels import Hull, hull_of
from ..sparse import ResampledUnits, TensorChild
from ..weights import is_sharded
from .offload import out_of_reach

__all__ = ["ChildCode", "ChildValues", "Decoded"]


class ChildValues(nn.Module):
    """The deltas of one adapter on one layer: one 1-D parameter per base parameter of which anything was kept.

    Attributes:
        in_base_dtype: whether a child chosen later has deltas of the base's own dtype, and not of float32.
    """

    in_base_dtype = False

    def __init__(self) -> None:
        super().__init__()
        # PEFT's policy makes FSDP units of leaf modules with a trainable `weight`. Nobody calls this one's forward, so
        # FSDP would never bring its parameters in: it must not be a leaf.
        self.no_leaf = nn.Module()

    def get(self, parameter: str) -> nn.Parameter | None:
        """Return the delta of one base parameter, or None where nothing was kept."""
        return self._parameters.get(parameter)


@dataclass
class Decoded:
    """A coded child, decoded for one device; empty until first use.

    Attributes:
        code: the buffer it was decoded from.
        version: of that buffer, then.
        device: of `indices`.
        indices: `(nnz,)`, flat positions, int32 where they fit: half the memory; None if `resampled`.
        numel: of the base tensor.
        resampled: the rule of a child that has no fixed positions.
        hull: of the positions in a matrix; None for other shapes.
    """

    code: Tensor | None = None
    version: int = 0
    device: torch.device | None = None
    numel: int = 0
    indices: Tensor | None = None
    resampled: ResampledUnits | None = None
    hull: Hull | None = None

    def is_of(self, code: Tensor, device: torch.device) -> bool:
        """Return whether this was decoded from that buffer as it is: DDP, for one, copies into buffers in place."""
        if self.code is not code or self.device != device:
            return False
        return self.resampled is not None or self.version == _version(code)  # resampled children count steps in it


def _version(code: Tensor) -> int:
    return 0 if code.is_inference() else code._version


class ChildCode(nn.Module):
    """The child of one adapter on one layer, in the coded form that is saved: the file is the runtime state.

    Loaders that know nothing of this library fill buffers, so nothing can be lost on the way. The decoded form is
    made on first use, and again whenever a buffer was exchanged.
    """

    def __init__(self) -> None:
        super().__init__()
        self.selected = False
        self._decoded: dict[str, Decoded] = {}

    def get(self, parameter: str) -> Tensor:
        """Return the coded child of one base parameter, uint8."""
        code = self._buffers[parameter]
        assert code is not None  # registered together with the values
        return code

    def set_child(self, parameter: str, code: Tensor) -> None:
        """Store a coded child."""
        self._buffers.pop(parameter, None)
        self.register_buffer(parameter, code)
        self._decoded[parameter] = Decoded()

    def clear(self) -> None:
        """Forget every child."""
        self._buffers.clear()
        self._decoded.clear()
        self.selected = False

    def decoded(self, parameter: str, base: Tensor, name: str) -> Decoded | None:
        """Return the decoded child of one base parameter, or None where nothing was kept.

        Args:
            parameter: its name in the layer.
            base: of the parameter's shape, on the device where the positions are wanted.
            name: the parameter's full name, for errors.
        """
        if parameter not in self._buffers:
            return None
        self._decode(parameter, tuple(base.shape), base.device, name)
        found = self._decoded[parameter]
        if found.numel != base.numel() or is_sharded(base):
            raise UnsupportedError(
                f"{name}: FSDP has divided it among processes, and brings it in only during the forward and backward "
                "of the unit it belongs to; let whole blocks be the units, not what is inside of an adapted layer."
            )
        return found

    @torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
    def _decode(self, parameter: str, shape: tuple[int, ...], device: torch.device, name: str) -> None:
        """Decode a child, unless that is done: `torch.compile` does it while it traces."""
        code, entry = self.get(parameter), self._decoded[parameter]
        if entry.is_of(code, device):
            return
        if device.type == "meta":
            raise out_of_reach(f"{name}: the base weight")
        with torch.inference_mode(False):  # kept for training, which cannot save an inference tensor
            child = self.child_of(code, shape, name)
            entry.indices = entry.resampled = entry.hull = None
            if isinstance(child.units, ResampledUnits):
                entry.resampled = child.units
            else:
                fits = child.grid.numel <= torch.iinfo(torch.int32).max
                entry.indices = child.indices(device=device).to(device, torch.int32 if fits else torch.int64)
                entry.hull = hull_of(entry.indices, (shape[0], shape[1])) if len(shape) == 2 else None
        # filled in place: a trace that has seen the dict does not see new entries
        entry.code, entry.version, entry.device, entry.numel = code, _version(code), device, math.prod(shape)

    @staticmethod
    def child_of(code: Tensor, shape: tuple[int, ...], name: str) -> TensorChild:
        """Return the child that a code holds, for a tensor of that shape.

        Raises:
            IntegrityError: the code was never loaded.
            FormatError: it is damaged.
        """
        if code.device.type == "meta":
            raise IntegrityError(f"{name}: the child is on the meta device: its adapter's weights were never loaded.")
        try:
            return decode_child(code.cpu(), shape=shape)
        except ValueError as error:
            raise type(error)(f"{name}: {error}") from error

    def child(self, parameter: str, shape: tuple[int, ...], name: str) -> TensorChild | None:
        """Return the child of one base parameter of that shape, or None where nothing was kept."""
        code = self._buffers.get(parameter)
        return None if code is None else self.child_of(code, shape, name)

    def indices(self, parameter: str, base: Tensor, name: str) -> Tensor:
        """Return the kept positions of one base parameter: int32 or int64, `(nnz,)`, flat, strictly increasing."""
        entry = self.decoded(parameter, base, name)
        if entry is None:
            return torch.zeros(0, dtype=torch.int64, device=base.device)
        return torch.arange(base.numel(), device=base.device) if entry.indices is None else entry.indices

    def forget(self) -> None:
        """Drop what is decoded."""
        self._decoded = {parameter: Decoded() for parameter in self._buffers}

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self.forget()  # `load_state_dict` writes into the buffers in place
        super()._load_from_state_dict(*args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        """Return the state without the cache, which would triple a pickle."""
        return {**self.__dict__, "_decoded": {parameter: Decoded() for parameter in self._buffers}}
