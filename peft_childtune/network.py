"""The child network: which entries of which base tensors are trained."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from functools import cached_property

import torch
import xxhash
from torch import Tensor

from .codec import decode_child, encode_child
from .errors import DeltaError, FormatError, IntegrityError
from .files import load_tensors, save_tensors
from .sparse import TensorChild, UnitGrid

__all__ = ["ChildNetwork"]

_MAX_NUMEL = 1 << 36  # of one tensor in a file: far above any weight, and keeps a hostile file from asking for memory
_FORMAT = "peft_childtune.child_network.v1"


class ChildNetwork:
    """The kept positions of every covered base tensor: the child network of the paper.

    Args:
        children: by the base model's own parameter name; one entry per covered tensor, empty ones too.

    Example:
        >>> child = ChildNetwork.from_indices({"fc.weight": torch.tensor([0, 3])}, {"fc.weight": (2, 4)})
        >>> child
        ChildNetwork(1 tensors, 2 of 8 entries, density 0.25)
        >>> child.overlap(ChildNetwork.from_indices({"fc.weight": torch.tensor([3, 4])}, {"fc.weight": (2, 4)}))
        0.5

    Source: Xu et al. 2021 (arXiv:2109.05687), section 2.
    """

    def __init__(self, children: Mapping[str, TensorChild]) -> None:
        self.children = dict(children)

    @classmethod
    def from_indices(cls, indices: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]]) -> ChildNetwork:
        """Return the child network of given positions.

        Args:
            indices: int64, `(nnz,)` each, flat row-major positions, strictly increasing.
            shapes: of the base tensors, under the same names.

        Raises:
            DeltaError: names differ, or positions are out of order or out of range.
        """
        if set(indices) != set(shapes):
            raise DeltaError(f"indices and shapes name different tensors: {sorted(set(indices) ^ set(shapes))[:3]}.")
        children = {}
        for name, positions in indices.items():
            grid = UnitGrid(tuple(shapes[name]))
            positions = positions.detach().cpu()
            if positions.dtype is not torch.int64 or positions.ndim != 1:
                raise DeltaError(
                    f"{name}: indices are {positions.dtype} of {positions.ndim} dimensions; need int64, (nnz,)."
                )
            if positions.numel() and (
                positions[0] < 0 or positions[-1] >= grid.numel or bool((positions.diff() <= 0).any())
            ):
                raise DeltaError(
                    f"{name}: indices must increase strictly within [0, {grid.numel}); sort and deduplicate them."
                )
            children[name] = TensorChild(grid, positions)
        return cls(children)

    @cached_property
    def indices(self) -> dict[str, Tensor]:
        """Flat row-major positions per base tensor: int64, `(nnz,)`, strictly increasing, on the CPU."""
        return {name: child.indices() for name, child in self.children.items()}

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of each covered base tensor."""
        return {name: child.grid.shape for name, child in self.children.items()}

    @property
    def nnz(self) -> int:
        """Number of kept entries."""
        return sum(child.nnz for child in self.children.values())

    @property
    def numel(self) -> int:
        """Number of entries of all covered tensors."""
        return sum(child.grid.numel for child in self.children.values())

    @property
    def density(self) -> float:
        """Kept fraction, `nnz / numel`."""
        return self.nnz / self.numel if self.numel else 0.0

    def overlap(self, other: ChildNetwork) -> float:
        """Return the share of the smaller child that the other one also holds, in [0, 1].

        Raises:
            DeltaError: the two cover different tensors.
        """
        if self.shapes != other.shapes:
            different = sorted(dict(self.shapes.items() ^ other.shapes.items()))
            raise DeltaError(f"the two child networks cover different tensors, for example {different[0]}.")
        shared = sum(
            int(torch.isin(self.indices[name], other.indices[name], assume_unique=True).sum())
            for name in self.children
        )
        smaller = min(self.nnz, other.nnz)
        return shared / smaller if smaller else 0.0

    def digest(self) -> str:
        """Return 32 hexadecimal digits that depend on names, shapes and positions, not on order or coding."""
        state = xxhash.xxh3_128()
        for name in sorted(self.children):
            positions = self.indices[name]
            state.update(f"{name}\0{self.children[name].grid.shape}\0{positions.numel()}\0".encode())
            state.update(positions.numpy().tobytes())
        return state.hexdigest()

    def save(self, path: str | os.PathLike[str]) -> None:
        """Save to a safetensors file of one coded tensor per base tensor."""
        codes = {name: encode_child(child) for name, child in self.children.items()}
        shapes = ";".join(",".join(map(str, self.children[name].grid.shape)) for name in sorted(codes))
        save_tensors(codes, path, {"format": _FORMAT, "digest": self.digest(), "shapes": shapes})

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> ChildNetwork:
        """Load what `save` saved.

        Raises:
            FileNotFoundError: nothing is there.
            FormatError: the file is malformed, or holds something else.
            IntegrityError: the positions are not those that were saved.
        """
        codes, metadata = load_tensors(path)
        if metadata.get("format") != _FORMAT:
            raise FormatError(
                f"{path}: is no child network file ({_FORMAT}); save one with `ChildNetwork.save`. An adapter folder "
                "is loaded with `PeftModel.from_pretrained`."
            )
        try:
            shapes = [tuple(int(n) for n in part.split(",") if n) for part in metadata["shapes"].split(";")]
        except (KeyError, ValueError) as error:
            raise FormatError(f"{path}: the list of shapes is damaged; save the child network again.") from error
        if len(shapes) != max(1, len(codes)):
            raise FormatError(f"{path}: {len(shapes)} shapes for {len(codes)} tensors; save the child network again.")
        for name, shape in zip(sorted(codes), shapes, strict=False):
            if math.prod(shape) > _MAX_NUMEL:
                raise FormatError(f"{path}: {name} has {math.prod(shape)} entries, above the limit {_MAX_NUMEL}.")
        network = cls({n: decode_child(codes[n], shape=s) for n, s in zip(sorted(codes), shapes, strict=False)})
        if network.digest() != metadata.get("digest"):
            raise IntegrityError(
                f"{path}: holds other positions than were saved; the file is damaged, fetch it again."
            )
        return network

    def __eq__(self, other: object) -> bool:
        """Return whether both keep the same positions of the same tensors."""
        return isinstance(other, ChildNetwork) and self.shapes == other.shapes and self.digest() == other.digest()

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        """Return a summary."""
        kept = f"{self.nnz} of {self.numel} entries"
        return f"ChildNetwork({len(self.children)} tensors, {kept}, density {self.density:.3g})"
