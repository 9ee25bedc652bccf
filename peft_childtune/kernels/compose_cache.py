"""Composed weights that are kept between evaluations, for as long as they are what would be composed again."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from .compose import Edit, compose_parameter
from .options import kernel_options

__all__ = ["ComposeCache"]

_Bits = npt.NDArray[np.signedinteger[Any]]
_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}  # by the bytes of a floating point number


class _Trace:
    """What tells whether a tensor is the one that was seen, not written to since."""

    def __init__(self, tensor: Tensor) -> None:
        self.ref = weakref.ref(tensor)
        # as long as this lives, no new storage looks the same
        self.storage = StorageWeakRef(tensor.untyped_storage())  # type: ignore[no-untyped-call]
        self.state = _state(tensor)

    def is_of(self, tensor: Tensor) -> bool:
        return self.ref() is tensor and self.state == _state(tensor)


def _state(tensor: Tensor) -> tuple[Any, ...]:
    version = 0 if tensor.is_inference() else tensor._version
    return tensor.untyped_storage()._cdata, tensor.storage_offset(), version, tensor.dtype, tensor.device


def _bits(values: Tensor) -> _Bits:
    """Return a view of the bits: numpy compares them three times as fast as `torch.equal` does.

    Not by `Tensor.numpy`: that marks the storage as one that can never be resized, and FSDP2 resizes it to nothing
    after the forward.
    """
    bits: Any = values.detach().view(_INTEGERS[values.element_size()])
    found: _Bits = np.from_dlpack(bits)  # type: ignore[assignment]
    return found


def _can_keep(base: Tensor, edits: Sequence[Edit]) -> bool:
    """Return whether every step of an optimizer would show: fused ones do not count up the version of a tensor."""
    unseen = [base] if base.device.type == "cpu" else [base, *(edit.values for edit in edits)]
    return kernel_options.compose_cache and not any(tensor.requires_grad for tensor in unseen)


class _Entry:
    """A composed weight, and what it was composed from."""

    def __init__(self, base: Tensor, edits: Sequence[Edit]) -> None:
        self.weight = compose_parameter(base, edits)
        self.base = _Trace(base)
        self.deltas = [_Trace(edit.values) for edit in edits]
        self.indices = [edit.indices for edit in edits]
        # copies, on a CPU: there, comparing bits is cheap, and misses no change
        self.values = [_bits(edit.values).copy() for edit in edits] if base.device.type == "cpu" else []

    def is_of(self, base: Tensor, edits: Sequence[Edit]) -> bool:
        return (
            len(edits) == len(self.deltas)
            and self.base.is_of(base)
            and all(edit.indices is positions for edit, positions in zip(edits, self.indices, strict=True))
            and all(delta.is_of(edit.values) for edit, delta in zip(edits, self.deltas, strict=True))
            and all((_bits(edit.values) == copy).all() for edit, copy in zip(edits, self.values, strict=False))
        )


class ComposeCache:
    """The composed weights of one layer, kept while it is evaluated: for few tokens, composing costs what they cost.

    A kept weight is used again if base and deltas are the same tensors, not written to since; on a CPU deltas are
    compared bit by bit, too. (Writes through `.data` leave no trace in a tensor: after one to a base weight, or to a
    delta on an accelerator, call `eval()`. It drops what was kept, as `train()` and training steps do.) Copies and
    pickles keep nothing.
    """

    def __init__(self) -> None:
        self._kept: dict[str, _Entry] = {}

    def clear(self) -> None:
        """Drop what is kept."""
        self._kept.clear()

    def compose(self, name: str, base: Tensor, edits: Sequence[Edit]) -> Tensor:
        """Return `base` with the deltas added, without gradients: kept, or composed now and kept from now on.

        Args:
            name: of the weight in its layer.
            base: any shape, floating point.
            edits: as in `compose_parameter`.
        """
        if not _can_keep(base, edits):
            self._kept.pop(name, None)
            return compose_parameter(base, edits)
        kept = self._kept.get(name)
        if kept is None or not kept.is_of(base, edits):
            self._kept.pop(name, None)
            with torch.inference_mode(False), torch.no_grad():  # usable outside of inference mode, too
                kept = _Entry(base, edits)
            self._kept[name] = kept
        return kept.weight

    def __getstate__(self) -> dict[str, Any]:
        """Return the state of a layer that has kept nothing yet."""
        return {"_kept": {}}
