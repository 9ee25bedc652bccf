"""Composed weights that are kept between evaluations, for as long as they are what would be composed again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from .compose import Edit, compose_parameter
from .options import kernel_options

__all__ = ["ComposedWeights"]


_Bits = npt.NDArray[np.signedinteger[Any]]
_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}  # by the bytes of a floating point number


@dataclass(frozen=True, eq=False)
class _Composed:
    weight: Tensor
    base: tuple[Any, ...]
    deltas: list[tuple[Any, ...]]
    indices: list[Tensor | None]
    values: list[_Bits]  # copies, on a CPU: there, comparing bits is cheap, and misses no change

    def is_of(self, base: Tensor, edits: Sequence[Edit]) -> bool:
        return (
            len(edits) == len(self.deltas)
            and self.base == _identity(base)
            and all(
                edit.indices is indices and _identity(edit.values) == identity
                for edit, indices, identity in zip(edits, self.indices, self.deltas, strict=True)
            )
            and all((_bits(edit.values) == copy).all() for edit, copy in zip(edits, self.values, strict=False))
        )


def _bits(values: Tensor) -> _Bits:
    """Return a view of the bits: numpy compares them three times as fast as `torch.equal` does."""
    found: _Bits = values.detach().view(_INTEGERS[values.element_size()]).numpy()
    return found


def _identity(base: Tensor) -> tuple[Any, ...]:
    version = 0 if base.is_inference() else base._version
    return id(base), base.data_ptr(), version, base.dtype, base.device


class ComposedWeights:
    """The composed weights of one layer, kept while it is evaluated: for few tokens, composing costs what they cost.

    A kept weight is used again if base and deltas are the same tensors, not written to since; on a CPU deltas are
    compared bit by bit, too. (Writes through `.data` leave no trace in a tensor: after one to a base weight, or to a
    delta on an accelerator, call `eval()`. It drops what was kept, as `train()` and training steps do.) Copies and
    pickles keep nothing.
    """

    def __init__(self) -> None:
        self._kept: dict[str, _Composed] = {}

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
        if not kernel_options.compose_cache:
            return compose_parameter(base, edits)
        kept = self._kept.get(name)
        if kept is None or not kept.is_of(base, edits):
            self._kept.pop(name, None)
            with torch.inference_mode(False), torch.no_grad():  # usable outside of inference mode, too
                kept = _Composed(
                    compose_parameter(base, edits),
                    _identity(base),
                    [_identity(edit.values) for edit in edits],
                    [edit.indices for edit in edits],
                    [_bits(edit.values).copy() for edit in edits] if base.device.type == "cpu" else [],
                )
            self._kept[name] = kept
        return kept.weight

    def __getstate__(self) -> dict[str, Any]:
        """Return the state of a layer that has kept nothing yet."""
        return {"_kept": {}}
